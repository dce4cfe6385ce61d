"""A layer's experts cut into slices, in the run: sums of activations, and the choice of slices.

Letters in shapes: T tokens of a batch, R rows of one expert, E experts, S sequences,
L tokens of a sequence, H hidden, I inner.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.expert_stack import Tensors
from ream_stream.errors import NumbersError
from ream_stream.method.normal_equations import add_product
from ream_stream.method.slices import (
    RemovalPath,
    kept_neurons,
    removal_paths,
    slice_scores,
    slices_kept,
)
from ream_stream.model.batch_store import BatchStore
from ream_stream.model.expert_blocks import cut_experts
from ream_stream.model.experts import BlockState, InnerListener, StreamedExperts
from ream_stream.model.finite import ExcludedSequences
from ream_stream.model.ranks.group import ALONE, Ranks, in_turn
from ream_stream.model.streamed_model import Batch
from ream_stream.planning.plan import Plan

from .decision import Decision, saliencies
from .held_back import held_back
from .observer import Observed
from .output_tensors import Cut


class ActivationGrams:
    """Sums A_e = sum of a^T a over the calibration tokens, for blocks of experts in turn.

    With a refit, the sequences that it holds back are left out. For statistics each domain
    has sums of its own.

    Parameters
    ----------
    plan
        Plan of the run.
    experts
        Experts of the open source layer.
    tokens
        Calibration set; tokens that do not count are masked.
    excluded
        Excluded calibration sequences.
    store
        Store of the sums, (I, I) float32, by expert, domain after domain.
    ranks
        Processes that run batches; each ends with all sums in its store.
    """

    def __init__(
        self,
        plan: Plan,
        experts: StreamedExperts,
        tokens: Tokens,
        excluded: ExcludedSequences,
        store: BatchStore,
        ranks: Ranks = ALONE,
    ) -> None:
        self.blocks = cut_experts(experts.count, plan.schedule.gram_blocks)
        """Blocks of experts; each is summed in a pass over the calibration set."""
        self.store = store
        """Sums of all experts, by expert, domain after domain."""
        self._plan = plan
        self._experts, self._excluded = experts, excluded
        self._batch_sequences = plan.schedule.batch_sequences
        self._relay = ranks.relay(plan.num_batches)
        mask_SL = tokens.attention_mask_SL
        counts_SL = torch.ones_like(tokens.input_ids_SL) if mask_SL is None else mask_SL
        self._counts_SL = counts_SL.bool()
        if plan.refits:
            self._counts_SL &= ~held_back(tokens, plan.settings.seed)[:, None]
        self._domain_S = tokens.domain_S
        self._domains = len(tokens.domains) if plan.settings.observes else 1
        self._starts = range(0, self._domains * experts.count, experts.count)
        self._sums: dict[int, Tensor] = {}
        self._parts: Sequence[range] = ()
        self._visits: dict[int, int] = {}
        self._number = 0
        self._to_come: list[int] = []
        self._taken: int | None = None

    @contextmanager
    def summing(self, block: range, parts: Sequence[range]) -> Iterator[None]:
        """Sum over the batches that are run in the block, each between `begin` and `end`.

        At the end of the block the sums of the experts are in the store.

        Parameters
        ----------
        block
            Experts that are summed.
        parts
            Experts that are run each time that a batch comes again.
        """
        weights = self._experts.weights
        inner = weights.stack.inner
        # one after another, so that each can be let go of
        numbers = [start + expert for start in self._starts for expert in block]
        self._sums = {n: torch.zeros(inner, inner, device=weights.device) for n in numbers}
        self._parts, self._visits = parts, {}
        try:
            yield
            for expert in block:
                self._relay.finish(self._of(expert))
            for number in numbers:
                self.store.put(number, self._sums.pop(number))
        finally:
            self._experts.inner_listener = None
            self._sums = {}

    @contextmanager
    def only(self, block: range) -> Iterator[None]:
        """Run only the experts of a block, for their listener."""
        self._experts.part = BlockState(experts=block, is_last=False)
        try:
            yield
        finally:
            self._experts.part = None

    def begin(self, number: int, batch: Batch) -> None:
        """Sum over a batch from now on."""
        visit = self._visits.get(number, 0)
        self._visits[number] = visit + 1
        self._number = number
        self._to_come = [e for e in reversed(self._parts[visit]) if e in self._sums]
        self._experts.inner_listener = self._listener(number * self._batch_sequences, batch)

    def end(self) -> None:
        """Carry on what is left of the batch."""
        self._carry(None)
        self._experts.inner_listener = None

    def _carry(self, expert: int | None) -> None:
        """Carry sums on until it is the turn of an expert; None for the end of the batch.

        Experts are run in order, so the next rank adds to a sum while later ones are run here.
        """
        while self._taken != expert or expert is None:
            if self._taken is not None:
                self._relay.pass_on(self._number, self._of(self._taken))
            if not self._to_come:
                self._taken = None
                return
            self._taken = self._to_come.pop()
            self._relay.take(self._number, self._of(self._taken))

    def _of(self, expert: int) -> list[Tensor]:
        """Return the sums of an expert, domain after domain."""
        return [self._sums[start + expert] for start in self._starts]

    def _listener(self, first: int, batch: Batch) -> InnerListener:
        """Return the listener of a batch whose first sequence is number `first`."""
        count = len(batch.input_ids_BL)
        counts_BL = self._counts_SL[first : first + count]
        if (kept_B := self._excluded.kept(first, count)) is not None:
            counts_BL = counts_BL & kept_B[:, None]
        device = self._experts.weights.device
        domain_BL = self._domain_S[first : first + count, None].expand_as(counts_BL)
        return partial(
            self._add, counts_BL.reshape(-1).to(device), domain_BL.reshape(-1).to(device)
        )

    def _add(
        self,
        counts_T: Tensor,
        domain_T: Tensor,
        expert: int,
        inner_RI: Tensor,
        token_R: Tensor,
        weight_R: Tensor,
    ) -> None:
        if expert not in self._sums:
            return
        self._carry(expert)
        gated_RI = inner_RI * weight_R[:, None].to(inner_RI.dtype)
        # a sequence with numbers that are not finite is excluded once the layer has run
        counts_R = gated_RI.isfinite().all(dim=1) & counts_T[token_R]
        if self._domains == 1:
            gated_RI = torch.where(counts_R[:, None], gated_RI, 0)
            add_product(self._sums[expert], gated_RI, gated_RI)
            return
        for domain in range(self._domains):
            own_RI = gated_RI[counts_R & (domain_T[token_R] == domain)]
            if len(own_RI):
                add_product(self._sums[domain * self._experts.count + expert], own_RI, own_RI)


def cut_of(plan: Plan, grams: BatchStore) -> Cut:
    """Return what the output's experts are made with.

    Parameters
    ----------
    plan
        Plan of the run.
    grams
        Sums of activations by expert.
    """
    slices, config = plan.settings.method.slices, plan.source_model.text_config
    return Cut(
        factor=slices if plan.family.normalizes(config) else 1,
        shares=plan.family.bias_shares(slices),
        grams=grams,
    )


def choose_slices(
    plan: Plan,
    observed: Observed,
    grams: BatchStore,
    experts: StreamedExperts,
    tensors: Tensors,
    layer: int,
    expert_done: Callable[[int, int], None],
    ranks: Ranks = ALONE,
) -> Decision:
    """Choose the slices of a layer that stay.

    Parameters
    ----------
    plan, observed, grams
        Plan of the run; sums of the layer, for the saliencies that are reported; sums of
        activations by expert.
    experts, tensors, layer
        Experts of the open source layer, its tensors, and its position.
    expert_done, ranks
        Called with the number of experts done, and in all; processes that share the experts.

    Raises
    ------
    NumbersError
        A sum is not a finite number.
    """
    settings, stack = plan.settings, experts.weights.stack
    slices, width = settings.method.slices, settings.width(stack.inner)
    device = experts.weights.device

    loaded = (
        (grams.get(expert).to(device), stack.read(tensors, expert).down_HI.to(device))
        for expert in ranks.own(stack.count)
    )
    own: list[RemovalPath] = []
    try:
        for path in removal_paths(loaded, threads=plan.schedule.threads):
            own.append(path)
            expert_done(len(own), len(ranks.own(stack.count)))
        paths = [RemovalPath(order_I=o, error_I=e) for o, e in _of_all(own, stack.count, ranks)]
        score_EC = torch.stack([slice_scores(p.error_I, slices, width) for p in paths])
        kept = slices_kept(score_EC, settings.experts, routing_groups=plan.routing_groups)
    except ValueError as error:
        raise NumbersError(f"layer {layer}: {error}") from error
    saliency_E, domains = saliencies(settings.method, observed)
    owners = [expert for expert, count in enumerate(kept) for _ in range(count)]
    return Decision(
        saliency=tuple(saliency_E.tolist()),
        domain_saliency=domains,
        groups=tuple((expert,) for expert in owners),
        shares=((1.0,),) * len(owners),
        neurons={
            expert: kept_neurons(paths[expert], count, width)
            for expert, count in enumerate(kept)
            if count
        },
        score_EC=score_EC,
    )


def _of_all(
    own: Sequence[RemovalPath], count: int, ranks: Ranks
) -> list[tuple[Tensor, Tensor]]:
    """Return orders and errors of all experts, of which each rank gives its own."""
    parts = ranks.gather_tensors(
        [each for path in own for each in (path.order_I, path.error_I)]
    )
    return in_turn([list(zip(part[::2], part[1::2], strict=True)) for part in parts], count)
