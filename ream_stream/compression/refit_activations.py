"""Expert activations of a layer that is refitted, on the calibration tokens.

The compressed layer runs once. Its experts' activations are kept, or the expert inputs, from
which each pass computes them; the refit needs nothing else of the layer. When the layer runs
for the next one, the new down projections are applied to the kept activations, so gate and
up projections are not computed again.

Letters in shapes: B sequences of a batch, L tokens of a sequence, S sequences, T tokens
of a batch, R rows of one expert, K experts a token, H hidden, I inner.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ream_stream.calibration.tokens import Tokens
from ream_stream.errors import UsageError
from ream_stream.method.normal_equations import RoutedActivations
from ream_stream.method.rng import generator
from ream_stream.model.batch_store import BatchStore
from ream_stream.model.experts import MAX_ROWS, Loaded, StreamedExperts
from ream_stream.model.finite import ExcludedSequences
from ream_stream.model.ranks.group import Relay
from ream_stream.model.streamed_model import Batch
from ream_stream.planning.refit_memory import HELD_BACK_SHARE


def held_back(tokens: Tokens, seed: int) -> Tensor:
    """Draw the held-back sequences of a refit, (S,) bool; they are the same in every layer.

    Each domain gives the same share, so that the judgement does not depend on the draw.

    Raises
    ------
    UsageError
        Each domain has only one sequence.
    """
    stream = generator(seed, 0, "held back")
    held_S = torch.zeros(tokens.num_sequences, dtype=torch.bool)
    for domain in range(len(tokens.domains)):
        own_S = torch.nonzero(tokens.domain_S == domain).squeeze(1)
        drawn_S = own_S[torch.randperm(len(own_S), generator=stream)]
        # at least one sequence of a domain, but not its only one, which the fit needs
        held_S[drawn_S[: max(len(own_S) > 1, round(HELD_BACK_SHARE * len(own_S)))]] = True
    if not held_S.any():
        raise UsageError(
            "--refit holds back a tenth of the calibration sequences to judge by, and there is "
            "but one of each domain; give more"
        )
    return held_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """Some tokens of a batch with the activations of their experts."""

    served: list[RoutedActivations]
    """Activations of the tokens of each expert that may change."""

    tokens: int
    """Number of tokens, T."""

    number: int
    """Number of the batch."""

    residual: Callable[[], Tensor]
    """Reads the residual, target minus output, (T, H)."""


class _Rows(NamedTuple):
    """Some rows of a batch with their experts and router coefficients."""

    row_R: Tensor
    index_RK: Tensor
    weight_RK: Tensor


class _Visit(NamedTuple):
    """The tokens of a set of rows that are routed to one expert."""

    which: int
    """Index of the set of rows among several `_Rows`."""

    expert: int
    loaded: Loaded

    token_R: Tensor
    """Positions of the expert's tokens among the rows."""

    row_R: Tensor
    """Positions of the expert's tokens in the batch."""

    gate_R1: Tensor
    """Router coefficients that multiply the expert's outputs."""


class CachedActivations:
    """Activations of a compressed layer's experts, and the residuals of their outputs.

    For each batch of this process: `expect` it, run the layer with `outputs` in place of its
    experts, and `add` the residual. When the layer is open with new down projections, run the
    same batches in order with `again` in place of its experts.

    Parameters
    ----------
    experts
        Experts of the open compressed layer.
    changing
        Experts that may be refitted, by their number after compression.
    held_S
        Held-back sequences from `held_back`.
    mask_SL
        0 for tokens that do not count; None if all do.
    excluded
        Sequences that neither fit nor judge the refit; sequences that overflow here join them.
    layer
        Position of the layer.
    inputs
        Store of expert inputs, from which each pass computes activations; None to keep
        the activations.
    residuals
        Store of residuals.
    relay
        Carries sums over all batches.
    keeps_fitted
        Whether residuals of the fitted tokens are kept too, to be read again.
    """

    def __init__(
        self,
        experts: StreamedExperts,
        changing: Sequence[int],
        held_S: Tensor,
        mask_SL: Tensor | None,
        excluded: ExcludedSequences,
        layer: int,
        inputs: BatchStore | None,
        residuals: BatchStore,
        relay: Relay,
        *,
        keeps_fitted: bool = True,
    ) -> None:
        self._experts: StreamedExperts | None = experts
        self.changing = changing
        self._held_S, self._mask_SL = held_S, mask_SL
        self._excluded, self._layer = excluded, layer
        self._inputs, self._residuals, self._keeps_fitted = inputs, residuals, keeps_fitted
        self._relay = relay
        self._batch: Batch
        self._first = self._repeated = 0
        self._numbers: list[int] = []
        self._given: tuple[Tensor, Tensor, Tensor]
        self._now: list[_Rows]
        self._sent: list[list[_Rows]] = []
        self._served: list[list[dict[int, RoutedActivations]]] = []
        self.output_TH = torch.empty(0)
        """Summed expert outputs of the last batch, float32."""
        self._energies = torch.zeros(2, dtype=torch.float64)

    @property
    def energy(self) -> float:
        """Sum of squared targets over the held-back tokens."""
        return self._energies[0].item()

    @property
    def residual_energy(self) -> float:
        """Sum of squared residuals over the held-back tokens."""
        return self._energies[1].item()

    @property
    def experts(self) -> StreamedExperts:
        """Experts of the layer, while it is open."""
        assert self._experts is not None
        return self._experts

    def reopened(self, experts: StreamedExperts | None) -> None:
        """Set the experts of the layer that was opened again; None if it was closed."""
        self._experts = experts

    def expect(self, number: int, first: int, batch: Batch) -> None:
        """Announce batch `number`, whose first sequence is number `first`."""
        self._batch, self._first = batch, first
        self._numbers.append(number)

    def finish(self) -> None:
        """Take in what the other processes added, once all batches are."""
        self._relay.finish([self._energies])

    def outputs(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Replace the experts: return their outputs, (T, H); zeros for padding."""
        self._given = (hidden_TH, index_TK, weight_TK.float())
        self._now = self._split()
        served: list[dict[int, RoutedActivations]] = [{} for _ in self._now]
        self._served.append(served)
        return self._put_out(self._now, hidden_TH, served)

    def again(self, hidden_TH: Tensor, _index_TK: Tensor, _weight_TK: Tensor) -> Tensor:
        """Replace experts with new down projections, batch after batch."""
        number, self._repeated = self._repeated, self._repeated + 1
        made = self._served[number] if self._inputs is None else [{}, {}]
        return self._put_out(self._sent[number], hidden_TH, made)

    def add(self, residual_TH: Tensor) -> Portion:
        """Keep the residual of the batch; return its fitted tokens.

        Parameters
        ----------
        residual_TH
            Target minus output, float32.

        Raises
        ------
        NumbersError
            More sequences overflow than `MOST_EXCLUDED` allows.
        """
        hidden_TH, number = self._given[0], len(self._sent)
        bad_B = self._excluded.bad_rows(
            self._first, residual_TH.view(*self._batch.input_ids_BL.shape, -1)
        )
        if bad_B is not None:
            self._excluded.note(self._layer, self._first, bad_B)
            self._now = self._split()
            self._served[number] = self._serve(self._now, hidden_TH, range(self.experts.count))
        fitted, held = self._now
        held_RH = residual_TH.index_select(0, held.row_R)
        target_RH = held_RH + self.output_TH.index_select(0, held.row_R)
        squares = [each.square().sum(dtype=torch.float64) for each in (target_RH, held_RH)]
        with self._relay.turn(self._numbers[-1], [self._energies]):
            self._energies += torch.stack(squares).cpu()
        fitted_RH = residual_TH.index_select(0, fitted.row_R)
        kept_RH = torch.cat([held_RH, fitted_RH]) if self._keeps_fitted else held_RH
        self._residuals.put(number, kept_RH.to(hidden_TH.dtype))
        portion = Portion(
            served=self._that_change(self._served[number][0]),
            tokens=len(fitted.row_R),
            number=self._numbers[-1],
            residual=lambda: fitted_RH,
        )
        if self._inputs is not None:
            self._inputs.put(number, hidden_TH)
            self._served[number] = [{}, {}]
        self._sent.append(self._now)
        return portion

    def fitted(self) -> Iterator[Portion]:
        """Yield, batch by batch, the tokens that the solution is fitted to."""
        for number, (fitted, held) in enumerate(self._sent):
            first = len(held.row_R)
            yield self._portion(number, 0, slice(first, first + len(fitted.row_R)))

    def held(self) -> Iterator[Portion]:
        """Yield, batch by batch, the tokens that are held back."""
        for number, (_, held) in enumerate(self._sent):
            yield self._portion(number, 1, slice(0, len(held.row_R)))

    def _portion(self, number: int, which: int, place: slice) -> Portion:
        device, rows = self.experts.weights.device, self._sent[number][which]
        served = self._served[number][which]
        if self._inputs is not None:
            hidden_TH = self._inputs.get(number).to(device)
            (served,) = self._serve([rows], hidden_TH, self.changing)
        return Portion(
            served=self._that_change(served),
            tokens=len(rows.row_R),
            number=self._numbers[number],
            residual=lambda: self._residuals.get(number)[place].to(device).float(),
        )

    def _that_change(self, served: Mapping[int, RoutedActivations]) -> list[RoutedActivations]:
        """Return activations of experts that may change, numbered by position in `changing`."""
        return [
            served[expert]._replace(expert=place)
            for place, expert in enumerate(self.changing)
            if expert in served
        ]

    def _split(self) -> list[_Rows]:
        """Return the fitted tokens of the batch, and its held-back tokens."""
        sequences, length = self._batch.input_ids_BL.shape
        batch = slice(self._first, self._first + sequences)
        kept_B = self._excluded.kept(self._first, sequences)
        held_T = self._held_S[batch].repeat_interleave(length)
        real_T = torch.ones_like(held_T)
        if self._mask_SL is not None:
            real_T = self._mask_SL[batch].reshape(-1).bool()
        if kept_B is not None:
            real_T = real_T & kept_B.repeat_interleave(length)
        hidden_TH, index_TK, weight_TK = self._given

        def rows(which_T: Tensor) -> _Rows:
            row_R = torch.nonzero(which_T).squeeze(1).to(hidden_TH.device)
            return _Rows(
                row_R, index_TK.index_select(0, row_R), weight_TK.index_select(0, row_R)
            )

        return [rows(real_T & ~held_T), rows(real_T & held_T)]

    def _visits(self, sent: Sequence[_Rows], some: Iterable[int]) -> Iterator[_Visit]:
        """Yield each of the given experts with its rows, set after set of rows."""
        experts = self.experts
        slots = [dict(experts.dispatch(rows.index_RK, experts.count)) for rows in sent]
        for expert in some:
            if not any(expert in each for each in slots):
                continue
            loaded = experts.weights.load(expert)
            for which, (rows, each) in enumerate(zip(sent, slots, strict=True)):
                if expert in each:
                    token_R = each[expert] // rows.index_RK.shape[1]
                    gate_R1 = rows.weight_RK.reshape(-1)[each[expert], None]
                    yield _Visit(which, expert, loaded, token_R, rows.row_R[token_R], gate_R1)

    def _make(self, visit: _Visit, hidden_TH: Tensor) -> RoutedActivations:
        """Return the activations of an expert, multiplied by the router coefficients."""
        inner_RI = self.experts.activations(visit.loaded, hidden_TH, visit.row_R)
        inner_RI[: len(visit.row_R)] *= visit.gate_R1.to(inner_RI.dtype)
        return RoutedActivations(visit.expert, visit.token_R, inner_RI)

    def _serve(
        self, sent: Sequence[_Rows], hidden_TH: Tensor, some: Iterable[int]
    ) -> list[dict[int, RoutedActivations]]:
        """Return, for each set of rows, the activations of the given experts."""
        served: list[dict[int, RoutedActivations]] = [{} for _ in sent]
        for visit in self._visits(sent, some):
            served[visit.which][visit.expert] = self._make(visit, hidden_TH)
        return served

    def _put_out(
        self,
        sent: Sequence[_Rows],
        hidden_TH: Tensor,
        served: Sequence[dict[int, RoutedActivations]],
    ) -> Tensor:
        """Sum the outputs of all experts in `output_TH`; compute missing activations.

        New activations are added to `served`.
        """
        self.output_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        for visit in self._visits(sent, range(self.experts.count)):
            found = served[visit.which]
            if visit.expert not in found:
                found[visit.expert] = self._make(visit, hidden_TH)
            self._add_outputs(visit, found[visit.expert].inner_RI)
        return self.output_TH.to(hidden_TH.dtype)

    def _add_outputs(self, visit: _Visit, inner_RI: Tensor) -> None:
        loaded, row_R = visit.loaded, visit.row_R
        # equal sizes: products of a few remaining rows are slow
        size = -(-len(inner_RI) // -(-len(inner_RI) // MAX_ROWS))
        parts = zip(torch.split(row_R, size), torch.split(inner_RI, size), strict=False)
        for rows, part_RI in parts:
            output_RH = functional.linear(part_RI, loaded.down_HI)[: len(rows)]
            self.output_TH.index_add_(0, rows, output_RH.float())
        if loaded.down_bias_H is not None:
            bias_RH = visit.gate_R1 * loaded.down_bias_H.float()
            self.output_TH.index_add_(0, row_R, bias_RH)
