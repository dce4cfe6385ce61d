"""Measure what compression costs the built-in checkpoint, in three domains of held-out text.

    python tools/bench_quality.py methods       REAM and REAP at 24 and 16 of 32 experts
    python tools/bench_quality.py similarity    REAM at 16, similarity from 512 tokens to all

The second takes groups of at most 3: with the default size of a group all dropped experts
join the most salient one here, whatever the similarity says.

Calibration is 288 sequences of 256 tokens, a third of each domain; the perplexities are of
up to 30,000 test tokens a domain. Everything is computed in float32 on the CPU.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import logging

from ream_stream.calibration.tokens import Tokens, from_file
from ream_stream.checkpoint.source import open_checkpoint
from ream_stream.cli.demonstration import FULL, write_texts
from ream_stream.demo import CHECKPOINT
from ream_stream.durable import read_json
from ream_stream.evaluate import Result, evaluate
from ream_stream.finish import MANIFEST
from ream_stream.journal import Workspace
from ream_stream.pipeline import compress
from ream_stream.plan import make_plan
from ream_stream.scores import Evaluation
from ream_stream.settings import Method, Settings

CPU = torch.device("cpu")


def score(folder: Path, tests: Mapping[str, Tokens], work: Path) -> dict[str, Evaluation]:
    """Return the evaluation of a checkpoint by domain."""
    checkpoint, result = open_checkpoint(folder), {}
    for domain, tokens in tests.items():
        *_, last = evaluate(checkpoint, tokens, work, dtype=torch.float32, device=CPU)
        assert isinstance(last, Result)
        result[domain] = last.evaluation
    return result


def make(output: Path, tokens: Tokens, experts: int, method: Method) -> None:
    """Compress the built-in checkpoint."""
    settings = Settings(experts=experts, method=method)
    source = open_checkpoint(CHECKPOINT)
    plan = make_plan(source, settings, tokens.num_sequences, tokens.sequence_length)
    workspace = Workspace(output=output, work=output / ".ream-stream")
    with workspace.locked():
        for _ in compress(plan, tokens, workspace, device=CPU, threads=2):
            pass


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


def main() -> None:
    """Print the table asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["methods", "similarity"])
    options = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = {domain: from_file(path) for domain, path in write_texts(folder, FULL).items()}
        tokens = from_file(folder / "calibration.safetensors")
        print(f"calibration: {tokens.num_tokens} tokens", file=sys.stderr)
        table = {"methods": compare_methods, "similarity": compare_samples}[options.table]
        table(folder, tokens, tests)


if __name__ == "__main__":
    main()
