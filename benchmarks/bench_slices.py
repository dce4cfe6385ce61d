"""Measure what slices of experts lose, against dropping, merging and refitting whole ones.

    python benchmarks/bench_slices.py CHECKPOINT TEXTS [--output FOLDER] [--keep 75 50]
        [--methods NAME ...] [--seeds 3] [--documents 96] [--thin] [--absent DOMAIN]

TEXTS is a folder with DOMAIN.calibration.jsonl and DOMAIN.test.jsonl for each domain, a
document with the field "text" in each line. Calibration is one sequence of 256 tokens of each
of so many documents a domain; with --thin as many sequences, but all that the first documents
have. Tests are 96 sequences a domain, each of a document of its own. --absent leaves a domain
out of the calibration. Share is of the bytes of routed experts, in float32 on the processor.

What was measured stays in FOLDER, and the same command goes on with it.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, logging

from ream_stream.calibration.packing import load_tokenizer
from ream_stream.calibration.tokens import Tokens, from_tensors, joined
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.candidate_plans import expert_layer
from ream_stream.compression.config import RunOptions
from ream_stream.compression.method_settings import settings_for
from ream_stream.evaluation.comparison import ComparisonSetup, Outcome, Trial, run_trials
from ream_stream.planning.schedule import Budgets

LENGTH = 256
TESTS = 96

METHODS: Mapping[str, Mapping[str, Any]] = {
    "ream": {"method": "ream", "group_size": 16},
    "ream C 32": {"method": "ream", "group_size": 32},
    "reap": {"method": "reap"},
    "hc-smoe": {"method": "hc-smoe"},
    "mc-smoe": {"method": "mc-smoe"},
    "frequency": {"method": "reap", "saliency": "frequency"},
    "energy": {"method": "energy", "refit": "none"},
    "energy, refitted": {"method": "energy"},
    "energy, trajectory": {"method": "energy", "refit_target": "trajectory"},
    "slices": {"method": "slices"},
    "slices, layer": {"method": "slices", "refit_target": "layer"},
    "slices, no refit": {"method": "slices", "refit": "none", "refit_target": "layer"},
    "mix": {"method": "slices", "slices": 1},
    **{
        f"slices {slices}x{width}": {"method": "slices", "slices": slices, "width": width}
        for slices, width in (
            *((1, 54), (1, 42), (2, 32), (2, 28), (2, 24)),
            *((3, 20), (3, 16), (4, 16), (4, 14), (4, 12)),
        )
    },
}
"""Options of the methods by name."""


def sequences(
    path: Path, tokenizer: PreTrainedTokenizerBase, count: int, seed: int, *, thin: bool
) -> torch.Tensor:
    """Return token ids of so many sequences, (count, LENGTH)."""
    documents = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    random.Random(seed).shuffle(documents)
    drawn, rows = random.Random(seed + 1), []
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        starts = range(0, len(ids) - LENGTH + 1, LENGTH)
        if len(ids) >= LENGTH and not thin:
            starts = [drawn.randrange(len(ids) - LENGTH + 1)]
        rows += [ids[start : start + LENGTH] for start in starts]
        if len(rows) >= count:
            return torch.tensor(rows[:count])
    raise SystemExit(f"{path} has {len(rows)} sequences of {LENGTH} tokens, not {count}")


def token_set(
    folder: Path,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    *,
    absent: str | None = None,
    thin: bool = False,
) -> Tokens:
    """Return the tokens of all domains but the absent one."""
    sets = {}
    for path in sorted(folder.glob(f"*.{kind}.jsonl")):
        domain = path.name.split(".")[0]
        if domain != absent:
            ids_SL = sequences(path, tokenizer, count, seed, thin=thin)
            sets[domain] = from_tensors({"input_ids": ids_SL}, description=domain)
    return joined(sets, description=f"{kind} {seed}")


def trials(options: argparse.Namespace, tokens: Mapping[int, Tokens]) -> Iterator[Trial]:
    """Yield what is to be measured."""
    layer = expert_layer(open_checkpoint(options.checkpoint))
    for keep in options.keep:
        for name in options.methods:
            for seed, calibration in tokens.items():
                run = RunOptions.of(
                    source=options.checkpoint,
                    keep=f"{keep}%",
                    any_count=True,
                    seed=seed,
                    **METHODS[name],
                )
                settings = settings_for(run, layer, compute_dtype="float32", device_kind="cpu")
                yield Trial(name=f"{name} {keep}%", settings=settings, calibration=calibration)


def table(outcomes: list[Outcome]) -> str:
    """Return a Markdown table: mean and deviation over seeds of nats more, and by domain."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes[1:]:
        groups.setdefault(outcome.name, []).append(outcome)
    domains = [name for name in outcomes[0].scores if name != "all"]
    lines = [
        "| method | experts x width, top-k times | weights, MB | nats more | KL | "
        f"{' | '.join(domains)} |",
        "|---" * (5 + len(domains)) + "|",
    ]
    for name, group in groups.items():
        fields = group[0].fields
        shape = f"{fields['experts']} x {fields['width'] or 'even'}, {fields['slices'] or 1}"

        def cell(domain: str, measure: str, group: list[Outcome] = group) -> str:
            values = [float(each.value(domain, measure) or 0) for each in group]
            deviation = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.4f}{deviation}"

        weights = f"{(group[0].output_bytes or 0) / 1e6:.2f}"
        means = [weights, cell("all", "nats more"), cell("all", "divergence")]
        means += [cell(domain, "nats more") for domain in domains]
        lines.append(f"| {name} | {shape} | {' | '.join(means)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--output", type=Path, default=Path("bench-slices"))
    parser.add_argument("--keep", nargs="+", default=["75", "50"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--thin", action="store_true")
    parser.add_argument("--absent")
    options = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(options.checkpoint)
    tokens = {
        seed: token_set(
            options.texts,
            "calibration",
            tokenizer,
            options.documents,
            100 + seed,
            absent=options.absent,
            thin=options.thin,
        )
        for seed in range(options.seeds)
    }
    job = ComparisonSetup(
        source=open_checkpoint(options.checkpoint),
        tests=token_set(options.texts, "test", tokenizer, TESTS, 0),
        folder=options.output,
        device=torch.device("cpu"),
        dtype=torch.float32,
        threads=torch.get_num_threads(),
        budgets=Budgets.of(),
    )
    outcomes = list(run_trials(job, list(trials(options, tokens))))
    print(table(outcomes))


if __name__ == "__main__":
    main()
