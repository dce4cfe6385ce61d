"""The demo: the packaged checkpoint, compressed in three ways, measured as the verbs do."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ream_stream import files
from ream_stream.calibration.builtin import DOMAINS, documents
from ream_stream.calibration.packing import load_tokenizer, pack, pack_up_to
from ream_stream.calibration.tokens import joined
from ream_stream.cli.console import columns
from ream_stream.cli.evaluation_progress import evaluating
from ream_stream.cli.report.facts import gather
from ream_stream.cli.report.page import page
from ream_stream.cli.run import following
from ream_stream.cli.signals import stop_requests, stopping
from ream_stream.compression.file_lock import claimed
from ream_stream.compression.workspace import workspace_of
from ream_stream.errors import DamagedError
from ream_stream.evaluation import api
from ream_stream.evaluation.metrics import Evaluation, finite
from ream_stream.evaluation.verify import verify
from ream_stream.file_access import resolved
from ream_stream.units import format_seconds, format_size

from . import CHECKPOINT

SEQUENCE_LENGTH = 256
METHODS = {"REAM": "ream", "REAP": "reap", "slices": "slices"}
"""Compared presets of ``--method`` by the name shown."""

ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """How much text is used."""

    calibration_sequences: int
    """Calibration sequences of each domain."""

    test_tokens: int
    """Most test tokens of each domain."""


FULL = Amount(calibration_sequences=96, test_tokens=30_000)
QUICK = Amount(calibration_sequences=8, test_tokens=4_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One checkpoint of the demo."""

    folder: Path
    """Folder of the checkpoint."""

    num_bytes: int
    """Bytes of the checkpoint's weights."""

    seconds: float | None
    """Time of the compression; None for the original."""

    peak_bytes: int | None
    """Peak of the compression's anonymous memory; None for the original."""

    scores: Mapping[str, Evaluation]
    """Scores of the checkpoint by domain."""


def demonstrate(folder: Path, console: Console, *, quick: bool) -> dict[str, Measured]:
    """Compress with each method and measure; the keys are `ORIGINAL` and those of `METHODS`.

    Raises
    ------
    DamagedError
        An output does not pass its verification.
    OtherRunError
        The folder has files that are not of a demo.
    """
    amount, folder = QUICK if quick else FULL, resolved(folder)
    with claimed(folder):
        source = folder / ORIGINAL
        files.make_directory(source)
        for path in sorted(CHECKPOINT.iterdir()):
            files.copy_file(path, source / path.name)
        tests = write_texts(folder, amount)
        made = {name: _compress(folder, name, console) for name in METHODS}
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        measured = {
            ORIGINAL: Measured(
                folder=source, num_bytes=size, seconds=None, peak_bytes=None, scores={}
            ),
            **made,
        }
        scores = _score(folder, tests, console)
        write_report(folder)
        return {name: replace(each, scores=scores[name]) for name, each in measured.items()}


def write_texts(folder: Path, amount: Amount) -> dict[str, Path]:
    """Write one calibration set of all domains and a test set of each; return the latter."""
    tokenizer = load_tokenizer(CHECKPOINT)
    calibration, tests = {}, {}
    for domain in DOMAINS:
        calibration[domain] = pack(
            documents(domain, "calibration"),
            tokenizer,
            num_sequences=amount.calibration_sequences,
            sequence_length=SEQUENCE_LENGTH,
            description=domain,
        )
        test = pack_up_to(
            documents(domain, "test"),
            tokenizer,
            max_tokens=amount.test_tokens,
            sequence_length=SEQUENCE_LENGTH,
            description=domain,
        )
        tests[domain] = folder / f"test-{domain}.safetensors"
        files.write_tensors(tests[domain], test.tensors())
    mix = joined(calibration, description="all domains")
    path = folder / "calibration.safetensors"
    files.write_tensors(path, mix.tensors(), metadata=mix.metadata())
    return tests


def arguments(folder: Path, name: str) -> list[str]:
    """Return what follows ``ream-stream compress`` for one of `METHODS`."""
    return [
        str(folder / ORIGINAL),
        str(folder / METHODS[name]),
        *("--method", METHODS[name], "--keep", "75%"),
        *("--calibration", str(folder / "calibration.safetensors")),
        *("--compute-dtype", "float32", "--device", "cpu", "--threads", "1"),
    ]


def _compress(folder: Path, name: str, console: Console) -> Measured:
    command = " ".join(["ream-stream", "compress", *arguments(folder, name)])
    console.print(command, soft_wrap=True)
    with following(console) as report:
        result = api.compress(
            folder / ORIGINAL,
            folder / METHODS[name],
            keep="75%",
            method=METHODS[name],
            calibration=folder / "calibration.safetensors",
            restart=True,
            command=command,
            report=report,
            # the same work on every machine: its matrices are too small for more threads
            compute_dtype="float32",
            device="cpu",
            threads=1,
        )
    failed = [each for each in verify(result.output) if not each.ok]
    if failed:
        raise DamagedError(f"{result.output}: {failed[0].message}")
    return Measured(
        folder=result.output,
        num_bytes=result.output_bytes,
        seconds=result.seconds,
        peak_bytes=result.peak_anonymous_bytes,
        scores={},
    )


def _score(
    folder: Path, tests: Mapping[str, Path], console: Console
) -> dict[str, dict[str, Evaluation]]:
    """Return the scores of the original and of each method's output, by domain."""
    scores: dict[str, dict[str, Evaluation]] = {ORIGINAL: {}}
    with stop_requests() as asked, evaluating(console) as show:
        for name, method in METHODS.items():
            measured = api.evaluate(
                folder / method,
                text=[f"{domain}={path}" for domain, path in tests.items()],
                against=folder / ORIGINAL,
                keep_original=True,
                report=stopping(asked, show),
                sequence_length=SEQUENCE_LENGTH,
                device="cpu",
                compute_dtype="float32",
                layers=True,
                work_dir=folder,
            )
            files.write_json(folder / f"{method}.json", measured.facts())
            scores[name] = {d: each.evaluation for d, each in measured.domains.items()}
            for domain, each in measured.domains.items():
                assert each.against is not None
                scores[ORIGINAL][domain] = each.against.original
    files.remove(folder / "evaluate")
    return scores


def write_report(folder: Path) -> None:
    """Write a page about each method's output beside it."""
    for method in METHODS.values():
        facts = gather(workspace_of(folder / method, None), [folder / f"{method}.json"])
        files.write_bytes(folder / f"{method}.html", page(facts).encode())


def facts_of(result: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the result, for ``--json``."""
    return {
        name: {
            "folder": str(each.folder),
            "bytes": each.num_bytes,
            "seconds": each.seconds,
            "peak_anonymous_bytes": each.peak_bytes,
            "perplexity": {
                domain: finite(score.perplexity) for domain, score in each.scores.items()
            },
            "nats": {domain: finite(score.nats) for domain, score in each.scores.items()},
        }
        for name, each in result.items()
    } | {"verdict": verdict(result)}


def say(result: Mapping[str, Measured], console: Console) -> None:
    """Print the result."""
    rows = [
        (
            name,
            format_size(each.num_bytes),
            "-" if each.seconds is None else format_seconds(each.seconds),
            "-" if each.peak_bytes is None else format_size(each.peak_bytes),
            *(f"{score.perplexity:.2f}" for score in each.scores.values()),
        )
        for name, each in result.items()
    ]
    domains = result[ORIGINAL].scores
    heads = ("", "weights", "time", "peak memory", *domains)
    console.print(columns(heads, rows))
    tokens = sum(score.predicted for score in domains.values())
    console.print(f"Perplexity by domain, lower is better, on {tokens} unseen tokens.")
    for line in verdict(result):
        console.print(line, soft_wrap=True)
    for name in METHODS:
        console.print(f"{name}: {result[name].folder.with_suffix('.html')}", soft_wrap=True)


def verdict(result: Mapping[str, Measured]) -> list[str]:
    """Say for each domain which method loses least, and if the tokens can tell."""
    lines = []
    for domain in result[ORIGINAL].scores:
        found = {name: result[name].scores[domain] for name in METHODS}
        best, second = sorted(found, key=lambda name: found[name].nats)[:2]
        gap = found[second].loss.minus(found[best].loss)
        told = f"{gap.value:.4f} +- {gap.stderr:.4f} nats a token"
        lines.append(
            f"{domain}: {best} loses least, {told} less than {second}"
            if gap.value > 2 * gap.stderr
            else f"{domain}: {best} and {second} lose least; these tokens cannot tell them "
            f"apart ({told})"
        )
    return lines
