"""One layer: observe it, decide which experts go, write its shards, run it again.

Letters in shapes: B sequences of a batch, L tokens of a sequence, T tokens of a
batch, n sampled tokens, K experts a token, E experts, H hidden, I inner.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checkpoint.header import DTYPES, TensorEntry
from .checkpoint.layouts import ExpertStack
from .checkpoint.source import MappedTensors
from .errors import ReamStreamError
from .experts import ExpertWeights, Routed, StreamedExperts
from .families import SCORES, Family
from .method.alignment import ALIGNMENTS, Neurons, Pair, align_all
from .method.expert import Expert, reorder
from .method.grouping import GROUPINGS, Evidence
from .method.merging import MERGES, merge
from .method.saliency import SALIENCIES, RoutedSums, merge_weights
from .method.similarity import (
    LogitGram,
    MeanActivations,
    distance,
    expert_similarity,
    gate_similarity,
)
from .seeds import generator
from .settings import Method, Settings

SAMPLE_ROWS = 2048
"""Sampled tokens that are run through an expert at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Which experts of a layer become which."""

    saliency: tuple[float, ...]
    """By source expert."""

    groups: tuple[tuple[int, ...], ...]
    """Source experts of each new expert, centroid first, sorted by centroid."""

    shares: tuple[tuple[float, ...], ...]
    """Weights of a group's members, summing to 1."""


class TokenSample:
    """Inputs and router scores of some calibration tokens, the same for every expert.

    Parameters
    ----------
    mask_SL
        Which calibration tokens are not padding.
    size
        Tokens to draw; 0, or more than there are, means all of them.
    seed, layer
        What the draw is derived from.
    """

    def __init__(self, mask_SL: Tensor, size: int, *, seed: int, layer: int) -> None:
        tokens = mask_SL.reshape(-1).nonzero().squeeze(1)
        if 0 < size < len(tokens):
            drawn = torch.randperm(len(tokens), generator=generator(seed, layer, "sample"))
            tokens = tokens[drawn[:size].sort().values]
        self.position_n = tokens
        self.hidden_nH = torch.empty(0)
        self.score_nE = torch.empty(0)

    def take(self, start: int, hidden_TH: Tensor, score_TE: Tensor) -> None:
        """Keep the rows of a batch whose first token has position `start`."""
        total = len(self.position_n)
        if not len(self.hidden_nH):
            self.hidden_nH = hidden_TH.new_empty(total, hidden_TH.shape[1])
            self.score_nE = score_TE.new_empty(total, score_TE.shape[1])
        bounds = torch.tensor([start, start + len(hidden_TH)])
        first, last = torch.searchsorted(self.position_n, bounds).tolist()
        row = (self.position_n[first:last] - start).to(hidden_TH.device)
        self.hidden_nH[first:last] = hidden_TH[row]
        self.score_nE[first:last] = score_TE[row]

    def spread(self, count: int) -> Tensor:
        """Return the inputs of at most `count` of its tokens, evenly spread."""
        step = -(-len(self.hidden_nH) // count)
        return self.hidden_nH[::step]


class Observer:
    """Gathers what the decision is made from while a layer runs.

    Parameters
    ----------
    family
        For the router's score function.
    num_experts
        E.
    sample
        Filled along the way; None if experts are not compared.
    gate_term
        Whether the router's logits are compared.
    device
        Where sums over tokens are kept.
    """

    def __init__(
        self,
        family: Family,
        num_experts: int,
        sample: TokenSample | None,
        *,
        gate_term: bool,
        device: torch.device,
    ) -> None:
        self.sums = RoutedSums(num_experts)
        self.sample = sample
        self.gram = LogitGram(num_experts, device=device) if gate_term else None
        self._score = SCORES[family.score]
        self._logits_TE = torch.empty(0)
        self._keep_T = torch.empty(0)
        self._start = 0

    @contextmanager
    def listening(self, router: nn.Module, experts: StreamedExperts) -> Iterator[None]:
        """Attach to the router and the experts for the length of the block."""

        def keep_logits(_module: nn.Module, _args: Any, output: Any) -> None:  # noqa: ANN401
            self._logits_TE = output[0]

        handle = router.register_forward_hook(keep_logits)
        experts.listener = self._take
        try:
            yield
        finally:
            handle.remove()
            experts.listener = None

    def expect(self, mask_BL: Tensor, start: int) -> None:
        """Tell which tokens of the coming batch count, and the position of its first."""
        self._keep_T, self._start = mask_BL.reshape(-1).bool(), start

    def _take(self, routed: Routed) -> None:
        keep_T = self._keep_T.to(routed.index_TK.device)
        score_TE = self._score(self._logits_TE)
        if self.sample is not None:
            self.sample.take(self._start, routed.hidden_TH, score_TE)
        index_TK = routed.index_TK[keep_T]
        self.sums.update(
            index_TK,
            routed.weight_TK[keep_T],
            score_TE[keep_T].gather(1, index_TK),
            routed.norm_TK[keep_T],
        )
        if self.gram is not None:
            self.gram.update(self._logits_TE[keep_T])


def mean_outputs(
    experts: StreamedExperts, sample: TokenSample, similarity: str
) -> Iterator[Tensor | None]:
    """Run every expert on the sampled tokens; yield None for each, then the means (E, H)."""
    stack, hidden_nH = experts.weights.stack, sample.hidden_nH
    count = len(stack.experts)
    mean_EH = torch.zeros(count, stack.hidden, dtype=torch.float64)
    for expert in range(count):
        gate_up_2IH, down_HI = experts.weights.load(expert)
        means = MeanActivations(1, stack.inner, similarity=similarity, device=hidden_nH.device)
        for start in range(0, len(hidden_nH), SAMPLE_ROWS):
            rows = slice(start, start + SAMPLE_ROWS)
            inner_RI = experts.inner(hidden_nH[rows], gate_up_2IH)
            means.add(0, inner_RI, sample.score_nE[rows, expert])
        mean_I = means.mean_EI()[0].float()
        # in float32 at least: rounding would blur experts that are nearly alike
        mean_EH[expert] = functional.linear(mean_I, down_HI.float()).cpu()
        yield None
    yield mean_EH


def decide(
    settings: Settings,
    routing_groups: int,
    observer: Observer,
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
    saliency_E = SALIENCIES[method.saliency](observer.sums)
    # nothing to compare: experts are pruned, or all of them are kept
    grouping = "none" if mean_EH is None else method.grouping
    distance_EE = None
    if mean_EH is not None:
        gate_EE = (
            None if observer.gram is None else gate_similarity(observer.gram.gram_EE.cpu())
        )
        distance_EE = distance(expert_similarity(mean_EH), gate_EE)
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
        groups=tuple(tuple(group) for group in groups),
        shares=tuple(tuple(share(weight_E[group]).tolist()) for group in groups),
    )


def alignment_orders(
    method: Method,
    decision: Decision,
    experts: StreamedExperts,
    tensors: MappedTensors,
    sample: TokenSample | None,
    threads: int,
) -> Iterator[tuple[int, Tensor]]:
    """Yield, for every member that joins a centroid, the order its neurons take."""
    alignment = ALIGNMENTS[method.alignment]
    pairs = [(group[0], member) for group in decision.groups for member in group[1:]]
    hidden_nH = (
        sample.spread(method.alignment_tokens) if sample and alignment.activations else None
    )
    stack = experts.weights.stack

    def neurons(expert: int) -> Neurons:
        inner_nI = None
        if hidden_nH is not None:
            inner_nI = experts.inner(hidden_nH, experts.weights.load(expert)[0]).float().cpu()
        return Neurons(expert=read_expert(tensors, stack, expert), activation_nI=inner_nI)

    def load() -> Iterator[Pair]:
        last, centroid = -1, None
        for first, member in pairs:
            if centroid is None or first != last:
                last, centroid = first, neurons(first)
            yield Pair(centroid=centroid, member=neurons(member))

    orders = align_all(alignment, load(), threads=threads)
    for (_, member), order_I in zip(pairs, orders, strict=True):
        yield member, order_I


def read_expert(tensors: MappedTensors, stack: ExpertStack, expert: int) -> Expert:
    """Return one expert as the file has it, without a copy."""
    names = stack.experts[expert]
    return Expert(
        gate_IH=tensors[names.gate], up_IH=tensors[names.up], down_HI=tensors[names.down]
    )


def layer_content(
    decision: Decision,
    orders: Mapping[int, Tensor],
    stack: ExpertStack,
    routers: Mapping[str, int],
    entries: Mapping[str, TensorEntry],
    tensors: MappedTensors,
) -> Callable[[str], Tensor | TensorEntry]:
    """Return a function that gives each tensor of a compressed layer, by output name.

    Experts of groups of one, and all that is not an expert's or the router's,
    are source tensors to be copied byte for byte. A merged expert is made when
    the first of its three tensors is asked for and held until the next one is.
    """
    owner = {
        name: (number, part)
        for number, expert in enumerate(stack.experts)
        for part, name in enumerate(expert.parts())
    }
    kept = torch.tensor([group[0] for group in decision.groups])
    merged: tuple[int, Expert | None] = (-1, None)

    def merge_group(number: int) -> Expert:
        def members() -> Iterator[Expert]:
            for expert in decision.groups[number]:
                weights = read_expert(tensors, stack, expert)
                yield reorder(weights, orders[expert]) if expert in orders else weights

        return merge(decision.shares[number], members(), DTYPES[stack.dtype])

    def content(name: str) -> Tensor | TensorEntry:
        nonlocal merged
        if name in routers:
            return tensors[name].index_select(routers[name], kept)
        if name not in owner:
            return entries[name]
        number, part = owner[name]
        group = decision.groups[number]
        if len(group) == 1:
            return entries[stack.experts[group[0]].parts()[part]]
        if merged[0] != number:
            merged = (number, merge_group(number))
        return merged[1][part]  # type: ignore[index]

    return content


class Playback:
    """Outputs of a layer's attention, kept so that it need not run a second time.

    They do not depend on the experts: the compressed layer gets the same
    hidden states, so its attention would give the same bits again.
    """

    def __init__(self) -> None:
        self._outputs: list[list[Any]] = []

    @contextmanager
    def recording(self, mixers: Sequence[nn.Module]) -> Iterator[None]:
        """Keep what the modules return, batch by batch, for the length of the block."""
        self._outputs = [[] for _ in mixers]
        handles = [
            module.register_forward_hook(lambda _m, _a, output, kept=kept: kept.append(output))
            for module, kept in zip(mixers, self._outputs, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def playing(self, mixers: Sequence[nn.Module]) -> Iterator[None]:
        """Let the modules return what was kept, in the same order, for the length of the block."""
        for module, kept in zip(mixers, self._outputs, strict=True):
            module.forward = _next_of(iter(kept))
        try:
            yield
        finally:
            for module in mixers:
                del module.forward
            self._outputs = []


def _next_of(outputs: Iterator[Any]) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: next(outputs)
