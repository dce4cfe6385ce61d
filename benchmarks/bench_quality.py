"""Measure what compression costs the built-in checkpoint, in three domains of held-out text.

    python benchmarks/bench_quality.py methods    REAM and REAP at 24 and 16 of 32 experts
    python benchmarks/bench_quality.py similarity REAM at 16, similarity from 512 tokens to all
    python benchmarks/bench_quality.py compare    five methods, three seeds, 24 and 16 experts
    python benchmarks/bench_quality.py ablation   REAM with one part changed at a time, the same
    python benchmarks/bench_quality.py controls   random groups, no alignment, REAP's variants
    python benchmarks/bench_quality.py refit      REAM and REAP, and the same refitted
    python benchmarks/bench_quality.py sweep      REAM and REAP on the paper's ten mixes, 24

The second takes groups of at most 3: with the default size of a group all dropped experts
join the most salient one here, whatever the similarity says. The last five keep what they
have measured in --output and go on with it; a seed draws other documents and samples.

Calibration is 288 sequences of 256 tokens, a third of each domain or as the mix says; the
perplexities are of up to 30,000 test tokens a domain. All in float32 on the CPU.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import logging

from ream_stream.calibration.builtin import DOMAINS, documents
from ream_stream.calibration.mix import MIXES, Part, shares
from ream_stream.calibration.packing import load_tokenizer, pack
from ream_stream.calibration.text import in_seeded_order
from ream_stream.calibration.tokens import Tokens, from_file, joined
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.cli.comparison_view import (
    Grid,
    as_csv,
    carry_out,
    comparison_facts,
    markdown,
    sweep_facts,
    sweep_tables,
    trials_of,
    write_files,
)
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.cli.demo.command import FULL, QUICK, SEQUENCE_LENGTH, Amount, write_texts
from ream_stream.cli.report.figures import pareto_picture, standalone
from ream_stream.cli.signals import stop_requests
from ream_stream.compression.finalize import MANIFEST
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.evaluation.comparison import ComparisonSetup, Outcome, Trial
from ream_stream.evaluation.evaluate import evaluate
from ream_stream.evaluation.metrics import Evaluation
from ream_stream.evaluation.variants import named
from ream_stream.file_access import read_json
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Budgets
from ream_stream.settings import Method, Settings

CPU = torch.device("cpu")


def score(folder: Path, tests: Mapping[str, Tokens], work: Path) -> dict[str, Evaluation]:
    """Return the evaluation of a checkpoint by domain."""
    checkpoint, result = open_checkpoint(folder), {}
    for domain, tokens in tests.items():
        found = evaluate(checkpoint, tokens, work, dtype=torch.float32, device=CPU)
        result[domain] = found.evaluation
    return result


def make(output: Path, tokens: Tokens, experts: int, method: Method) -> None:
    """Compress the built-in checkpoint."""
    settings = Settings(experts=experts, method=method)
    source = open_checkpoint(CHECKPOINT)
    plan = make_plan(source, settings, tokens.num_sequences, tokens.sequence_length, threads=2)
    workspace = Workspace(output=output, work=output / ".ream-stream")
    with workspace.locked():
        compress(
            plan,
            tokens,
            workspace,
            device=CPU,
        )


def homes(output: Path) -> list[dict[int, int]]:
    """Return, layer by layer, the centroid that each source expert went to."""
    layers = read_json(output / MANIFEST)["layers"]
    return [{m: group[0] for group in layer["groups"] for m in group} for layer in layers]


def agreement(one: list[dict[int, int]], other: list[dict[int, int]]) -> float:
    """Return the share of absorbed experts that have the same centroid in both."""
    same = absorbed = 0
    for a, b in zip(one, other, strict=True):
        moved = [expert for expert, centroid in b.items() if expert != centroid]
        absorbed += len(moved)
        same += sum(a.get(expert) == b[expert] for expert in moved)
    return same / absorbed


def line(name: str, scores: Mapping[str, Evaluation], note: str = "") -> None:
    """Print one row: perplexities, and the mean of nats over the domains."""
    mean = sum(each.nats for each in scores.values()) / len(scores)
    cells = " | ".join(f"{each.perplexity:.2f}" for each in scores.values())
    print(f"| {name} | {cells} | {mean:.4f} |{note}", flush=True)


def compare_methods(folder: Path, tokens: Tokens, tests: Mapping[str, Tokens]) -> None:
    """Print REAM and REAP at two sizes."""
    print(f"| experts, method | {' | '.join(tests)} | nats a token, mean |")
    line("32, original", score(CHECKPOINT, tests, folder))
    for experts in (24, 16):
        size = 16 if experts > 16 else 32
        for name, grouping in (("REAM", "ream"), ("REAP", "none")):
            output = folder / f"{name}-{experts}"
            make(output, tokens, experts, Method(grouping=grouping, group_size=size))
            line(f"{experts}, {name}", score(output, tests, folder))


def compare_samples(folder: Path, tokens: Tokens, tests: Mapping[str, Tokens]) -> None:
    """Print REAM with the similarity taken from more and more tokens."""
    print(f"| similarity tokens | {' | '.join(tests)} | nats a token, mean | same centroid |")
    everything = folder / "all"
    make(everything, tokens, 16, Method(similarity_tokens=0, group_size=3))
    for count in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        output = folder / str(count)
        make(output, tokens, 16, Method(similarity_tokens=count, group_size=3))
        share = agreement(homes(output), homes(everything))
        line(str(count), score(output, tests, folder), f" {share:.0%} |")
    line(f"all ({tokens.num_tokens})", score(everything, tests, folder), " 100% |")


def calibration(amount: Amount) -> Callable[[str, int], Tokens]:
    """Return what packs the demo's documents, by mix and seed."""
    tokenizer, total = load_tokenizer(CHECKPOINT), len(DOMAINS) * amount.calibration_sequences
    made: dict[tuple[str, int], Tokens] = {}

    def make(mix: str, seed: int) -> Tokens:
        if (mix, seed) not in made:
            weights = MIXES[mix] if mix else dict.fromkeys(DOMAINS, 1.0)
            parts = [Part(name=n, source=n, weight=w) for n, w in weights.items() if w > 0]
            sets = {
                part.name: pack(
                    in_seeded_order(documents(part.name, "calibration"), seed),
                    tokenizer,
                    num_sequences=count,
                    sequence_length=SEQUENCE_LENGTH,
                    description=part.name,
                )
                for part, count in zip(parts, shares(parts, total), strict=True)
            }
            made[mix, seed] = joined(sets, description=mix or "all domains")
        return made[mix, seed]

    return make


def bench(folder: Path, tests: Mapping[str, Tokens]) -> ComparisonSetup:
    """Return what all trials on the demo checkpoint share."""
    return ComparisonSetup(
        source=open_checkpoint(CHECKPOINT),
        tests=joined(tests, description="test texts"),
        folder=folder,
        device=CPU,
        dtype=torch.float32,
        threads=torch.get_num_threads(),
        budgets=Budgets.of(),
    )


def _carried_out(job: ComparisonSetup, trials: Sequence[Trial]) -> tuple[Outcome, ...]:
    with stop_requests() as asked:
        return carry_out(job, trials, Console(stderr=True), asked)


def compare_seeds(
    names: str, counts: tuple[int, ...], seeds: int, job: ComparisonSetup, amount: Amount
) -> None:
    """Print a table of methods by name at several sizes, with the spread over seeds."""
    for experts in counts:
        grid = Grid(
            experts=(experts,), methods=named(names), seeds=tuple(range(seeds)), group_size=None
        )
        trials = trials_of(job, grid, calibration(amount))
        outcomes = _carried_out(job, trials)
        print(f"\n{experts} of 32 experts, {seeds} seeds\n\n{markdown(outcomes)}", flush=True)
        files = {"json": comparison_facts(job, outcomes), "csv": as_csv(outcomes)}
        write_files(job.folder, {f"{names}-{experts}.{k}": v for k, v in files.items()})


def sweep(seeds: int, job: ComparisonSetup, amount: Amount) -> None:
    """Print scores, front, hypervolumes and correlations of ten mixes."""
    grid = Grid(
        experts=(24,),
        methods=("ream", "reap"),
        seeds=tuple(range(seeds)),
        group_size=None,
        mixes=tuple(MIXES),
    )
    outcomes = _carried_out(job, trials_of(job, grid, calibration(amount)))
    known = sweep_facts(outcomes)
    write_files(
        job.folder, {"sweep.json": known, "sweep.svg": standalone(pareto_picture(known))}
    )
    for table in sweep_tables(known):
        Console(width=120).print(table)


def main() -> None:
    """Print the table asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    once = {"methods": compare_methods, "similarity": compare_samples}
    sets = {"compare": "methods", **{name: name for name in ("ablation", "controls", "refit")}}
    parser.add_argument("table", choices=[*once, *sets, "sweep"])
    parser.add_argument("--output", type=Path, default=Path("bench-output"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--experts", type=int, nargs="+", default=[24, 16])
    parser.add_argument("--quick", action="store_true", help="little text: to see it work")
    options = parser.parse_args()
    logging.set_verbosity_error()
    amount = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_texts(folder, amount)
        tests = {domain: from_file(path) for domain, path in texts.items()}
        tokens = from_file(folder / "calibration.safetensors")
        print(f"calibration: {tokens.num_tokens} tokens", file=sys.stderr)
        if options.table in once:
            once[options.table](folder, tokens, tests)
            return
        job = bench(options.output, tests)
        if options.table == "sweep":
            sweep(options.seeds, job, amount)
        else:
            counts = tuple(options.experts)
            compare_seeds(sets[options.table], counts, options.seeds, job, amount)


if __name__ == "__main__":
    main()
