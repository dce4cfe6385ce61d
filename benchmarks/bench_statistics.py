"""Measure what is lost if a model is calibrated once and compressed at any size.

    python benchmarks/bench_statistics.py CHECKPOINT TEXTS [--output FOLDER] [--keep 75 50]
        [--methods NAME ...] [--ways NAME ...] [--seeds 3] [--documents 96] [--seconds]

TEXTS, calibration and tests are those of bench_slices.py. Each method is measured by
statistics of the original model (`observe`, then `compress --statistics`), in a run over the
text without a refit, which observes each layer on what the compressed layers before it give,
and in a run as its preset is, with a refit if it has one. In float32 on the processor.

With --seconds also seconds of the processor, all threads together, of the first draw: what it
takes to observe once, and to compress by the first method, by statistics and over the text.

What was measured stays in FOLDER, and the same command goes on with it.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_slices import TESTS, table, token_set
from transformers import logging

import ream_stream
from ream_stream import files
from ream_stream.calibration.packing import load_tokenizer
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.candidate_plans import expert_layer
from ream_stream.compression.config import RunOptions
from ream_stream.compression.method_settings import settings_for
from ream_stream.compression.statistics import Statistics, open_statistics
from ream_stream.evaluation.comparison import ComparisonSetup, Trial, run_trials
from ream_stream.planning.schedule import Budgets

ALONE: Mapping[str, Any] = {"refit": "none", "refit_target": "layer"}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "slices": {"method": "slices", **ALONE},
    "energy": {"method": "energy", **ALONE},
    "reap": {"method": "reap"},
    "ream": {"method": "ream"},
}
"""Options of the methods by name, without a refit."""

PRESETS = {"energy": "energy, refitted"}
"""Names of presets, as in bench_slices.py, where they are not those of methods."""

WAYS = ("statistics", "sequential", "preset")
"""By statistics; in a run over the text without a refit; in a run as the preset is."""


def observed(options: argparse.Namespace, seed: int, tokens: Tokens) -> Statistics:
    """Return the statistics of a draw, made once."""
    folder = options.output.resolve() / f"statistics-{seed}"
    if not (folder / "statistics.json").exists():
        path = options.output.resolve() / f"tokens-{seed}.safetensors"
        files.make_directory(path.parent)
        files.write_tensors(path, tokens.tensors(), metadata=tokens.metadata())
        ream_stream.observe(
            options.checkpoint, folder, calibration=path, compute_dtype="float32", seed=seed
        )
    return open_statistics(folder)


def trials(options: argparse.Namespace, kept: Mapping[int, Statistics]) -> Iterator[Trial]:
    """Yield what is to be measured."""
    layer = expert_layer(open_checkpoint(options.checkpoint))
    for keep in options.keep:
        for name, way in ((n, w) for n in options.methods for w in options.ways):
            refits = METHODS[name].keys() != {"method"}
            if way == "sequential" and not refits:  # it is the preset
                continue
            chosen = METHODS[name] if way != "preset" else {"method": name}
            for seed, statistics in kept.items():
                run = RunOptions.of(
                    source=options.checkpoint,
                    keep=f"{keep}%",
                    any_count=True,
                    seed=seed,
                    **chosen,
                )
                settings = settings_for(run, layer, compute_dtype="float32", device_kind="cpu")
                stored = statistics if way == "statistics" else None
                yield Trial(
                    name=f"{PRESETS.get(name, name) if way == 'preset' else f'{name}, {way}'} "
                    f"{keep}%",
                    settings=settings if stored is None else stored.settings(settings, ()),
                    calibration=statistics.tokens,
                    statistics=stored,
                )


def seconds(options: argparse.Namespace, tokens: Tokens) -> dict[str, float]:
    """Return seconds of the processor, measured once."""
    path = options.output.resolve() / "seconds.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    folder = options.output.resolve() / "timed"
    files.remove(folder)
    files.make_directory(folder)
    calibration = folder / "tokens.safetensors"
    files.write_tensors(calibration, tokens.tensors(), metadata=tokens.metadata())
    common = {"compute_dtype": "float32", "any_count": True}

    def timed(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    kept = folder / "statistics"
    found = {
        "observe": timed(
            lambda: ream_stream.observe(
                options.checkpoint, kept, calibration=calibration, compute_dtype="float32"
            )
        )
    }
    name, keep = options.methods[0], options.keep[0]
    for way, by in (("statistics", kept), ("calibration", calibration)):
        wanted = {**METHODS[name], **common, way: by, "keep": f"{keep}%"}
        compress = partial(ream_stream.compress, options.checkpoint, **wanted)
        found[f"{name} {keep}%, {way}"] = timed(partial(compress, folder / way))
    files.remove(folder)
    files.write_json(path, found)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--output", type=Path, default=Path("bench-statistics"))
    parser.add_argument("--keep", nargs="+", default=["75", "50"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--seconds", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(options.checkpoint)
    tokens = {
        seed: token_set(options.texts, "calibration", tokenizer, options.documents, 100 + seed)
        for seed in range(options.seeds)
    }
    kept = {seed: observed(options, seed, each) for seed, each in tokens.items()}
    job = ComparisonSetup(
        source=open_checkpoint(options.checkpoint),
        tests=token_set(options.texts, "test", tokenizer, TESTS, 0),
        folder=options.output / "comparison",
        device=torch.device("cpu"),
        dtype=torch.float32,
        threads=torch.get_num_threads(),
        budgets=Budgets.of(),
    )
    print(table(list(run_trials(job, list(trials(options, kept))))))
    if not options.seconds:
        return
    print("\n| seconds of the processor | |\n|---|---|")
    for name, each in seconds(options, tokens[0]).items():
        print(f"| {name} | {each:.0f} |")


if __name__ == "__main__":
    main()
