"""Perplexities of one or several checkpoints on the same tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ream_stream.calibration.mix import parts_of
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.source import Checkpoint, open_checkpoint
from ream_stream.device import choose_device
from ream_stream.errors import UsageError
from ream_stream.evaluate import Difference, Evaluation, difference, evaluate

from .job import compute_dtype as dtype_of
from .tables import columns
from .tokens import read_test_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJob:
    """What is scored, on what."""

    checkpoints: tuple[Checkpoint, ...]
    """The first is compared with the second, if there is one."""

    tokens: Tokens
    """What they predict."""

    dtype: torch.dtype
    """What layers are run in: the same for all, so that only the weights differ."""

    device: torch.device
    """Where they are run."""


def prepare(
    folders: Sequence[Path],
    *,
    text: Sequence[str],
    text_field: str,
    sequence_length: int,
    max_tokens: int | None,
    device: str,
    compute_dtype: str,
) -> ScoreJob:
    """Read headers and tokens.

    Raises
    ------
    UsageError
        The checkpoints do not make the same tokens of the text.
    """
    checkpoints = tuple(open_checkpoint(folder) for folder in folders)
    where = choose_device(device)
    parts = parts_of(text)
    sets = [
        read_test_tokens(
            parts,
            checkpoint,
            text_field=text_field,
            sequence_length=sequence_length,
            max_tokens=max_tokens,
        )
        for checkpoint in checkpoints
    ]
    if len({tokens.digest for tokens in sets}) > 1:
        raise UsageError(
            f"{folders[0]} and {folders[1]} have different tokenizers: their perplexities "
            "cannot be compared"
        )
    return ScoreJob(
        checkpoints=checkpoints,
        tokens=sets[0],
        dtype=dtype_of(compute_dtype, checkpoints[0], where),
        device=where,
    )


def score(
    job: ScoreJob,
    checkpoint: Checkpoint,
    work: Path,
    console: Console,
    stop_requested: Callable[[], int | None],
) -> Evaluation:
    """Evaluate one checkpoint of a job, with a bar on a terminal."""
    events = evaluate(
        checkpoint,
        job.tokens,
        work,
        dtype=job.dtype,
        device=job.device,
        stop_requested=stop_requested,
    )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(checkpoint.folder.name)
        for event in events:
            if isinstance(event, Evaluation):
                return event
            bar.update(
                task,
                description=f"{checkpoint.folder.name}  layer {event.layer + 1}  {event.phase}",
                completed=event.done,
                total=event.total,
            )
    raise AssertionError("an evaluation ends with its result")


def score_facts(job: ScoreJob, scores: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the scores, for ``--json``."""
    rows = [
        {
            "checkpoint": str(checkpoint.folder),
            "nats": finite(each.nats),
            "stderr": finite(each.stderr),
            "perplexity": finite(each.perplexity),
        }
        for checkpoint, each in zip(job.checkpoints, scores, strict=True)
    ]
    against = _difference(scores)
    return {
        **rows[0],
        "against": rows[1] if against else None,
        "difference": {"nats": against.nats, "stderr": finite(against.stderr)}
        if against
        else None,
        "predicted": scores[0].predicted,
        "tokens": job.tokens.digest,
        "compute_dtype": str(job.dtype).removeprefix("torch."),
    }


def score_table(job: ScoreJob, scores: Sequence[Evaluation]) -> Table:
    """Return the scores as a table."""
    rows = [
        (
            str(checkpoint.folder),
            f"{each.predicted}",
            with_error(each),
            f"{each.perplexity:.4g}",
        )
        for checkpoint, each in zip(job.checkpoints, scores, strict=True)
    ]
    against = _difference(scores)
    if against is not None:
        ratio = scores[0].perplexity / scores[1].perplexity
        rows.append(("difference", "", with_error(against, sign="+"), f"x {ratio:.4f}"))
    return columns(("checkpoint", "tokens", "nats a token", "perplexity"), rows)


def with_error(value: Evaluation | Difference, *, sign: str = "") -> str:
    """Return nats with their standard error, if it is known."""
    error = "" if math.isnan(value.stderr) else f" +- {value.stderr:.4f}"
    return f"{value.nats:{sign}.4f}{error}"


def finite(number: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return number if math.isfinite(number) else None


def _difference(scores: Sequence[Evaluation]) -> Difference | None:
    return difference(scores[0], scores[1]) if len(scores) > 1 else None
