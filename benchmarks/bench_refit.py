"""Measure what refitting the kept experts gains on the built-in checkpoint.

    python benchmarks/bench_refit.py methods RESULTS       every method with and without refit
    python benchmarks/bench_refit.py robustness RESULTS    absent domains, tokens, penalties
    python benchmarks/bench_refit.py quantized RESULTS     with experts stored in FP8 and INT4
    python benchmarks/bench_refit.py show RESULTS          the tables of what is there so far

Each run draws 192 sequences of 256 tokens, equally from three domains, with documents
shuffled by the seed, and is scored in nats a token above the original on 16,384 held-out
tokens a domain. Results are appended to RESULTS as JSON lines and what is there is not run
again, so a table can be stopped, continued, and shared among processes: --part 1/2 and
--part 2/2 do disjoint halves. Everything is computed in float32 on one thread.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_quality import CPU, score
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import logging

from ream_stream.calibration.builtin import DOMAINS, documents
from ream_stream.calibration.packing import load_tokenizer, pack, pack_up_to
from ream_stream.calibration.tokens import Tokens, joined
from ream_stream.checkpoint.formats import Codec, Fp8Block, Int4
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.cli.options import PRESETS
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.events import Event, LayerDone
from ream_stream.method.saliency import SALIENCIES
from ream_stream.planning.planner import make_plan
from ream_stream.settings import Method, Settings, options_of

LENGTH = 256
TEST_TOKENS = 16_384
SIZES = (24, 16)
REFITS = ("none", *options_of(Method)["refit_target"].metadata["choices"])
METHODS: Mapping[str, Mapping[str, Any]] = {
    **{f"prune by {name}": {"grouping": "none", "saliency": name} for name in SALIENCIES},
    **{f"merge by {name}": dict(PRESETS[name]) for name in ("ream", "hc-smoe", "mc-smoe")},
}
FORMATS: Mapping[str, tuple[Codec, Mapping[str, Any]]] = {
    "FP8 blocks": (Fp8Block(), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "INT4 groups": (
        Int4(group=32),
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": 32,
                    },
                }
            },
        },
    ),
}
"""What the experts may be stored in, and how config.json tells it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One compression."""

    method: str
    experts: int
    refit: str
    seed: int
    domains: tuple[str, ...] = tuple(DOMAINS)
    sequences: int = 192
    penalties: tuple[float, ...] | None = None
    iterations: int | None = None
    stored: str = "as it is"

    @property
    def facts(self) -> dict[str, Any]:
        """Return what it is, as the results have it."""
        facts = asdict(self)
        if self.stored not in FORMATS:
            del facts["stored"]
        return facts

    @property
    def key(self) -> str:
        """Return what names it in the results."""
        return json.dumps(self.facts, sort_keys=True)

    def settings(self) -> Settings:
        """Return what is asked of the compression."""
        chosen = dict(METHODS[self.method])
        if self.refit != "none":
            chosen |= {"refit": "down", "refit_target": self.refit}
        if self.penalties is not None:
            chosen["refit_lambda"] = self.penalties
        if self.iterations is not None:
            chosen["refit_iterations"] = self.iterations
        size = 16 if self.experts > 16 else 32
        return Settings(experts=self.experts, method=Method(group_size=size, **chosen))


def method_cases(seeds: int) -> Iterator[Case]:
    """Yield every method without and with refit, seed after seed."""
    for seed in range(seeds):
        for experts in SIZES:
            for method in METHODS:
                for refit in REFITS:
                    yield Case(method=method, experts=experts, refit=refit, seed=seed)


def robustness_cases(seeds: int) -> Iterator[Case]:
    """Yield what could break it."""
    common = {"method": "prune by energy"}
    for seed in range(seeds):
        for experts in SIZES:
            for absent in DOMAINS:
                left = tuple(domain for domain in DOMAINS if domain != absent)
                for method in ("prune by energy", "prune by reap"):
                    for refit in REFITS:
                        yield Case(
                            method=method,
                            experts=experts,
                            refit=refit,
                            seed=seed,
                            domains=left,
                        )
            for sequences in (15, 63, 255, 1023):
                for refit in ("none", "layer"):
                    yield Case(
                        experts=experts, refit=refit, seed=seed, sequences=sequences, **common
                    )
            for penalty in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
                yield Case(
                    experts=experts, refit="layer", seed=seed, penalties=(penalty,), **common
                )
            for iterations in (1, 2, 3, 5, 8):
                yield Case(
                    experts=experts, refit="layer", seed=seed, iterations=iterations, **common
                )


def quantized_cases(seeds: int) -> Iterator[Case]:
    """Yield the recommended method, REAP and REAM on experts that are stored quantized."""
    for seed in range(seeds):
        for stored in FORMATS:
            for method in ("prune by energy", "prune by reap", "merge by ream"):
                for refit in ("none", "layer"):
                    yield Case(method=method, experts=24, refit=refit, seed=seed, stored=stored)


def quantize(folder: Path, stored: str) -> Path:
    """Write the built-in checkpoint with its experts in a format."""
    codec, told = FORMATS[stored]
    tensors: dict[str, Tensor] = {}
    for path in CHECKPOINT.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if ".experts." not in name:
                tensors[name] = tensor
                continue
            prefix = name.removesuffix(".weight")
            parts = codec.encode(tensor.float())
            tensors |= {prefix + suffix: part for suffix, part in parts.items()}
    target = folder / stored.replace(" ", "-")
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for path in CHECKPOINT.glob("*.json"):
        if not path.name.endswith(".index.json"):
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = told
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target


class Bench:
    """Runs cases and remembers them."""

    def __init__(self, results: Path, folder: Path) -> None:
        self.results, self.folder = results, folder
        self.sources = {stored: quantize(folder, stored) for stored in FORMATS}
        self.tokenizer = load_tokenizer(CHECKPOINT)
        self.tests = {
            domain: pack_up_to(
                documents(domain, "test"),
                self.tokenizer,
                max_tokens=TEST_TOKENS,
                sequence_length=LENGTH,
                description=domain,
            )
            for domain in DOMAINS
        }
        self.original = score(CHECKPOINT, self.tests, folder)

    def calibration(self, case: Case) -> Tokens:
        """Return a case's calibration set."""
        drawn = {}
        for domain in case.domains:
            texts = documents(domain, "calibration")
            random.Random(case.seed).shuffle(texts)
            drawn[domain] = pack(
                texts,
                self.tokenizer,
                num_sequences=case.sequences // len(case.domains),
                sequence_length=LENGTH,
                description=domain,
            )
        return joined(drawn, description="drawn")

    def run(self, case: Case) -> None:
        """Compress, score and append the result."""
        tokens, start = self.calibration(case), time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            output = Path(name)
            plan = make_plan(
                open_checkpoint(self.sources.get(case.stored, CHECKPOINT)),
                case.settings(),
                tokens.num_sequences,
                tokens.sequence_length,
                threads=1,
            )
            workspace = Workspace(output=output, work=output / ".ream-stream")
            events: list[Event] = []
            with workspace.locked():
                compress(plan, tokens, workspace, device=CPU, report=events.append)
            seconds = time.perf_counter() - start
            scores = score(output, self.tests, self.folder)
        layers = [event for event in events if isinstance(event, LayerDone)]
        refitted = [asdict(layer.refitted) for layer in layers if layer.refitted]
        lost = {d: scores[d].nats - self.original[d].nats for d in scores}
        line = {"case": case.facts, "lost": lost, "seconds": seconds, "refitted": refitted}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        mean = statistics.mean(lost.values())
        print(f"{mean:.4f}  {seconds:.0f} s  {case}", file=sys.stderr, flush=True)


Found = dict[str, dict[str, Any]]


def load(results: Path) -> Found:
    """Return the results so far, by key of the case."""
    if not results.is_file():
        return {}
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {json.dumps(line["case"], sort_keys=True): line for line in lines}


def cell(found: Found, cases: Sequence[Case], domains: Sequence[str] = tuple(DOMAINS)) -> str:
    """Return mean and standard deviation over the cases that are there."""
    lines = [found[case.key]["lost"] for case in cases if case.key in found]
    means = [statistics.mean(lost[domain] for domain in domains) for lost in lines]
    if not means:
        return "-"
    spread = f" ± {statistics.stdev(means):.4f}" if len(means) > 1 else ""
    return f"{statistics.mean(means):.4f}{spread}"


def show_gains(found: Found, cases: Sequence[Case]) -> None:
    """Print what refits gain draw by draw, which means and spreads do not tell."""

    def lost(case: Case, **changed: str) -> float:
        line = found.get(replace(case, **changed).key)
        return statistics.mean(line["lost"].values()) if line else math.nan

    print("\n## Of the loss of another method, what pruning by energy removes, draw by draw\n")
    mine = [c for c in cases if c.method == "prune by energy" and c.refit != "none"]
    for experts, refit in dict.fromkeys((case.experts, case.refit) for case in mine):
        for other in ("prune by reap", "merge by ream"):
            shares = [
                f"{1 - lost(case) / lost(case, method=other, refit='none'):.0%}"
                for case in mine
                if (case.experts, case.refit) == (experts, refit)
            ]
            print(f"{experts} kept, {refit}, of {other}: {', '.join(shares)}")
    pairs = [(lost(c), lost(c, refit="layer")) for c in cases if c.refit == "trajectory"]
    less = sum(one < other for one, other in pairs)
    print(f"\nthe trajectory lost less than layer in {less} of {len(pairs)} pairs of runs")


def show(found: Found, seeds: int) -> None:
    """Print every table, with what is there."""
    cases = list(method_cases(seeds))
    print("\n## Nats a token above the original, mean of three domains\n")
    print(f"| method | {' | '.join(f'{n} kept, {r}' for n in SIZES for r in REFITS)} |")
    for method in METHODS:
        cells = [
            cell(found, [c for c in cases if (c.method, c.experts, c.refit) == (method, n, r)])
            for n in SIZES
            for r in REFITS
        ]
        print(f"| {method} | {' | '.join(cells)} |")
    show_gains(found, cases)
    cases = list(robustness_cases(seeds))
    print("\n## Calibrated without a domain: that domain, and the others\n")
    print(f"| method, kept, absent | {' | '.join(REFITS)} |")
    apart = [c for c in cases if len(c.domains) < len(DOMAINS)]
    for method in dict.fromkeys(case.method for case in apart):
        for experts in SIZES:
            for absent in DOMAINS:
                mine = [
                    case
                    for case in apart
                    if (case.method, case.experts) == (method, experts)
                    and absent not in case.domains
                ]
                cells = []
                for refit in REFITS:
                    some = [case for case in mine if case.refit == refit]
                    rest = some[0].domains
                    cells.append(f"{cell(found, some, [absent])}; {cell(found, some, rest)}")
                print(f"| {method}, {experts}, {absent} | {' | '.join(cells)} |")
    cases = list(quantized_cases(seeds))
    print("\n## 24 experts stored quantized, nats above the original in bfloat16\n")
    print(f"| stored, method | {' | '.join(REFITS[:2])} |")
    for stored, method in dict.fromkeys((case.stored, case.method) for case in cases):
        mine = [case for case in cases if (case.stored, case.method) == (stored, method)]
        cells = [cell(found, [c for c in mine if c.refit == refit]) for refit in REFITS[:2]]
        print(f"| {stored}, {method} | {' | '.join(cells)} |")
    cases = list(robustness_cases(seeds))
    whole = [case for case in cases if len(case.domains) == len(DOMAINS)]
    plain = [c for c in whole if c.penalties is None and c.iterations is None]
    _show_by(found, "calibration tokens", plain, lambda c: c.sequences * LENGTH)
    _show_by(found, "lambda", [c for c in whole if c.penalties], lambda c: c.penalties)
    _show_by(found, "iterations", [c for c in whole if c.iterations], lambda c: c.iterations)


def _show_by(
    found: Found, name: str, cases: Sequence[Case], value: Callable[[Case], object]
) -> None:
    refits = [refit for refit in REFITS if any(case.refit == refit for case in cases)]
    print(f"\n## By {name}, prune by energy\n")
    print(f"| {name} | {' | '.join(f'{n} kept, {r}' for n in SIZES for r in refits)} |")
    for each in dict.fromkeys(map(value, cases)):
        cells = [
            cell(found, [c for c in cases if (value(c), c.experts, c.refit) == (each, n, r)])
            for n in SIZES
            for r in refits
        ]
        print(f"| {each} | {' | '.join(cells)} |")


def main() -> None:
    """Run or print the table asked for."""
    tables = {
        "methods": method_cases,
        "robustness": robustness_cases,
        "quantized": quantized_cases,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=[*tables, "show"])
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", default="1/1")
    options = parser.parse_args()
    if options.table == "show":
        show(load(options.results), options.seeds)
        return
    part, parts = map(int, options.part.split("/"))
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options.results, Path(name))
        for case in list(tables[options.table](options.seeds))[part - 1 :: parts]:
            if case.key not in load(options.results):
                bench.run(case)


if __name__ == "__main__":
    main()
