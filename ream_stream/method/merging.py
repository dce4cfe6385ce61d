"""Averaging the aligned members of a group into one expert.

Letters in shapes: G members of a group.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .expert import Expert


def by_saliency(weight_G: Tensor) -> Tensor:
    """Return shares in proportion to merge weights (REAM, step 6)."""
    weight_G = weight_G.double()
    return weight_G / weight_G.sum()


def equally(weight_G: Tensor) -> Tensor:
    """Return the same share for every member."""
    return torch.full_like(weight_G, 1 / len(weight_G), dtype=torch.float64)


MERGES: Mapping[str, Callable[[Tensor], Tensor]] = {"saliency": by_saliency, "mean": equally}
"""Functions from `saliency.merge_weights` to shares of a group's members; float64, sum 1."""


def merge(shares: Sequence[float], aligned: Iterable[Expert], dtype: torch.dtype) -> Expert:
    """Return the weighted sum of experts whose neurons are already lined up.

    Parameters
    ----------
    shares
        One a member, summing to 1: ``MERGES[name](weight_G).tolist()``.
    aligned
        The members, in the order of `shares`. A generator that loads them
        keeps one in memory at a time.
    dtype
        What the checkpoint stores: sums are kept in float32, or wider if the
        members are, and rounded to it once at the end.

    Raises
    ------
    ValueError
        There are more or fewer members than shares, or none.
    """
    return Expert(*(tensor.to(dtype) for tensor in weighted_sum(shares, aligned)))


def merging_bytes(matrix: int, itemsize: int) -> int:
    """Return the bytes for merging experts of three matrices of so many numbers.

    That is a float32 sum, a member as it is stored, its widened part, and a result.
    """
    return 3 * matrix * 4 + 2 * 3 * matrix * itemsize + 2 * matrix * 4


def weighted_sum(shares: Sequence[float], aligned: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return sums of the members' tensors, in float32 or wider; see `merge`."""
    # no zip and no loop variable: both would hold a member while the next is loaded
    members = iter(aligned)
    total: list[Tensor] = []
    for share in shares:
        _add(total, share, next(members, None))
    if not total or next(members, None) is not None:
        raise ValueError(f"{len(shares)} shares of a group, and another number of members")
    return total


def _add(total: list[Tensor], share: float, member: Sequence[Tensor] | None) -> None:
    if member is None:
        raise ValueError("a group has fewer members than shares")
    if not total:
        # not zeros plus the first: that would turn -0.0 into 0.0
        total += [_wide(tensor) * share for tensor in member]
        return
    for sum_so_far, tensor in zip(total, member, strict=True):
        sum_so_far.add_(tensor, alpha=share)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
