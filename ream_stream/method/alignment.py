"""Which neuron of a member corresponds to which neuron of its centroid.

The order of an expert's neurons is arbitrary, so they are matched before
weights are averaged: by what they do (activations on the SAME tokens for every
expert), by their weights, or by both.

Letters in shapes: n sampled tokens, H hidden, I inner width (neurons).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .expert import Expert
from .threads import in_order


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """Terms in the cost of pairing two neurons; without terms the order stays."""

    activations: bool
    """Whether the cost includes activations on the sampled tokens."""

    weights: bool
    """Whether the cost includes gate rows, up rows and down columns."""

    @property
    def compares(self) -> bool:
        """Whether there is anything to match neurons by."""
        return self.activations or self.weights


ALIGNMENTS: Mapping[str, Alignment] = {
    "both": Alignment(activations=True, weights=True),
    "activations": Alignment(activations=True, weights=False),
    "weights": Alignment(activations=False, weights=True),
    "none": Alignment(activations=False, weights=False),
}


class Neurons(NamedTuple):
    """Matrices and activations by which an expert's neurons are compared."""

    expert: Expert
    """Matrices of the expert."""

    activation_nI: Tensor | None
    """Activations on the shared sample; None if the cost does not include them."""


class Pair(NamedTuple):
    """Two experts to align."""

    centroid: Neurons
    """Neurons of the centroid, whose order stays."""

    member: Neurons
    """Neurons of the member, whose order changes."""


class Matched(NamedTuple):
    """Alignment of a member's neurons with its centroid's."""

    order_I: Tensor
    """Order of the member's neurons that `align` returns."""

    kept: float
    """Mean cost of a pair of neurons in the stored order; NaN without a cost."""

    least: float
    """Mean cost of a pair of neurons in the new order; NaN without a cost."""


def activation_cost(a_nI: Tensor, b_nI: Tensor) -> Tensor:
    """Return Euclidean distances between the neurons' normalized activations.

    Parameters
    ----------
    a_nI, b_nI
        Activations of two experts, row for row on the same tokens.

    Returns
    -------
    Tensor
        Cost (I, I): row q, column r compares neuron q of `a` with r of `b`.
        In float32, or wider if the activations are.
    """
    wide = torch.promote_types(a_nI.dtype, torch.float32)
    a_nI, b_nI = a_nI.to(wide), b_nI.to(wide)
    return _distance(a_nI.T @ b_nI, a_nI.square().sum(0), b_nI.square().sum(0))


def weight_cost(a: Expert, b: Expert) -> Tensor:
    """Return distances between normalized ``[gate row | up row | down column]``.

    Exact, from the inner products of the three parts, which are never put side
    by side in memory. Shape and type as in `activation_cost`.
    """
    wide, device = torch.promote_types(a.gate_IH.dtype, torch.float32), a.gate_IH.device
    inner = len(a.gate_IH)
    inner_II = torch.zeros(inner, inner, dtype=wide, device=device)
    a_square_I, b_square_I = torch.zeros(2, inner, dtype=wide, device=device)
    for a_part, b_part in zip(
        (a.gate_IH, a.up_IH, a.down_HI.T), (b.gate_IH, b.up_IH, b.down_HI.T), strict=True
    ):
        a_IH, b_IH = a_part.to(wide), b_part.to(wide)
        inner_II.addmm_(a_IH, b_IH.T)
        a_square_I += a_IH.square().sum(1)
        b_square_I += b_IH.square().sum(1)
    return _distance(inner_II, a_square_I, b_square_I)


def cost(alignment: Alignment, pair: Pair) -> Tensor:
    """Return the cost (I, I) of pairing neurons, centroid's in rows, on the CPU.

    Raises
    ------
    ValueError
        Activations count but were not given, or nothing counts.
    """
    centroid, member = pair
    costs = []
    if alignment.activations:
        if centroid.activation_nI is None or member.activation_nI is None:
            raise ValueError("this alignment compares activations: both experts need them")
        costs.append(activation_cost(centroid.activation_nI, member.activation_nI))
    if alignment.weights:
        costs.append(weight_cost(centroid.expert, member.expert))
    if not costs:
        raise ValueError("an alignment that keeps the order has no cost")
    return sum(costs[1:], costs[0]).cpu()


def cost_flop(alignment: Alignment, rows: int, hidden: int, inner: int) -> int:
    """Return the operations of the cost of one pair, from `rows` sampled tokens."""
    return 2 * inner**2 * (rows * alignment.activations + 3 * hidden * alignment.weights)


def aligning_bytes(rows: int, hidden: int, inner: int, threads: int) -> int:
    """Return the transient bytes of one cost matrix and of `threads` assignments."""
    square = inner**2
    # scipy makes a float64 copy of each float32 cost that it works on
    matched = threads * square * (4 + 8)
    activations = 2 * rows * inner * 4
    # a part of both experts in float32, and the costs
    weights = 2 * hidden * inner * 4 + 4 * square * 4
    return matched + activations + weights


def match(cost_II: Tensor) -> Tensor:
    """Return the column paired with each row at the least total cost (int64).

    Raises
    ------
    ValueError
        A cost is not a finite number.
    """
    if not cost_II.isfinite().all():
        raise ValueError("activations or weights of the experts are not finite numbers")
    _, column_I = linear_sum_assignment(cost_II.numpy())
    return torch.from_numpy(column_I)


def align(alignment: Alignment, pair: Pair) -> Tensor:
    """Return the order that lines the member's neurons up with the centroid's.

    ``reorder(member, order)`` then has at place q what corresponds to the
    centroid's neuron q. An alignment without costs gives the identity.
    """
    if not alignment.compares:
        return torch.arange(len(pair.member.expert.gate_IH))
    return match(cost(alignment, pair))


def align_all(
    alignment: Alignment, pairs: Iterable[Pair], *, threads: int
) -> Iterator[Matched]:
    """Yield what `align` finds for each pair, in order, matching on `threads` threads.

    A pair is let go of as soon as its cost is known, so a generator that loads
    experts keeps one pair in memory beside the costs of `match_all`.
    """
    if alignment.compares:
        # map and not a loop: a loop's variable would keep the last pair alive
        yield from match_all(map(partial(cost, alignment), pairs), threads=threads)
    else:
        for order_I in map(partial(align, alignment), pairs):
            yield Matched(order_I, math.nan, math.nan)


def match_all(costs: Iterable[Tensor], *, threads: int) -> Iterator[Matched]:
    """Yield `match` of each cost and its gain, in order; scipy lets threads run side by side.

    At most ``threads + 1`` costs are alive: those being matched, each beside a
    float64 copy that scipy makes, and the next, computed meanwhile.
    """
    yield from in_order(_matched, costs, threads=threads)


def _matched(cost_II: Tensor) -> Matched:
    order_I = match(cost_II)
    least = cost_II.gather(1, order_I[:, None]).double().mean()
    return Matched(order_I, float(cost_II.diagonal().double().mean()), float(least))


def _distance(inner_II: Tensor, a_square_I: Tensor, b_square_I: Tensor) -> Tensor:
    """Return ||a/|a| - b/|b||| from inner products; a zero row stays zero."""
    a_scale_I, b_scale_I = _scale(a_square_I), _scale(b_square_I)
    cosine_II = inner_II.mul_(a_scale_I[:, None]).mul_(b_scale_I)
    unit_II = (a_square_I > 0).to(inner_II.dtype)[:, None] + (b_square_I > 0)
    return cosine_II.mul_(-2).add_(unit_II).clamp_(min=0).sqrt_()


def _scale(square_I: Tensor) -> Tensor:
    return torch.where(square_I > 0, square_I, 1).rsqrt()
