"""One checkpoint, alone or beside its original: prepared, measured and told."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ream_stream.calibration.mix import parts_of
from ream_stream.calibration.packing import load_tokenizer
from ream_stream.calibration.token_cache import read_test_tokens
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import Checkpoint, open_checkpoint
from ream_stream.device import choose_device
from ream_stream.errors import UsageError
from ream_stream.evaluation.config import ScoreOptions
from ream_stream.evaluation.evaluate import Result, evaluate
from ream_stream.evaluation.layer_errors import LayerError, layer_errors
from ream_stream.evaluation.memory import plan_evaluation
from ream_stream.evaluation.metrics import Evaluation, Mean, finite
from ream_stream.evaluation.multiple_choice import Share, accuracies, make_quiz, read_questions
from ream_stream.events import Event, Report, Step
from ream_stream.model.dtypes import compute_dtype as dtype_of
from ream_stream.planning.schedule import Budgets
from ream_stream.settings import check_values

from .console import columns, facts
from .signals import stopping


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJob:
    """What is scored, on what."""

    checkpoint: Checkpoint
    """The one in question."""

    original: Checkpoint | None
    """The one it is compared with."""

    tokens: Tokens | None
    """What they predict; None if only questions are asked."""

    questions: tuple[Path, ...]
    """Files of multiple-choice questions."""

    sequence_length: int
    """Tokens of a question at most."""

    dtype: torch.dtype
    """What layers are run in: the same for both, so that only the weights differ."""

    device: torch.device
    """Where they are run."""

    ram: int
    """Host memory to stay within, bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """All that was asked for."""

    result: Result | None
    """On the text."""

    domains: Mapping[str, Result]
    """The same by domain; empty if there is one."""

    questions: Mapping[str, Mapping[str, Mapping[str, Share]]]
    """By file: `acc` and `acc_norm` of ``checkpoint`` and ``original``."""

    layers: tuple[LayerError, ...]
    """Errors of each layer, if they were asked for."""


def prepare(checkpoint: Path, options: ScoreOptions) -> ScoreJob:
    """Read headers and tokens.

    Raises
    ------
    UsageError
        The checkpoints do not make the same tokens of the text, or there is none.
    """
    check_values(options)
    folders = [folder for folder in (checkpoint, options.against) if folder is not None]
    opened = [open_checkpoint(folder) for folder in folders]
    where, parts = choose_device(options.device), parts_of(options.text)
    if not parts and not options.questions:
        raise UsageError("say what to predict: --text, --questions, or both")
    sets = [
        read_test_tokens(
            parts,
            each.folder,
            vocab_size=each.config.get("vocab_size"),
            text_field=options.text_field,
            sequence_length=options.sequence_length,
            max_tokens=options.max_tokens,
        )
        for each in opened
        if parts
    ]
    if len({tokens.digest for tokens in sets}) > 1:
        raise UsageError(
            f"{folders[0]} and {folders[1]} have different tokenizers: their perplexities "
            "cannot be compared"
        )
    return ScoreJob(
        checkpoint=opened[0],
        original=opened[1] if len(opened) > 1 else None,
        tokens=sets[0] if sets else None,
        questions=options.questions,
        sequence_length=options.sequence_length,
        dtype=dtype_of(options.compute_dtype, opened[0], where),
        device=where,
        ram=Budgets.of(options.ram).ram,
    )


def measure(
    job: ScoreJob,
    work: Path,
    console: Console,
    stop_requested: Callable[[], int | None],
    *,
    with_layers: bool = False,
    keep_original: bool = False,
) -> Measured:
    """Carry out a job, with a bar on a terminal.

    Raises
    ------
    UsageError
        Layers are to be compared, and there is no original or no text.
    OverBudgetError
        The budget is too small.
    """
    name, tokens, original = job.checkpoint.folder.name, job.tokens, job.original
    if with_layers and (original is None or tokens is None):
        raise UsageError("--layers compares checkpoints on a text: give --against and --text")
    result: Result | None = None
    errors: tuple[LayerError, ...] = ()
    if tokens is not None:
        result, batch = _result(job, tokens, work, console, stop_requested, keep=keep_original)
        if with_layers and original is not None:
            with _progress(console, f"{name} layers", stop_requested) as report:
                errors = layer_errors(
                    job.checkpoint,
                    original,
                    tokens,
                    work,
                    dtype=job.dtype,
                    device=job.device,
                    batch_sequences=batch,
                    report=report,
                )
    return Measured(
        result=result,
        domains=result.by_domain(tokens) if result and tokens else {},
        questions={
            path.stem: _ask(job, path, work, console, stop_requested) for path in job.questions
        },
        layers=errors,
    )


def _result(
    job: ScoreJob,
    tokens: Tokens,
    work: Path,
    console: Console,
    stop_requested: Callable[[], int | None],
    *,
    keep: bool,
) -> tuple[Result, int]:
    """Return the result on tokens, and the batch it was found with."""
    both = [each for each in (job.checkpoint, job.original) if each is not None]
    batch = plan_evaluation(both, tokens, job.dtype, job.ram).batch_sequences
    with _progress(console, job.checkpoint.folder.name, stop_requested) as report:
        result = evaluate(
            job.checkpoint,
            tokens,
            work,
            dtype=job.dtype,
            device=job.device,
            original=job.original,
            batch_sequences=batch,
            keep_original=keep,
            report=report,
        )
    return result, batch


def _ask(
    job: ScoreJob,
    path: Path,
    work: Path,
    console: Console,
    stop_requested: Callable[[], int | None],
) -> dict[str, Mapping[str, Share]]:
    """Return the accuracies of both checkpoints on a file of questions."""
    asked = read_questions(path)
    answers: dict[str, Mapping[str, Share]] = {}
    for role, checkpoint in (("checkpoint", job.checkpoint), ("original", job.original)):
        if checkpoint is None:
            continue
        quiz = make_quiz(
            asked,
            load_tokenizer(checkpoint.folder),
            max_length=job.sequence_length,
            description=str(path),
        )
        plan = plan_evaluation([checkpoint], quiz.tokens, job.dtype, job.ram)
        name = f"{checkpoint.folder.name} {path.name}"
        with _progress(console, name, stop_requested) as report:
            result = evaluate(
                checkpoint,
                quiz.tokens,
                work,
                dtype=job.dtype,
                device=job.device,
                target_SL=quiz.target_SL,
                batch_sequences=plan.batch_sequences,
                report=report,
            )
        answers[role] = accuracies(asked, result.evaluation.loss.total_S)
    return answers


@contextmanager
def _progress(console: Console, name: str, asked: Callable[[], int | None]) -> Iterator[Report]:
    """Give a report that moves a bar on a terminal, and ends the work after a signal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(name)

        def show(event: Event) -> None:
            if isinstance(event, Step):
                described = f"{name}  layer {event.layer + 1}  {event.phase}"
                bar.update(task, description=described, completed=event.done, total=event.total)

        yield stopping(asked, show)


def score_facts(job: ScoreJob, measured: Measured) -> dict[str, Any]:
    """Return the scores, for ``--json``."""
    known: dict[str, Any] = {"against": None, "difference": None}
    if measured.result is not None:
        known |= measured.result.facts()
    if job.original is not None:
        known["against"] = {"checkpoint": str(job.original.folder), **(known["against"] or {})}
    return {
        "checkpoint": str(job.checkpoint.folder),
        "tokens": job.tokens.digest if job.tokens else None,
        "compute_dtype": str(job.dtype).removeprefix("torch."),
        **known,
        "domains": {name: each.facts() for name, each in measured.domains.items()},
        "questions": {
            name: {
                role: {k: {n: finite(x) for n, x in asdict(v).items()} for k, v in each.items()}
                for role, each in answers.items()
            }
            for name, answers in measured.questions.items()
        },
        "layers": [asdict(error) for error in measured.layers],
    }


def score_tables(job: ScoreJob, measured: Measured) -> Iterator[Table]:
    """Yield the scores as tables."""
    result = measured.result
    if result is not None:
        several = {"all": result, **measured.domains} if measured.domains else {"all": result}
        heads = ("domain", "tokens", "nats a token", "perplexity", "accuracy")
        yield columns(heads, [_row(name, each.evaluation) for name, each in several.items()])
        if result.evaluation.rank is not None:
            yield facts([("effective rank", f"{result.evaluation.rank:.1f}")])
        yield from _against_table(several)
    for name, answers in measured.questions.items():
        yield columns(
            (name, "acc", "acc_norm"),
            [
                (role, with_error(each["acc"]), with_error(each["acc_norm"]))
                for role, each in answers.items()
            ],
        )
    if measured.layers:
        yield columns(
            ("layer", "own error", "inside", "total"),
            [
                (str(index + 1), f"{e.own:.4f}", f"{e.inside:.4f}", f"{e.total:.4f}")
                for index, e in enumerate(measured.layers)
            ],
        )


def _row(name: str, evaluation: Evaluation) -> list[str]:
    return [
        name,
        str(evaluation.predicted),
        with_error(evaluation.loss),
        f"{evaluation.perplexity:.4g}",
        f"{evaluation.accuracy.value:.4f}",
    ]


def _against_table(several: Mapping[str, Result]) -> Iterator[Table]:
    """Yield what the comparison with the original tells, if there is one."""
    rows = [
        [
            name,
            f"{against.original.perplexity:.4g}",
            with_error(against.loss, sign="+"),
            with_error(against.divergence),
            f"{against.agreement.value:.4f}",
        ]
        for name, each in several.items()
        if (against := each.against) is not None
    ]
    if rows:
        yield columns(("domain", "original", "nats more", "divergence", "same top"), rows)


def with_error(mean: Mean | Share, *, sign: str = "") -> str:
    """Return a mean with its standard error, if it is known."""
    error = "" if math.isnan(mean.stderr) else f" +- {mean.stderr:.4f}"
    return f"{mean.value:{sign}.4f}{error}"
