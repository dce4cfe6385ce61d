"""Which experts are kept, and which others each of them absorbs.

Everything here is small (E x E numbers) and runs on the CPU in float64; all
ties are broken by rule, never by rounding or by the order of a sort.

Letters in shapes: E experts, H hidden, G members of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.cluster import hierarchy
from torch import Tensor

_TIE_RTOL = 1e-6
"""Relative tolerance, as a share of the largest, for equal distances to a cluster's mean.

Two members are equidistant from their mean by construction, and which of them
comes out nearer in floating point is noise.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Statistics for the choice of groups; a grouping raises if it needs a missing one."""

    saliency_E: Tensor
    """Saliency of each expert; higher is more important. Ties go to the lower index."""

    distance_EE: Tensor | None = None
    """Symmetric distances in [0, 1] with zero diagonal, for `ream` and `mc_smoe`."""

    mean_EH: Tensor | None = None
    """Mean outputs of the experts, for `hc_smoe`."""


class Grouping(Protocol):
    """A way to make `keep` groups of E experts."""

    def __call__(
        self, evidence: Evidence, keep: int, *, group_size: int, routing_groups: int
    ) -> list[list[int]]:
        """Return the groups, centroid first, then members in the order they joined.

        Parameters
        ----------
        evidence
            What is known of the experts.
        keep
            Groups to make, 1 <= keep <= E.
        group_size
            REAM's C: members of a group at most, the centroid included. Other
            groupings ignore it.
        routing_groups
            ``n_group`` of group-limited routers, otherwise 1. Each contiguous
            E/routing_groups experts get the same number of centroids, since
            the router's groups stay equal in size.

        Returns
        -------
        list of list of int
            Sorted by centroid. A partition of range(E), but for `none`, which
            drops what is not kept.

        Raises
        ------
        ValueError
            The evidence lacks something or is not finite, or the counts do not fit.
        """
        ...


def centroids(saliency_E: Tensor, keep: int, *, routing_groups: int = 1) -> list[int]:
    """Return the `keep` most salient experts, in decreasing order of saliency.

    Ties go to the lower index. With routing groups, each contiguous group
    gives its own ``keep / routing_groups`` best.

    Raises
    ------
    ValueError
        A saliency is not finite, or the counts do not fit.
    """
    score_E = _finite(saliency_E, "saliency")
    num_experts = len(score_E)
    if not 1 <= keep <= num_experts:
        raise ValueError(f"cannot keep {keep} of {num_experts} experts")
    if num_experts % routing_groups or keep % routing_groups:
        raise ValueError(
            f"{num_experts} experts, {keep} kept, do not divide into {routing_groups} groups"
        )
    size, best = num_experts // routing_groups, keep // routing_groups
    order_E = np.argsort(-score_E, kind="stable")
    kept = [order_E[order_E // size == group][:best] for group in range(routing_groups)]
    chosen: list[int] = order_E[np.isin(order_E, np.concatenate(kept))].tolist()
    return chosen


def ream(
    evidence: Evidence, keep: int, *, group_size: int, routing_groups: int = 1
) -> list[list[int]]:
    """Group experts as REAM does (arXiv 2604.04356): fill centroids in order.

    From the most salient centroid down, each takes its nearest experts still
    free until its group has `group_size` members; what is left when all are
    taken stays a group of one. Ties in distance go to the lower index.
    Parameters, result and errors are those of `Grouping`.
    """
    chosen = centroids(evidence.saliency_E, keep, routing_groups=routing_groups)
    num_experts = len(evidence.saliency_E)
    if keep * group_size < num_experts:
        raise ValueError(
            f"{keep} groups of at most {group_size} cannot hold {num_experts} experts"
        )
    distance_EE = _finite(evidence.distance_EE, "distance")
    free = set(range(num_experts)) - set(chosen)
    groups = []
    for centroid in chosen:
        nearest = np.argsort(distance_EE[centroid], kind="stable").tolist()
        taken = [expert for expert in nearest if expert in free][: group_size - 1]
        free.difference_update(taken)
        groups.append([centroid, *taken])
    return sorted(groups)


def mc_smoe(
    evidence: Evidence, keep: int, *, group_size: int = 0, routing_groups: int = 1
) -> list[list[int]]:
    """Group experts as MC-SMoE does (arXiv 2310.01334): all join the nearest centroid.

    Ties in distance go to the more salient centroid; members are in increasing
    order. Parameters, result and errors are those of `Grouping`.
    """
    del group_size
    chosen = centroids(evidence.saliency_E, keep, routing_groups=routing_groups)
    distance_EE = _finite(evidence.distance_EE, "distance")
    groups = {centroid: [centroid] for centroid in chosen}
    for expert in sorted(set(range(len(distance_EE))) - set(chosen)):
        groups[chosen[int(np.argmin(distance_EE[expert, chosen]))]].append(expert)
    return sorted(groups.values())


def hc_smoe(
    evidence: Evidence, keep: int, *, group_size: int = 0, routing_groups: int = 1
) -> list[list[int]]:
    """Group experts as HC-SMoE does (arXiv 2410.08589): average-linkage clusters.

    Clusters are made of mean outputs by their Euclidean distance. The member
    nearest to its cluster's mean is the centroid; of equally near ones the more
    salient, then the lower index. Other members are in increasing order. With
    routing groups each is clustered alone. Parameters, result and errors are
    those of `Grouping`.
    """
    del group_size
    centroids(evidence.saliency_E, keep, routing_groups=routing_groups)  # for its checks
    score_E = _finite(evidence.saliency_E, "saliency")
    mean_EH = _finite(evidence.mean_EH, "mean output")
    size = len(score_E) // routing_groups
    groups = []
    for start in range(0, len(score_E), size):
        for cluster in _clusters(mean_EH[start : start + size], keep // routing_groups):
            members = [start + expert for expert in cluster]
            centroid = _most_central(members, mean_EH, score_E)
            groups.append([centroid, *(expert for expert in members if expert != centroid)])
    return sorted(groups)


def none(
    evidence: Evidence, keep: int, *, group_size: int = 0, routing_groups: int = 1
) -> list[list[int]]:
    """Prune: the centroids stay as groups of one, all other experts are dropped.

    Parameters, result and errors are those of `Grouping`.
    """
    del group_size
    chosen = centroids(evidence.saliency_E, keep, routing_groups=routing_groups)
    return [[centroid] for centroid in sorted(chosen)]


def _clusters(mean_EH: np.ndarray, num_clusters: int) -> list[list[int]]:
    """Cut the average-linkage tree so that exactly `num_clusters` remain.

    The tree's own merges are replayed: cutting at a height, as scipy's
    ``maxclust`` does, leaves fewer clusters where two merges are equally high.
    """
    clusters = {expert: [expert] for expert in range(len(mean_EH))}
    if num_clusters < len(mean_EH):
        tree = hierarchy.linkage(mean_EH, method="average", metric="euclidean")
        for step, (left, right) in enumerate(tree[: len(mean_EH) - num_clusters, :2]):
            merged = clusters.pop(int(left)) + clusters.pop(int(right))
            clusters[len(mean_EH) + step] = sorted(merged)
    return list(clusters.values())


def _most_central(members: list[int], mean_EH: np.ndarray, score_E: np.ndarray) -> int:
    mean_GH = mean_EH[members]
    center_H = mean_GH.mean(axis=0)
    distance_G = np.linalg.norm(mean_GH - center_H, axis=1)
    # the second term is what float64 can resolve between nearly equal outputs
    slack = _TIE_RTOL * distance_G.max() + 1e-12 * np.linalg.norm(center_H)
    nearest = [
        expert
        for expert, away in zip(members, distance_G, strict=True)
        if away <= distance_G.min() + slack
    ]
    return min(nearest, key=lambda expert: (-score_E[expert], expert))


def _finite(values: Tensor | None, what: str) -> np.ndarray:
    if values is None:
        raise ValueError(f"this grouping needs the {what} of every expert")
    array = values.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(array).all():
        experts = sorted({int(index[0]) for index in np.argwhere(~np.isfinite(array))})
        raise ValueError(f"the {what} of experts {experts[:8]} is not a finite number")
    return array


GROUPINGS: Mapping[str, Grouping] = {
    "ream": ream,
    "mc-smoe": mc_smoe,
    "hc-smoe": hc_smoe,
    "none": none,
}
