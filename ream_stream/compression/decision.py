"""Which experts of a layer become which, and in which order their neurons are averaged.

Letters in shapes: n sampled tokens, E experts, H hidden, I inner.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ream_stream.checkpoint.expert_stack import Tensors
from ream_stream.errors import ReamStreamError
from ream_stream.method.alignment import ALIGNMENTS, Matched, Neurons, Pair, align_all
from ream_stream.method.grouping import GROUPINGS, Evidence
from ream_stream.method.merging import MERGES
from ream_stream.method.rng import generator
from ream_stream.method.saliency import SALIENCIES, merge_weights
from ream_stream.method.similarity import (
    RANDOM,
    distance,
    expert_similarity,
    gate_similarity,
    random_distance,
)
from ream_stream.model.experts import StreamedExperts
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.settings import Method, Settings

from .observer import Observed, TokenSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Grouping of one layer's experts into new experts."""

    saliency: tuple[float, ...]
    """Saliency of each source expert."""

    domain_saliency: Mapping[str, tuple[float, ...]]
    """Saliency of each source expert on each domain's tokens; empty for a single domain."""

    groups: tuple[tuple[int, ...], ...]
    """Source experts of each new expert, centroid first, sorted by centroid."""

    shares: tuple[tuple[float, ...], ...]
    """Merge weights of the members of each group; each group's sum is 1."""

    distance_EE: Tensor | None = field(default=None, repr=False, compare=False)
    """Distances that the groups were made from; None if experts were not compared."""

    neurons: Mapping[int, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Neurons of each slice that an expert keeps, (slices, width), by expert; empty if experts
    were not cut."""

    score_EC: Tensor | None = field(default=None, repr=False, compare=False)
    """Scores of all slices; None if experts were not cut."""


def saliencies(
    method: Method, observed: Observed
) -> tuple[Tensor, dict[str, tuple[float, ...]]]:
    """Return the saliency of each expert, and on each domain's tokens if there are several."""
    saliency, domains = SALIENCIES[method.saliency], observed.sums.domains
    of_domains = {name: tuple(saliency(sums).tolist()) for name, sums in domains.items()}
    return saliency(observed.sums.total()), of_domains if len(domains) > 1 else {}


def slice_numbers(groups: Sequence[Sequence[int]]) -> list[int]:
    """Return the number of each new expert among the slices of its source expert."""
    first: dict[int, int] = {}
    return [n - first.setdefault(group[0], n) for n, group in enumerate(groups)]


def decide(
    settings: Settings,
    routing_groups: int,
    observed: Observed,
    mean_EH: Tensor | None,
    layer: int,
) -> Decision:
    """Rank and group the experts of a layer.

    Raises
    ------
    ReamStreamError
        A statistic is not a finite number.
    """
    method = settings.method
    saliency_E, domains = saliencies(method, observed)
    # nothing to compare: experts are pruned, or all of them are kept
    grouping = "none" if mean_EH is None else method.grouping
    distance_EE = None
    if mean_EH is not None:
        gate_EE = (
            None if observed.gram is None else gate_similarity(observed.gram.gram_EE.cpu())
        )
        distance_EE = distance(expert_similarity(mean_EH), gate_EE)
        if method.similarity == RANDOM:
            drawn = generator(settings.seed, layer, "distances")
            distance_EE = random_distance(len(mean_EH), drawn)
    try:
        groups = GROUPINGS[grouping](
            Evidence(saliency_E=saliency_E, distance_EE=distance_EE, mean_EH=mean_EH),
            settings.experts,
            group_size=method.group_size,
            routing_groups=routing_groups,
        )
    except ValueError as error:
        raise ReamStreamError(f"layer {layer}: {error}") from error
    weight_E = merge_weights(saliency_E)
    share = MERGES[method.merge]
    return Decision(
        saliency=tuple(saliency_E.tolist()),
        domain_saliency=domains,
        groups=tuple(tuple(group) for group in groups),
        shares=tuple(tuple(share(weight_E[group]).tolist()) for group in groups),
        distance_EE=distance_EE,
    )


def alignment_orders(
    method: Method,
    decision: Decision,
    experts: StreamedExperts,
    tensors: Tensors,
    sample: TokenSample | None,
    threads: int,
    member_done: Callable[[int, int], None] = lambda _done, _total: None,
    ranks: Ranks = ALONE,
) -> dict[int, Matched]:
    """Return, for every member that joins a centroid, the order its neurons take.

    `member_done` is told how many members are done, and how many there are. Each of several
    ranks looks at its share of them.
    """
    alignment = ALIGNMENTS[method.alignment]
    every = [(group[0], member) for group in decision.groups for member in group[1:]]
    # in a row: a centroid is loaded once for its members
    first, stop = (len(every) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    pairs = every[first:stop]
    hidden_nH = (
        sample.spread(method.alignment_tokens) if sample and alignment.activations else None
    )
    stack = experts.weights.stack

    def neurons(expert: int) -> Neurons:
        inner_nI = None
        if hidden_nH is not None:
            inner_nI = experts.inner(hidden_nH, experts.weights.load(expert)).float().cpu()
        return Neurons(expert=stack.read(tensors, expert), activation_nI=inner_nI)

    def load() -> Iterator[Pair]:
        last, centroid = -1, None
        for first, member in pairs:
            if centroid is None or first != last:
                last, centroid = first, neurons(first)
            yield Pair(centroid=centroid, member=neurons(member))

    orders: dict[int, Matched] = {}
    found = align_all(alignment, load(), threads=threads)
    for (_, member), matched in zip(pairs, found, strict=True):
        orders[member] = matched
        member_done(len(orders), len(pairs))
    return _of_all(orders, ranks)


def _of_all(own: Mapping[int, Matched], ranks: Ranks) -> dict[int, Matched]:
    """Return what all ranks found, in the order of ranks."""
    costs = [[member, found.kept, found.least] for member, found in own.items()]
    told = [
        torch.tensor(costs, dtype=torch.float64),
        *(found.order_I for found in own.values()),
    ]
    found = {}
    for cost_n3, *orders in ranks.gather_tensors(told):
        for (member, kept, least), order_I in zip(cost_n3.tolist(), orders, strict=True):
            found[int(member)] = Matched(order_I, kept, least)
    return found
