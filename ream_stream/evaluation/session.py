"""One checkpoint measured, alone or beside its original, on text and on questions."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ream_stream import files
from ream_stream.calibration.mix import parts_of
from ream_stream.calibration.packing import load_tokenizer
from ream_stream.calibration.token_cache import read_test_tokens
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import Checkpoint, open_checkpoint, vocab_size_of
from ream_stream.compression.shared_job import check_alike, check_shared, own_device
from ream_stream.errors import UsageError
from ream_stream.events import Evaluating, Event, Report, no_report
from ream_stream.file_access import resolved
from ream_stream.model.device import choose_device
from ream_stream.model.dtypes import compute_dtype
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.planning.schedule import Budgets
from ream_stream.settings import check_values

from .config import ScoreOptions
from .evaluate import Result, evaluate
from .layer_errors import LayerError, layer_errors
from .memory import plan_evaluation
from .metrics import finite
from .multiple_choice import Share, accuracies, make_quiz, read_questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Measured scores of a checkpoint."""

    checkpoint: Path
    """Folder of the evaluated checkpoint."""

    against: Path | None
    """Folder of the original; None without a comparison."""

    tokens: str | None
    """Digest of the test tokens; None if only questions were asked."""

    compute_dtype: str
    """Dtype of both checkpoints' forward passes; so only the weights differ."""

    result: Result | None
    """Result on the text; None if only questions were asked."""

    domains: Mapping[str, Result]
    """Result on each domain; empty for a single domain."""

    questions: Mapping[str, Mapping[str, Mapping[str, Share]]]
    """`acc` and `acc_norm` of ``checkpoint`` and ``original``, by file."""

    layers: tuple[LayerError, ...]
    """Errors of each layer, if they were asked for."""

    def facts(self) -> dict[str, Any]:
        """Return the scores as JSON can hold them."""
        known: dict[str, Any] = {"against": None, "difference": None}
        if self.result is not None:
            known |= self.result.facts()
        if self.against is not None:
            known["against"] = {"checkpoint": str(self.against), **(known["against"] or {})}
        return {
            "checkpoint": str(self.checkpoint),
            "tokens": self.tokens,
            "compute_dtype": self.compute_dtype,
            **known,
            "domains": {name: each.facts() for name, each in self.domains.items()},
            "questions": {
                name: {
                    role: {
                        k: {n: finite(x) for n, x in asdict(v).items()} for k, v in e.items()
                    }
                    for role, e in answers.items()
                }
                for name, answers in self.questions.items()
            },
            "layers": [asdict(error) for error in self.layers],
        }


def measure(
    checkpoint: Path,
    options: ScoreOptions,
    *,
    report: Report = no_report,
    keep_original: bool = False,
    ranks: Ranks = ALONE,
) -> Scores:
    """Measure a checkpoint.

    Parameters
    ----------
    checkpoint
        Its folder.
    options
        What it is measured on.
    report
        Is told what happens; it may raise `InterruptedRunError`.
    keep_original
        Whether what the original makes of the text stays in the work folder.
    ranks
        Processes that divide the batches; layers are compared by rank 0 alone.

    Raises
    ------
    UsageError
        There is no text, the checkpoints do not make the same tokens of it, or layers are to
        be compared and there is no original or no text.
    OverBudgetError
        The budget is too small.
    """
    bench = _Bench.of(checkpoint, options, report, ranks)
    tokens, original = bench.tokens, bench.original
    if options.layers and (original is None or tokens is None):
        raise UsageError("--layers compares checkpoints on a text: give --against and --text")
    result: Result | None = None
    errors: tuple[LayerError, ...] = ()
    with ExitStack() as stack:
        work = _work_folder(options, stack, ranks)
        if tokens is not None:
            batch = bench.batch(tokens, bench.checkpoint, original)
            result = _predict(bench, tokens, work, batch, keep_original=keep_original)
            if options.layers and original is not None and ranks.is_first:
                errors = _compare_layers(bench, original, tokens, work, batch)
        questions = {path.stem: _ask(bench, path, work) for path in options.questions}
    return Scores(
        checkpoint=bench.checkpoint.folder,
        against=original.folder if original else None,
        tokens=tokens.digest if tokens else None,
        compute_dtype=str(bench.dtype).removeprefix("torch."),
        result=result,
        domains=result.by_domain(tokens) if result and tokens else {},
        questions=questions,
        layers=errors,
    )


def _work_folder(options: ScoreOptions, stack: ExitStack, ranks: Ranks) -> Path:
    """Return the folder of hidden states, which all ranks see."""
    given = options.work_dir
    if given is None and ranks.is_first:
        given = Path(stack.enter_context(TemporaryDirectory(prefix="ream-stream-")))
    if ranks.is_first and given is not None and ranks.size > 1:
        files.make_directory(resolved(given))
    work = Path(ranks.broadcast(None if given is None else str(resolved(given))))
    check_shared(work, ranks)
    return work


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bench:
    """Shared inputs of all passes of a measurement."""

    checkpoint: Checkpoint
    original: Checkpoint | None
    tokens: Tokens | None
    sequence_length: int
    dtype: torch.dtype
    device: torch.device
    ram: int
    report: Report
    ranks: Ranks

    @classmethod
    def of(
        cls, checkpoint: Path, options: ScoreOptions, report: Report, ranks: Ranks
    ) -> "_Bench":
        """Read headers and tokens."""
        check_values(options)
        folders = [folder for folder in (checkpoint, options.against) if folder is not None]
        opened = [open_checkpoint(folder) for folder in folders]
        where = own_device(choose_device(options.device), ranks)
        check_alike(ranks, where)
        parts = parts_of(options.text)
        if not parts and not options.questions:
            raise UsageError("say what to predict: --text, --questions, or both")
        sets = [
            read_test_tokens(
                parts,
                each.folder,
                vocab_size=vocab_size_of(each.config),
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
        ranks.agree("the test tokens", [tokens.digest for tokens in sets])
        return cls(
            checkpoint=opened[0],
            original=opened[1] if len(opened) > 1 else None,
            tokens=sets[0] if sets else None,
            sequence_length=options.sequence_length,
            dtype=compute_dtype(options.compute_dtype, opened[0], where),
            device=where,
            ram=Budgets.of(options.ram, processes=ranks.local_size).ram,
            report=report,
            ranks=ranks,
        )

    def batch(self, tokens: Tokens, *checkpoints: Checkpoint | None) -> int:
        """Return the sequences that are run together."""
        there = [each for each in checkpoints if each is not None]
        planned = plan_evaluation(there, tokens, self.dtype, self.ram).batch_sequences
        return int(self.ranks.broadcast(planned))


def _predict(
    bench: _Bench, tokens: Tokens, work: Path, batch: int, *, keep_original: bool
) -> Result:
    """Return the result on a text."""
    return evaluate(
        bench.checkpoint,
        tokens,
        work,
        dtype=bench.dtype,
        device=bench.device,
        original=bench.original,
        batch_sequences=batch,
        keep_original=keep_original,
        report=bench.report,
        ranks=bench.ranks,
    )


def _compare_layers(
    bench: _Bench, original: Checkpoint, tokens: Tokens, work: Path, batch: int
) -> tuple[LayerError, ...]:
    """Return the error of each layer."""
    return layer_errors(
        bench.checkpoint,
        original,
        tokens,
        work,
        dtype=bench.dtype,
        device=bench.device,
        batch_sequences=batch,
        report=bench.report,
    )


def _told_of(path: Path, report: Report) -> Report:
    """Return a report that names what is run beside the checkpoint."""

    def tell(event: Event) -> None:
        if isinstance(event, Evaluating):
            event = replace(event, name=f"{event.name} on {path.name}")
        report(event)

    return tell


def _ask(bench: _Bench, path: Path, work: Path) -> dict[str, Mapping[str, Share]]:
    """Return the accuracies of both checkpoints on a file of questions."""
    asked = read_questions(path)
    answers: dict[str, Mapping[str, Share]] = {}
    for role, checkpoint in (("checkpoint", bench.checkpoint), ("original", bench.original)):
        if checkpoint is None:
            continue
        quiz = make_quiz(
            asked,
            load_tokenizer(checkpoint.folder),
            max_length=bench.sequence_length,
            description=str(path),
        )
        batch = bench.batch(quiz.tokens, checkpoint)
        result = evaluate(
            checkpoint,
            quiz.tokens,
            work,
            dtype=bench.dtype,
            device=bench.device,
            target_SL=quiz.target_SL,
            batch_sequences=batch,
            report=_told_of(path, bench.report),
            ranks=bench.ranks,
        )
        answers[role] = accuracies(asked, result.evaluation.loss.total_S)
    return answers
