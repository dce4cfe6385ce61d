"""How well tokens are predicted: means over tokens, with errors over sequences.

Letters in shapes: S sequences, P scored positions, V vocabulary, n rows, H hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean over tokens of which each sequence has some.

    It is a ratio of sums over sequences, so its standard error is that of a ratio
    estimator, sequences being independent; with sequences of equal length it is the
    standard deviation of their means over sqrt(S).
    """

    total_S: tuple[float, ...]
    """Sum of the measure over the tokens of each sequence."""

    count_S: tuple[int, ...]
    """Number of scored tokens of each sequence."""

    @property
    def count(self) -> int:
        """Tokens in all."""
        return sum(self.count_S)

    @property
    def value(self) -> float:
        """The mean of a token; NaN of none."""
        return math.fsum(self.total_S) / self.count if self.count else math.nan

    @property
    def stderr(self) -> float:
        """Standard error of the mean; NaN for a single sequence."""
        sequences, mean = len(self.count_S), self.value
        if sequences < 2 or not self.count:
            return math.nan
        pairs = zip(self.total_S, self.count_S, strict=True)
        square = math.fsum((total - mean * count) ** 2 for total, count in pairs)
        return math.sqrt(sequences / (sequences - 1) * square) / self.count

    def minus(self, other: "Mean") -> "Mean":
        """Return the difference of two means over the same tokens, sequence by sequence.

        Most of the spread between sequences is common to both, so this error is far
        smaller than the errors of the two means.

        Raises
        ------
        ValueError
            They are of different tokens.
        """
        if self.count_S != other.count_S:
            raise ValueError("the two evaluations scored different tokens")
        pairs = zip(self.total_S, other.total_S, strict=True)
        return Mean(total_S=tuple(a - b for a, b in pairs), count_S=self.count_S)

    def only(self, rows: Sequence[int]) -> "Mean":
        """Return the mean over some of the sequences."""
        return Mean(
            total_S=tuple(self.total_S[row] for row in rows),
            count_S=tuple(self.count_S[row] for row in rows),
        )

    def facts(self) -> dict[str, float | None]:
        """Return mean and standard error as JSON can hold them."""
        return {"value": finite(self.value), "stderr": finite(self.stderr)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Measures of a checkpoint's predictions on a token set."""

    loss: Mean
    """Negative log-likelihood, nats a token."""

    accuracy: Mean
    """Share of tokens that the checkpoint ranks first."""

    rank: float | None = None
    """Effective rank of the states that enter the output matrix; for all domains only."""

    @property
    def predicted(self) -> int:
        """Tokens scored."""
        return self.loss.count

    @property
    def nats(self) -> float:
        """Mean negative log-likelihood of a token."""
        return self.loss.value

    @property
    def stderr(self) -> float:
        """Standard error of `nats`."""
        return self.loss.stderr

    @property
    def perplexity(self) -> float:
        """Return exp(nats)."""
        return math.exp(self.nats) if self.nats < 709 else math.inf

    def only(self, rows: Sequence[int]) -> "Evaluation":
        """Return the evaluation of some of the sequences."""
        return Evaluation(loss=self.loss.only(rows), accuracy=self.accuracy.only(rows))

    def facts(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them."""
        rank = {} if self.rank is None else {"effective_rank": finite(self.rank)}
        return {
            "predicted": self.predicted,
            "nats": finite(self.nats),
            "stderr": finite(self.stderr),
            "perplexity": finite(self.perplexity),
            "accuracy": self.accuracy.facts(),
            **rank,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Against:
    """A checkpoint beside the one it was made from, on the same tokens."""

    original: Evaluation
    """Evaluation of the original."""

    loss: Mean
    """Loss minus the original's loss, nats a token; positive is worse."""

    divergence: Mean
    """KL(original || checkpoint) of the next token's distribution, nats a token."""

    agreement: Mean
    """Share of positions at which both checkpoints rank the same token first."""

    def only(self, rows: Sequence[int]) -> "Against":
        """Return the comparison on some of the sequences."""
        return Against(
            original=self.original.only(rows),
            loss=self.loss.only(rows),
            divergence=self.divergence.only(rows),
            agreement=self.agreement.only(rows),
        )

    def facts(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them."""
        return {
            "against": self.original.facts(),
            "difference": {"nats": finite(self.loss.value), "stderr": finite(self.loss.stderr)},
            "divergence": self.divergence.facts(),
            "agreement": self.agreement.facts(),
        }


class Scored(NamedTuple):
    """Sums over the scored positions of one sequence."""

    nats: float
    """Negative log-likelihood, nats."""

    correct: float
    """Number of tokens that the checkpoint ranks first."""


def score(logits_PV: Tensor, token_P: Tensor) -> Scored:
    """Score predictions; the lower token wins where two are equally likely."""
    chosen_P = logits_PV.gather(1, token_P[:, None]).squeeze(1)
    nats_P = logits_PV.logsumexp(dim=1).double() - chosen_P.double()
    return Scored(float(nats_P.sum()), float((logits_PV.argmax(dim=1) == token_P).sum()))


def divergence(original_PV: Tensor, logits_PV: Tensor) -> tuple[float, float]:
    """Return the summed KL(original || other) in nats, and the positions where tops agree.

    In float64: log-likelihoods of nearly equal models differ in their last float32 digits.
    """
    original_log_PV = original_PV.double().log_softmax(dim=1)
    log_PV = logits_PV.double().log_softmax(dim=1)
    nats = (original_log_PV.exp() * (original_log_PV - log_PV)).sum()
    same = (original_PV.argmax(dim=1) == logits_PV.argmax(dim=1)).sum()
    return float(nats), float(same)


def effective_rank(hidden_nH: Tensor) -> float:
    """Return exp(entropy of the singular values, as shares of their sum); 0 of zeros.

    O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality",
    EUSIPCO 2007, definition 1. Rows are not centered.
    """
    value_n = torch.linalg.svdvals(hidden_nH.double())
    total = value_n.sum()
    if not float(total) > 0:
        return 0.0
    share_n = value_n / total
    return math.exp(float(-torch.xlogy(share_n, share_n).sum()))


def finite(number: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return number if math.isfinite(number) else None
