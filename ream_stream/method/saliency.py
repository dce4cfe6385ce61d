"""How much each expert matters, gathered batch by batch.

One set of sums serves every saliency, so a layer is observed once and the
ranking can be chosen, or compared, afterwards.

Letters in shapes: T tokens of a batch, E experts, K experts a token is sent to.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

UNREACHED_WEIGHT = 0.5
"""Merge weight of an expert no token reached, unless a reached one has less."""


class RoutedSums:
    """Sums over the tokens routed to each expert; additive over batches and domains.

    Counts and sums are kept apart in float64, so the mean taken in the end
    does not depend on how the tokens were cut into batches. For expert e and
    the set X_e of tokens routed to it, with f_e the expert's own output, g the
    coefficient the model multiplies it by and p the router's score of it
    before the top K were taken::

        count_E                 |X_e|
        norm_E                  sum of ||f_e(x)||
        gate_norm_E             sum of g_e(x) ||f_e(x)||
        gate_norm_squared_E     sum of (g_e(x) ||f_e(x)||)^2
        score_norm_E            sum of p_e(x) ||f_e(x)||
        score_squared_norm_E    sum of p_e(x)^2 ||f_e(x)||

    They live on the CPU: adding in a fixed order keeps them reproducible,
    which atomic additions on a GPU would not.
    """

    NAMES = (
        "tokens",
        "count_E",
        "norm_E",
        "gate_norm_E",
        "gate_norm_squared_E",
        "score_norm_E",
        "score_squared_norm_E",
    )

    def __init__(self, num_experts: int) -> None:
        self.tokens = torch.zeros((), dtype=torch.float64)
        self.count_E = torch.zeros(num_experts, dtype=torch.float64)
        self.norm_E = torch.zeros_like(self.count_E)
        self.gate_norm_E = torch.zeros_like(self.count_E)
        self.gate_norm_squared_E = torch.zeros_like(self.count_E)
        self.score_norm_E = torch.zeros_like(self.count_E)
        self.score_squared_norm_E = torch.zeros_like(self.count_E)

    def update(
        self, topk_TK: Tensor, gate_TK: Tensor, score_TK: Tensor, norm_TK: Tensor
    ) -> None:
        """Add a batch, from which padding has been removed.

        Parameters
        ----------
        topk_TK
            The experts each token is sent to.
        gate_TK
            The coefficient that really multiplies the expert's output: after the
            top K were taken, renormalized and scaled as the family does.
        score_TK
            The router's score of that expert among all E, before any of that.
        norm_TK
            L2 norm of the expert's *ungated* output.
        """
        slot = topk_TK.reshape(-1).cpu()
        gate, score, norm = (
            tensor.reshape(-1).to("cpu", torch.float64)
            for tensor in (gate_TK, score_TK, norm_TK)
        )
        weighted, scored = gate * norm, score * norm

        def total_E(value: Tensor | None) -> Tensor:
            return torch.bincount(slot, value, minlength=len(self.count_E))

        self.tokens += len(topk_TK)
        self.count_E += total_E(None)
        self.norm_E += total_E(norm)
        self.gate_norm_E += total_E(weighted)
        self.gate_norm_squared_E += total_E(weighted.square())
        self.score_norm_E += total_E(scored)
        self.score_squared_norm_E += total_E(score * scored)

    def add(self, other: "RoutedSums") -> None:
        """Take in the sums of other tokens, for example of another domain."""
        for name in self.NAMES:
            getattr(self, name).add_(getattr(other, name))

    def scaled(self, factor: float) -> "RoutedSums":
        """Return the sums as though each token had counted so many times."""
        return self.from_tensors({name: t * factor for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name; `from_tensors` is the inverse."""
        return {name: getattr(self, name) for name in self.NAMES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "RoutedSums":
        """Return sums that were taken apart by `tensors`.

        Raises
        ------
        KeyError
            One of the sums is missing.
        """
        sums = cls(len(tensors["count_E"]))
        for name in cls.NAMES:
            getattr(sums, name).copy_(tensors[name])
        return sums


def domain_factors(tokens: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return how many times tokens of each domain count where domains have weights.

    Parameters
    ----------
    tokens
        Tokens of each domain, T_d.
    weights
        Weight of each domain, w_d, from 0 on; their sum is above 0.

    Returns
    -------
    list[float]
        (w_d / sum of w) (T / T_d): weighted, all domains count as T tokens together, as
        before, and each as its share of them. Equal to 1 where weights are as tokens.
    """
    total, whole = sum(tokens), sum(weights)
    return [w / whole * (total / own) for own, w in zip(tokens, weights, strict=True)]


def _mean_over_routed(sum_E: Tensor, sums: RoutedSums) -> Tensor:
    """Divide by the count; an expert no token reached has sum 0 and scores 0."""
    return sum_E / sums.count_E.clamp(min=1)


def reap(sums: RoutedSums) -> Tensor:
    """Score by the mean of g ||f||: REAP (arXiv 2510.13999), eq. 9."""
    return _mean_over_routed(sums.gate_norm_E, sums)


def reap_softmax(sums: RoutedSums) -> Tensor:
    """Score by the mean of p ||f||, the gate before renormalization: REAM, eq. 3."""
    return _mean_over_routed(sums.score_norm_E, sums)


def reap_squared(sums: RoutedSums) -> Tensor:
    """Score by the mean of p^2 ||f||, as REAM's published code does by default."""
    return _mean_over_routed(sums.score_squared_norm_E, sums)


def reap_sum(sums: RoutedSums) -> Tensor:
    """Score by the sum of g ||f||: REAP without dividing by the number of tokens."""
    return sums.gate_norm_E.clone()


def energy(sums: RoutedSums) -> Tensor:
    """Score by the mean over *all* tokens of (g ||f||)^2: the output power at stake."""
    return sums.gate_norm_squared_E / sums.tokens.clamp(min=1)


def frequency(sums: RoutedSums) -> Tensor:
    """Score by the share of all routings that go to the expert."""
    return sums.count_E / sums.count_E.sum().clamp(min=1)


def ean(sums: RoutedSums) -> Tensor:
    """Score by the mean of ||f||: expert activation norm."""
    return _mean_over_routed(sums.norm_E, sums)


def merge_weights(saliency_E: Tensor) -> Tensor:
    """Return the saliencies with a weight for experts no token reached.

    A score of 0 becomes the smallest positive one, or 0.5 where all are larger
    or none is positive, so that an unreached expert can still be absorbed.
    """
    reached_E = saliency_E > 0
    smallest = min([UNREACHED_WEIGHT, *saliency_E[reached_E].tolist()])
    return torch.where(reached_E, saliency_E, smallest)


SALIENCIES: Mapping[str, Callable[[RoutedSums], Tensor]] = {
    "reap": reap,
    "reap-softmax": reap_softmax,
    "reap-squared": reap_squared,
    "reap-sum": reap_sum,
    "energy": energy,
    "frequency": frequency,
    "ean": ean,
}
"""Saliency functions; scores (E,) in float64, higher is more important; 0 without tokens."""
