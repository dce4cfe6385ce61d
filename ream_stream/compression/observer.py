"""What a layer tells about its experts while it runs.

Letters in shapes: B sequences of a batch, L tokens of a sequence, T tokens of a
batch, n sampled tokens, R rows of a block, K experts a token, E experts, H hidden,
I inner.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ream_stream.calibration.tokens import Tokens
from ream_stream.errors import NumbersError
from ream_stream.method.rng import generator
from ream_stream.method.saliency import RoutedSums
from ream_stream.method.similarity import LogitGram, MeanActivations
from ream_stream.model.experts import Routed, StreamedExperts
from ream_stream.model.families import Family
from ream_stream.model.finite import ExcludedSequences, is_finite
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.model.streamed_model import Batch
from ream_stream.planning.memory import SAMPLE_ROWS


class TokenSample:
    """Inputs and router scores of some calibration tokens, the same for every expert.

    Parameters
    ----------
    position_n
        Positions of the tokens in the calibration set, ascending.
    """

    def __init__(self, position_n: Tensor) -> None:
        self.position_n = position_n
        self.hidden_nH = torch.empty(0)
        self.score_nE = torch.empty(0)

    @classmethod
    def drawn(cls, tokens: Tokens, size: int, *, seed: int, layer: int) -> Self:
        """Draw tokens; padding is never drawn.

        Parameters
        ----------
        tokens
            The calibration set.
        size
            Tokens to draw; 0, or more than there are, means all of them.
        seed, layer
            What the draw is derived from.
        """
        mask_SL = tokens.attention_mask_SL
        position_n = torch.arange(tokens.input_ids_SL.numel())
        if mask_SL is not None:
            position_n = position_n[mask_SL.reshape(-1).bool()]
        if 0 < size < len(position_n):
            drawn = torch.randperm(len(position_n), generator=generator(seed, layer, "sample"))
            position_n = position_n[drawn[:size].sort().values]
        return cls(position_n)

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

    def gather(self, ranks: Ranks, batch_tokens: int) -> None:
        """Give every rank the rows that the others took, in batches of so many tokens."""
        if ranks.size == 1:
            return
        owner_n = self.position_n // batch_tokens % ranks.size
        for rank in range(ranks.size):
            row = (owner_n == rank).nonzero().squeeze(1).to(self.hidden_nH.device)
            parts = [self.hidden_nH[row], self.score_nE[row]]
            ranks.broadcast_tensors(parts, rank)
            self.hidden_nH[row], self.score_nE[row] = parts

    def drop(self, excluded: ExcludedSequences, length: int) -> None:
        """Forget the tokens of excluded sequences, each of `length` tokens."""
        if len(excluded) and len(self.hidden_nH):
            sequence_n = self.position_n // length
            keep_n = ~torch.isin(sequence_n, torch.tensor([*excluded]))
            self.position_n = self.position_n[keep_n]
            self.hidden_nH = self.hidden_nH[keep_n.to(self.hidden_nH.device)]
            self.score_nE = self.score_nE[keep_n.to(self.score_nE.device)]

    def spread(self, count: int) -> Tensor:
        """Return the inputs of `count` of its tokens, or of all, evenly spread."""
        total = len(self.hidden_nH)
        return self.hidden_nH[torch.arange(min(count, total)) * total // min(count, total)]


class SumsByDomain:
    """Sums of routed tokens, kept apart by domain; their total is that of all tokens.

    Parameters
    ----------
    tokens
        The calibration set.
    num_experts
        E.
    """

    def __init__(self, tokens: Tokens, num_experts: int) -> None:
        self._domain_S, self._length = tokens.domain_S, tokens.sequence_length
        self.domains = {name: RoutedSums(num_experts) for name in tokens.domains}

    def update(
        self,
        start: int,
        topk_TK: Tensor,
        gate_TK: Tensor,
        score_TK: Tensor,
        norm_TK: Tensor,
        keep_T: Tensor | None,
    ) -> None:
        """Add the batch whose first token has position `start`, as `RoutedSums.update` does.

        Of the batch's tokens, `keep_T` tells which are among the given ones; None for all.
        """
        parts = (topk_TK, gate_TK, score_TK, norm_TK)
        count = len(topk_TK) if keep_T is None else len(keep_T)
        rows = slice(start // self._length, (start + count) // self._length)
        domain_T = self._domain_S[rows].repeat_interleave(self._length)
        if keep_T is not None:
            domain_T = domain_T[keep_T.cpu()]
        for number, sums in enumerate(self.domains.values()):
            if len(self.domains) == 1:
                sums.update(*parts)
            elif len(row := (domain_T == number).nonzero().squeeze(1).to(topk_TK.device)):
                sums.update(*(part[row] for part in parts))

    def running(self) -> list[Tensor]:
        """Return the sums themselves, to be carried from batch to batch."""
        return [tensor for sums in self.domains.values() for tensor in sums.tensors().values()]

    def total(self) -> RoutedSums:
        """Return the sums of all tokens."""
        first, *others = self.domains.values()
        total = RoutedSums.from_tensors(first.tensors())
        for sums in others:
            total.add(sums)
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Return the total by name and, of several domains, each one's as ``NAME/domain``."""
        tensors = self.total().tensors()
        if len(self.domains) > 1:
            for domain, sums in self.domains.items():
                tensors |= {f"{name}/{domain}": t for name, t in sums.tensors().items()}
        return tensors


class Observed(Protocol):
    """What is known of a layer's experts: from an `Observer`, or kept by an earlier run."""

    sums: SumsByDomain
    """Sums of routed tokens."""

    sample: TokenSample | None
    """Tokens that experts are compared on; None if they are not compared."""

    gram: LogitGram | None
    """Inner products of the router's logit columns; None if they are not compared."""


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
    tokens
        The calibration set, for the domain of each sequence and the tokens that count.
    excluded
        Sequences that do not count; those with numbers that are not finite are added.
    gate_term
        Whether the router's logits are compared.
    device
        Where sums over tokens are kept.
    batch_sequences
        Sequences of a batch.
    ranks
        Processes that run batches; each ends with the sums of all.
    """

    def __init__(
        self,
        family: Family,
        num_experts: int,
        sample: TokenSample | None,
        tokens: Tokens,
        excluded: ExcludedSequences,
        *,
        gate_term: bool,
        device: torch.device,
        batch_sequences: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.sums = SumsByDomain(tokens, num_experts)
        self.sample = sample
        self.gram = LogitGram(num_experts, device=device) if gate_term else None
        self._family = family
        self._excluded, self._length = excluded, tokens.sequence_length
        self._mask_SL = tokens.attention_mask_SL
        self._late: dict[int, Tensor] = {}
        self._logits_TE = torch.empty(0)
        self._batch_sequences, self._ranks = batch_sequences, ranks
        self._relay = ranks.relay(-(-tokens.num_sequences // batch_sequences))

    @contextmanager
    def attached(self, router: nn.Module) -> Iterator[None]:
        """Record the router's logits for the length of the block."""

        def keep_logits(_module: nn.Module, _args: Any, output: Any) -> None:  # noqa: ANN401
            self._logits_TE = output[1 if self._family.scales_inputs else 0]

        handle = router.register_forward_hook(keep_logits)
        try:
            yield
        finally:
            handle.remove()

    def listener(self, number: int, batch: Batch) -> Callable[[Routed], None]:
        """Return the listener of batch `number`."""
        first = number * self._batch_sequences
        count = len(batch.input_ids_BL)
        keep_T = None
        if self._mask_SL is not None:
            keep_T = self._mask_SL[first : first + count].reshape(-1).bool()
        keep_T = self._without(keep_T, self._excluded.kept(first, count))
        return partial(self._take, number, keep_T)

    def finish(self, layer: int) -> None:
        """Forget what was sampled of excluded sequences, and check the sums.

        Raises
        ------
        NumbersError
            More sequences were excluded than may be, or a sum is not finite.
        """
        for first, bad_B in self._late.items():
            self._excluded.note(layer, first, bad_B)
        self._excluded.join(layer, self._ranks)
        self._relay.finish(self._running())
        if self.sample is not None:
            self.sample.gather(self._ranks, self._batch_sequences * self._length)
            self.sample.drop(self._excluded, self._length)
        for name, sum_E in self.sums.tensors().items():
            if not is_finite(sum_E):
                raise NumbersError(f"layer {layer}: the statistics {name} are not finite")

    def _without(self, keep_T: Tensor | None, kept_B: Tensor | None) -> Tensor | None:
        """Return which tokens of a batch count if only those of some sequences do."""
        if kept_B is None:
            return keep_T
        kept_T = kept_B.repeat_interleave(self._length)
        return kept_T if keep_T is None else keep_T & kept_T

    def _running(self) -> list[Tensor]:
        gram = [] if self.gram is None else [self.gram.gram_EE]
        return self.sums.running() + gram

    def _take(self, number: int, keep_T: Tensor | None, routed: Routed) -> None:
        first = number * self._batch_sequences
        bad_B = self._bad_rows(first, routed.hidden_TH, routed.norm_TK, self._logits_TE)
        keep_T = self._without(keep_T, None if bad_B is None else ~bad_B)
        score_TE = self._family.score(self._logits_TE)
        start = first * self._length
        if self.sample is not None:
            self.sample.take(start, routed.hidden_TH, score_TE)
        index_TK, weight_TK, norm_TK = routed.index_TK, routed.weight_TK, routed.norm_TK
        logits_TE = self._logits_TE
        if keep_T is not None:
            here_T = keep_T.to(index_TK.device)
            index_TK, weight_TK, norm_TK = index_TK[here_T], weight_TK[here_T], norm_TK[here_T]
            logits_TE, score_TE = logits_TE[here_T], score_TE[here_T]
        # where the score is in the input already, it does not count once more
        scored_TK = weight_TK if self._family.scales_inputs else score_TE.gather(1, index_TK)
        if self.gram is not None and self._family.gives_scores:
            # of probabilities the logarithm; tiny ones round to zero
            logits_TE = logits_TE.clamp_min(torch.finfo(torch.float32).tiny).log()
        with self._relay.turn(number, self._running()):
            self.sums.update(start, index_TK, weight_TK, scored_TK, norm_TK, keep_T)
            if self.gram is not None:
                self.gram.update(logits_TE)

    def _bad_rows(self, first: int, *state_TX: Tensor) -> Tensor | None:
        """Return the sequences of a batch with a number that is not finite; None for none.

        They are excluded once the layer has run: until then every batch has the same ones.
        """
        bad_B = None
        for state in state_TX:
            found_B = self._excluded.bad_rows(
                first, state.reshape(-1, self._length, state.shape[-1])
            )
            if found_B is not None:
                bad_B = found_B if bad_B is None else bad_B | found_B
        if bad_B is not None:
            self._late[first] = bad_B
        return bad_B


def mean_outputs(
    experts: StreamedExperts,
    sample: TokenSample,
    similarity: str,
    expert_done: Callable[[int], None] = lambda _done: None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Run every expert on the sampled tokens, and return its mean output, (E, H) float64.

    Parameters
    ----------
    experts
        Of an open layer.
    sample
        Filled by an observer.
    similarity
        Key of `method.similarity.SIMILARITIES`.
    expert_done
        Told the number of experts done.
    ranks
        Processes that each run their share of the experts.
    """
    hidden_nH, score_nE = sample.hidden_nH, sample.score_nE
    stack = experts.weights.stack
    mean_EH = torch.zeros(stack.count, stack.hidden).double()
    for expert in (own := ranks.own(stack.count)):
        loaded = experts.weights.load(expert)
        inner = loaded.down_HI.shape[1]
        means = MeanActivations(1, inner, similarity=similarity, device=hidden_nH.device)
        for start in range(0, len(hidden_nH), SAMPLE_ROWS):
            rows = slice(start, start + SAMPLE_ROWS)
            means.add(0, experts.inner(hidden_nH[rows], loaded), score_nE[rows, expert])
        # in float32 at least: rounding would blur experts that are nearly alike
        mean_EH[expert] = loaded.down_HI.float() @ means.mean_EI()[0].float()
        if loaded.down_bias_H is not None:
            mean_EH[expert] += means.mean_weight_E()[0] * loaded.down_bias_H.double()
        expert_done(expert + 1)
    for rank, (part_EH,) in enumerate(ranks.gather_tensors([mean_EH[own.start :: own.step]])):
        mean_EH[rank :: own.step] = part_EH
    return mean_EH
