"""Scores as tables."""

import math
from collections.abc import Iterator, Mapping

from rich.table import Table

from ream_stream.evaluation.evaluate import Result
from ream_stream.evaluation.metrics import Evaluation, Mean
from ream_stream.evaluation.multiple_choice import Share
from ream_stream.evaluation.session import Scores

from .console import columns, facts


def score_tables(scores: Scores) -> Iterator[Table]:
    """Yield the scores as tables."""
    result = scores.result
    if result is not None:
        several = {"all": result, **scores.domains} if scores.domains else {"all": result}
        heads = ("domain", "tokens", "nats a token", "perplexity", "accuracy")
        yield columns(heads, [_row(name, each.evaluation) for name, each in several.items()])
        if result.evaluation.rank is not None:
            yield facts([("effective rank", f"{result.evaluation.rank:.1f}")])
        yield from _against_table(several)
    for name, answers in scores.questions.items():
        yield columns(
            (name, "acc", "acc_norm"),
            [
                (role, with_error(each["acc"]), with_error(each["acc_norm"]))
                for role, each in answers.items()
            ],
        )
    if scores.layers:
        yield columns(
            ("layer", "own error", "inside", "total"),
            [
                (str(index + 1), f"{e.own:.4f}", f"{e.inside:.4f}", f"{e.total:.4f}")
                for index, e in enumerate(scores.layers)
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
