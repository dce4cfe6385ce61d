"""Scores as tables, and what they mean in words."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ream_stream.evaluation.evaluate import Result
from ream_stream.evaluation.metrics import Against, Mean
from ream_stream.evaluation.multiple_choice import Share
from ream_stream.evaluation.session import Scores
from ream_stream.evaluation.verdict import band_of

from .console import columns

_MEANINGS = {
    "nats a token": "mean -ln p of the next token",
    "perplexity": "e to that, lower is better",
    "accuracy": "share of tokens ranked first",
    "change": "of perplexity from the original's",
    "nats more": "nats a token above the original's",
    "divergence": "KL(original || this) of the next token, nats",
    "same top": "share of positions where both rank the same token first",
    "acc": "share of questions whose answer is the likeliest choice",
    "acc_norm": "the same by likelihood a character",
    "own error": "of a layer's output, relative, on the original's inputs",
    "inside": "on the compressed model's inputs",
    "total": "with the errors of all layers before",
}
"""Explanations of columns by their head; printed below the tables that have them."""

_RANK = "about so many directions of what enters the output matrix are in use"

_RULE = (
    "It is a rule of thumb (docs/how-to/read-an-evaluation.md): what the loss costs your task, "
    "only your task tells."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """One table with what is said below it."""

    table: Table
    lines: tuple[str, ...]


def say_scores(scores: Scores, console: Console) -> None:
    """Print the scores, what their columns mean, and a verdict if there is an original."""
    for view in _views(scores):
        console.print(view.table)
        for line in view.lines:
            console.print(line)


def verdict_lines(several: Mapping[str, Against]) -> Iterator[str]:
    """Yield the verdict over all text, and the domain that fares worst, with their basis."""
    whole = several["all"]
    band = band_of(whole)
    worst = max(several, key=lambda name: several[name].divergence.value)
    other = band_of(several[worst])
    yield (
        f"verdict: {band.verdict}"
        + ("" if other is band else f", {other.verdict} on {worst}")
        + f" (divergence {whole.divergence.value:.4f}, same top {whole.agreement.value:.1%}), "
        f"usual for {band.usual_for}. {_RULE}"
    )


def with_error(mean: Mean | Share, *, sign: str = "") -> str:
    """Return a mean with its standard error, if it is known."""
    error = "" if math.isnan(mean.stderr) else f" +- {mean.stderr:.4f}"
    return f"{mean.value:{sign}.4f}{error}"


def _views(scores: Scores) -> Iterator[_View]:
    if scores.result is not None:
        yield from _text_views(scores.result, scores.domains)
    for name, answers in scores.questions.items():
        rows = [
            (role, with_error(each["acc"]), with_error(each["acc_norm"]))
            for role, each in answers.items()
        ]
        yield _view((name, "acc", "acc_norm"), rows)
    if scores.layers:
        layers = [
            (str(index + 1), f"{e.own:.4f}", f"{e.inside:.4f}", f"{e.total:.4f}")
            for index, e in enumerate(scores.layers)
        ]
        yield _view(("layer", "own error", "inside", "total"), layers)


def _text_views(result: Result, domains: Mapping[str, Result]) -> Iterator[_View]:
    several = {"all": result, **domains}
    compared = {name: each.against for name, each in several.items() if each.against}
    rank = result.evaluation.rank
    heads = ("domain", "tokens", "nats a token", "perplexity")
    yield _view(
        (*heads, *(["original", "change"] if compared else []), "accuracy"),
        [_row(name, each) for name, each in several.items()],
        () if rank is None else (f"effective rank {rank:.1f}: {_RANK}",),
    )
    if compared:
        yield _view(
            ("domain", "nats more", "divergence", "same top"),
            [
                (
                    name,
                    with_error(each.loss, sign="+"),
                    with_error(each.divergence),
                    f"{each.agreement.value:.4f}",
                )
                for name, each in compared.items()
            ],
            tuple(verdict_lines(compared)),
        )


def _view(
    heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], lines: tuple[str, ...] = ()
) -> _View:
    known = [f"{head}: {_MEANINGS[head]}" for head in heads[1:] if head in _MEANINGS]
    return _View(table=columns(heads, rows), lines=("; ".join(known), *lines))


def _row(name: str, result: Result) -> tuple[str, ...]:
    found, against = result.evaluation, result.against
    beside: tuple[str, ...] = ()
    if against is not None:
        # the ratio of two perplexities is e to the difference of their logarithms
        change = math.expm1(min(against.loss.value, 700.0))
        beside = (f"{against.original.perplexity:.4g}", f"{change:+.1%}")
    return (
        name,
        str(found.predicted),
        with_error(found.loss),
        f"{found.perplexity:.4g}",
        *beside,
        f"{found.accuracy.value:.4f}",
    )
