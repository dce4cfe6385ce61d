"""Expert activations of a layer that is refitted, on the calibration tokens.

The compressed layer runs once, or once for each block of its experts. Their activations are
kept, or the expert inputs, from which each pass computes them; the refit needs nothing else of
the layer. When the layer runs for the next one, the new down projections are applied to the
kept activations, so gate and up projections are not computed again.

Letters in shapes: B sequences of a batch, L tokens of a sequence, S sequences, T tokens
of a batch, R rows of one expert, K experts a token, H hidden, I inner.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ream_stream.method.normal_equations import RoutedActivations
from ream_stream.model.batch_store import BatchStore
from ream_stream.model.experts import MAX_ROWS, Loaded, StreamedExperts
from ream_stream.model.finite import ExcludedSequences
from ream_stream.model.ranks.group import Relay
from ream_stream.model.streamed_model import Batch

from .column_store import ColumnStore
from .stored_activations import Served, StoredActivations, changing_only, only_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """Some tokens of a batch with the activations of their experts."""

    served: list[RoutedActivations]
    """Activations of the tokens of each expert that may change."""

    tokens: int
    """Number of tokens, T."""

    number: int
    """Number of the batch."""

    residual: Callable[[slice], Tensor]
    """Reads some columns of the residual, target minus output, float32."""


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
    experts, and `add` the residual. With `stored`, run these batches with `collecting` in place
    of the experts before, block after block. When the layer is open with new down projections,
    run the same batches in order with `again` in place of its experts.

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
    stored
        Stores of the activations; None to keep them as they are, or to compute them again.
    residuals
        Store of the targets by batch; residuals of the fitted tokens take their places.
    held
        Store of the residuals of the held-back tokens.
    relay
        Carries sums over all batches.
    keeps_fitted
        Whether residuals of the fitted tokens are kept, to be read again.
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
        residuals: ColumnStore,
        held: BatchStore,
        relay: Relay,
        *,
        stored: StoredActivations | None = None,
        keeps_fitted: bool = True,
    ) -> None:
        self._experts: StreamedExperts | None = experts
        self.changing = changing
        self._held_S, self._mask_SL = held_S, mask_SL
        self._excluded, self._layer = excluded, layer
        self._inputs, self._stored, self._keeps_fitted = inputs, stored, keeps_fitted
        self._residuals, self._held, self._relay = residuals, held, relay
        self._batch: Batch
        self._place = self._first = self._repeated = 0
        self._numbers: dict[int, int] = {}
        self._given: tuple[Tensor, Tensor, Tensor]
        self._sent: dict[int, list[_Rows]] = {}
        self._served: dict[int, list[Served]] = {}
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

    def turn_to_downs(self) -> None:
        """Load down projections alone from now on, if all activations are stored."""
        if self._stored is not None:
            self.experts.weights.turn_to(range(self.experts.count), "down")

    def expect(self, place: int, number: int, first: int, batch: Batch) -> None:
        """Announce batch `number`, whose first sequence is number `first`.

        What is kept of it has its place among the batches of this process.
        """
        self._place, self._first, self._batch = place, first, batch
        self._numbers[place] = number

    def finish(self) -> None:
        """Take in what the other processes added, once all batches are."""
        self._relay.finish([self._energies])

    def collecting(self, block: int, some: range) -> Callable[..., Tensor]:
        """Return what replaces the experts to store the activations of a block of them."""
        stored = self._stored
        assert stored is not None

        def collect(hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
            if self._place not in self._sent:
                self._given = (hidden_TH, index_TK, weight_TK.float())
                self._sent[self._place] = self._split()
            served = self._serve(self._sent[self._place], hidden_TH, some)
            stored.put(self._place, block, served)
            return torch.zeros_like(hidden_TH)

        return collect

    def outputs(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Replace the experts: return their outputs, (T, H); zeros for padding."""
        self._given = (hidden_TH, index_TK, weight_TK.float())
        if self._stored is not None:
            return self.stored_outputs()
        self._sent[self._place] = sent = self._split()
        served: list[Served] = [{} for _ in sent]
        self._served[self._place] = served
        return self._put_out(sent, hidden_TH, served)

    def stored_outputs(self) -> Tensor:
        """Return the outputs of the experts from their stored activations, (T, H)."""
        served = self._made(self._place)
        self._served[self._place] = served
        weights = self.experts.weights
        tokens, hidden = self._batch.input_ids_BL.numel(), weights.stack.hidden
        like_TH = torch.empty(1, 1, dtype=weights.dtype, device=weights.device)
        return self._put_out(self._sent[self._place], like_TH.expand(tokens, hidden), served)

    def again(self, hidden_TH: Tensor, _index_TK: Tensor, _weight_TK: Tensor) -> Tensor:
        """Replace experts with new down projections, batch after batch."""
        place, self._repeated = self._repeated, self._repeated + 1
        return self._put_out(self._sent[place], hidden_TH, self._made(place))

    def _made(self, place: int) -> list[Served]:
        """Return the activations of a batch as far as they are kept, for each set of rows."""
        if self._stored is None:
            return self._served.get(place) or [{}, {}]
        device = self.experts.weights.device
        return [self._stored.get(place, which, device) for which in range(2)]

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
        place, first = self._place, self._first
        bad_B = self._excluded.bad_rows(
            first, residual_TH.view(*self._batch.input_ids_BL.shape, -1)
        )
        if bad_B is not None:
            self._excluded.note(self._layer, first, bad_B)
            self._leave_out(place, bad_B)
        fitted, held = self._sent[place]
        held_RH = residual_TH.index_select(0, held.row_R)
        target_RH = held_RH + self.output_TH.index_select(0, held.row_R)
        squares = [each.square().sum(dtype=torch.float64) for each in (target_RH, held_RH)]
        with self._relay.turn(self._numbers[place], [self._energies]):
            self._energies += torch.stack(squares).cpu()
        fitted_RH = residual_TH.index_select(0, fitted.row_R)
        dtype = self.experts.weights.dtype
        if self._keeps_fitted:
            self._residuals.put(place, fitted_RH.to(dtype))
        else:
            self._residuals.drop(place)
        if len(held_RH):
            self._held.put(place, held_RH.to(dtype))
        portion = Portion(
            served=changing_only(self._served[place][0], self.changing),
            tokens=len(fitted.row_R),
            number=self._numbers[place],
            residual=lambda columns: fitted_RH[:, columns],
        )
        if self._inputs is not None:
            self._inputs.put(place, self._given[0])
        if self._inputs is not None or self._stored is not None:
            del self._served[place]
        return portion

    def _leave_out(self, place: int, bad_B: Tensor) -> None:
        """Leave sequences out of the rows of a batch and of the activations on them."""
        if self._stored is None:
            self._sent[place] = sent = self._split()
            self._served[place] = self._serve(sent, self._given[0], range(self.experts.count))
            return
        length = self._batch.input_ids_BL.shape[1]
        for which, rows in enumerate(self._sent[place]):
            bad_T = bad_B.to(rows.row_R.device).repeat_interleave(length)
            kept_R = ~bad_T[rows.row_R]
            self._stored.keep_rows(place, which, kept_R)
            self._sent[place][which] = _Rows(*(each[kept_R] for each in rows))
            self._served[place][which] = only_rows(self._served[place][which], kept_R)

    def fitted(self) -> Iterator[Portion]:
        """Yield, batch by batch, the tokens that the solution is fitted to."""
        for place in self._sent:
            yield self._portion(place, 0)

    def held(self) -> Iterator[Portion]:
        """Yield, batch by batch, the tokens that are held back."""
        for place in self._sent:
            yield self._portion(place, 1)

    def _portion(self, place: int, which: int) -> Portion:
        device, rows = self.experts.weights.device, self._sent[place][which]
        if not len(rows.row_R):  # nothing is read; sums are carried past the batch
            served = {}
        elif self._stored is not None:
            served = self._stored.get(place, which, device)
        elif self._inputs is None:
            served = self._served[place][which]
        else:
            hidden_TH = self._inputs.get(place).to(device)
            (served,) = self._serve([rows], hidden_TH, self.changing)

        def residual(columns: slice) -> Tensor:
            if which == 0:
                found_TX = self._residuals.columns(place, columns)
            elif not len(rows.row_R):
                found_TX = torch.empty(0, columns.stop - columns.start)
            else:
                found_TX = self._held.get(place)[:, columns]
            return found_TX.to(device).float()

        return Portion(
            served=changing_only(served, self.changing),
            tokens=len(rows.row_R),
            number=self._numbers[place],
            residual=residual,
        )

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
    ) -> list[Served]:
        """Return, for each set of rows, the activations of the given experts."""
        served: list[Served] = [{} for _ in sent]
        for visit in self._visits(sent, some):
            served[visit.which][visit.expert] = self._make(visit, hidden_TH)
        return served

    def _put_out(
        self, sent: Sequence[_Rows], hidden_TH: Tensor, served: Sequence[Served]
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
