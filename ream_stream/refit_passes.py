"""A layer's refit in the run: passes over the calibration set for `method.refit`.

The compressed layer is run once. Its experts' activations are kept, or what they are given
to make them again in each pass; from then on nothing else of the layer is needed.

Letters in shapes: B sequences of a batch, L tokens of a sequence, S sequences, T tokens
of a batch, R rows of one expert, K experts a token, E kept experts, H hidden, I inner.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .calibration.tokens import Tokens
from .checkpoint.header import DTYPES
from .errors import UsageError
from .events import Refitted
from .experts import MAX_ROWS, Loaded, StreamedExperts
from .finite import Excluded
from .kept import Kept
from .method.normal import NormalMatrix, NormalSums, Served, predict, project
from .method.refit import Misfit, Refit, first_direction, select, solve
from .model import Batch
from .refit_budget import HELD_BACK_SHARE, Solver
from .seeds import generator
from .settings import Method


def held_back(tokens: Tokens, seed: int) -> Tensor:
    """Draw the sequences that a refit is judged by, (S,) bool; the same in every layer.

    Of each domain the same share, so that the judgement does not hang on the draw.

    Raises
    ------
    UsageError
        There is one sequence of each domain.
    """
    stream = generator(seed, 0, "held back")
    held_S = torch.zeros(tokens.num_sequences, dtype=torch.bool)
    for domain in range(len(tokens.domains)):
        own_S = torch.nonzero(tokens.domain_S == domain).squeeze(1)
        drawn_S = own_S[torch.randperm(len(own_S), generator=stream)]
        # of a few at least one, of one alone none: it is needed to fit
        held_S[drawn_S[: max(len(own_S) > 1, round(HELD_BACK_SHARE * len(own_S)))]] = True
    if not held_S.any():
        raise UsageError(
            "--refit holds back a tenth of the calibration sequences to judge by, and there is "
            "but one of each domain; give more"
        )
    return held_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """Some tokens of a batch, as their experts see them."""

    served: list[Served]
    """The tokens of each expert that may be changed."""

    tokens: int
    """How many there are, T."""

    lacking: Callable[[], Tensor]
    """Reads what the output lacks to the target, (T, H)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Where some tokens of a batch are in it, and where they go."""

    row_R: Tensor
    index_RK: Tensor
    weight_RK: Tensor

    def of(self, hidden_TH: Tensor) -> Tensor:
        """Return their states, of those of the batch."""
        return hidden_TH.index_select(0, self.row_R)


class RoutedTokens:
    """What a compressed layer's experts are given, and what their outputs lack.

    For each batch: `expect` it, run the layer with `outputs` in the place of its experts,
    and `add` what the outputs lack.

    Parameters
    ----------
    experts
        Of the compressed layer, which is open.
    changing
        Those that may be refitted, by their number after compression.
    held_S
        From `held_back`.
    mask_SL
        0 for tokens that do not count; None if all do.
    excluded
        Sequences that are neither fitted nor judged by; what overflows here joins them.
    layer
        Which layer it is.
    inputs
        Where states are kept, so that activations can be made from them in each pass; None
        to keep the activations.
    lacking
        Where what outputs lack is kept.
    keeps_fitted
        Whether that is asked for again of the tokens that are fitted.
    """

    def __init__(
        self,
        experts: StreamedExperts,
        changing: Sequence[int],
        held_S: Tensor,
        mask_SL: Tensor | None,
        excluded: Excluded,
        layer: int,
        inputs: Kept | None,
        lacking: Kept,
        *,
        keeps_fitted: bool = True,
    ) -> None:
        self.experts, self.changing = experts, changing
        self._place = {expert: place for place, expert in enumerate(changing)}
        self._held_S, self._mask_SL = held_S, mask_SL
        self._excluded, self._layer = excluded, layer
        self._inputs, self._lacking, self._keeps_fitted = inputs, lacking, keeps_fitted
        self._batch: Batch
        self._first = self._count = 0
        self._given: tuple[Tensor, Tensor, Tensor]
        self._now: list[_Rows]
        self._sent: list[list[_Rows]] = []
        self._served: list[list[list[Served]]] = []
        self.output_TH = torch.empty(0)
        """What the experts gave for the batch that was run last, float32."""
        self.energy = self.lacking = 0.0
        """Squares of the targets of the tokens held back, and of what is lacking to them."""

    def expect(self, batch: Batch) -> None:
        """Tell the coming batch."""
        self._batch = batch
        self._first += self._count
        self._count = len(batch.input_ids_BL)

    def outputs(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Stand in for the experts: return their outputs, (T, H); zeros for padding."""
        self._given = (hidden_TH, index_TK, weight_TK.float())
        self._now = self._split()
        self.output_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        served = self._serve(self._now, [rows.of(hidden_TH) for rows in self._now], all_of=True)
        self._served.append(served)
        return self.output_TH.to(hidden_TH.dtype)

    def add(self, lacking_TH: Tensor) -> Portion:
        """Keep what the outputs lack to the target; return the tokens that are fitted.

        Parameters
        ----------
        lacking_TH
            Target less output, float32.

        Raises
        ------
        NumbersError
            More sequences overflow than may be.
        """
        hidden_TH, number = self._given[0], len(self._sent)
        bad_B = self._excluded.bad_rows(
            self._first, lacking_TH.view(*self._batch.input_ids_BL.shape, -1)
        )
        if bad_B is not None:
            self._excluded.note(self._layer, self._first, bad_B)
            self._now = self._split()
            states = [rows.of(hidden_TH) for rows in self._now]
            self._served[number] = self._serve(self._now, states)
        fitted, held = self._now
        held_RH = lacking_TH.index_select(0, held.row_R)
        self.lacking += held_RH.square().sum(dtype=torch.float64).item()
        target_RH = held_RH + self.output_TH.index_select(0, held.row_R)
        self.energy += target_RH.square().sum(dtype=torch.float64).item()
        fitted_RH = lacking_TH.index_select(0, fitted.row_R)
        kept_RH = torch.cat([held_RH, fitted_RH]) if self._keeps_fitted else held_RH
        self._lacking.put(number, kept_RH.to(hidden_TH.dtype))
        portion = Portion(
            served=self._served[number][0],
            tokens=len(fitted.row_R),
            lacking=lambda: fitted_RH,
        )
        if self._inputs is not None:
            self._inputs.put(number, hidden_TH)
            self._served[number] = [[], []]
        self._sent.append(self._now)
        return portion

    def fitted(self) -> Iterator[Portion]:
        """Yield, batch by batch, the tokens that the solution sees."""
        for number, (fitted, held) in enumerate(self._sent):
            first = len(held.row_R)
            yield self._portion(number, 0, slice(first, first + len(fitted.row_R)))

    def held(self) -> Iterator[Portion]:
        """Yield, batch by batch, the tokens that are held back."""
        for number, (_, held) in enumerate(self._sent):
            yield self._portion(number, 1, slice(0, len(held.row_R)))

    def _portion(self, number: int, which: int, lacking: slice) -> Portion:
        device, rows = self.experts.weights.device, self._sent[number][which]
        served = self._served[number][which]
        if self._inputs is not None:
            (served,) = self._serve([rows], [rows.of(self._inputs.get(number).to(device))])
        return Portion(
            served=served,
            tokens=len(rows.row_R),
            lacking=lambda: self._lacking.get(number)[lacking].to(device).float(),
        )

    def _split(self) -> list[_Rows]:
        """Return the tokens of the batch that are fitted, and those held back."""
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
            index_RK, weight_RK = (
                each.index_select(0, row_R) for each in (index_TK, weight_TK)
            )
            return _Rows(row_R=row_R, index_RK=index_RK, weight_RK=weight_RK)

        return [rows(real_T & ~held_T), rows(real_T & held_T)]

    def _serve(
        self, sent: Sequence[_Rows], states: Sequence[Tensor], *, all_of: bool = False
    ) -> list[list[Served]]:
        """Return for each of some rows the activations of each expert that may be changed.

        With `all_of`, the outputs of all experts are added up in `output_TH` on the way.
        """
        experts, served = self.experts, [list[Served]() for _ in sent]
        slots = [dict(experts.dispatch(rows.index_RK, experts.count)) for rows in sent]
        for expert in range(experts.count) if all_of else self.changing:
            if not any(expert in each for each in slots):
                continue
            loaded, place = experts.weights.load(expert), self._place.get(expert)
            for rows, hidden_RH, each, found in zip(sent, states, slots, served, strict=True):
                if expert not in each:
                    continue
                token_R = each[expert] // rows.index_RK.shape[1]
                inner_RI = experts.activations(loaded, hidden_RH, token_R)
                gate_R1 = rows.weight_RK.reshape(-1)[each[expert], None]
                inner_RI[: len(token_R)] *= gate_R1.to(inner_RI.dtype)
                if all_of:
                    self._put_out(loaded, rows.row_R[token_R], inner_RI, gate_R1)
                if place is not None:
                    found.append(Served(place, token_R, inner_RI))
        return served

    def _put_out(
        self, loaded: Loaded, row_R: Tensor, inner_RI: Tensor, gate_R1: Tensor
    ) -> None:
        """Add what an expert gives, for activations times their gates, to the outputs."""
        parts = zip(torch.split(row_R, MAX_ROWS), torch.split(inner_RI, MAX_ROWS), strict=False)
        for rows, part_RI in parts:
            output_RH = functional.linear(part_RI, loaded.down_HI)[: len(rows)]
            self.output_TH.index_add_(0, rows, output_RH.float())
        if loaded.down_bias_H is not None:
            self.output_TH.index_add_(0, row_R, gate_R1 * loaded.down_bias_H.float())


class _Passes:
    """Products with the equations' matrix, each in a pass over the tokens that are fitted."""

    def __init__(self, tokens: RoutedTokens) -> None:
        self._tokens = tokens

    def product(self, change_EIH: Tensor) -> Generator[None, None, Tensor]:
        total_EIH = torch.zeros_like(change_EIH)
        for portion in self._tokens.fitted():
            predicted_TH = predict(portion.served, change_EIH, portion.tokens)
            project(portion.served, predicted_TH, total_EIH)
            yield
        return total_EIH

    def power(self, change_EIH: Tensor) -> Generator[None, None, Tensor]:
        power_H = change_EIH.new_zeros(change_EIH.shape[2], dtype=torch.float64)
        for portion in self._tokens.fitted():
            predicted_TH = predict(portion.served, change_EIH, portion.tokens)
            power_H += predicted_TH.square_().sum(dim=0, dtype=torch.float64)
            yield
        return power_H


class _Gathered:
    """The same from the products of activations, gathered on the way."""

    def __init__(self, matrix: NormalMatrix) -> None:
        self.matrix = matrix

    def product(self, change_EIH: Tensor) -> Generator[None, None, Tensor]:
        yield
        return self.matrix(change_EIH)

    def power(self, change_EIH: Tensor) -> Generator[None, None, Tensor]:
        yield
        return (change_EIH * self.matrix(change_EIH)).sum(dim=(0, 1), dtype=torch.float64)


class LayerRefit:
    """The refit of one layer: `add` every batch, then `steps` makes it.

    The penalty is the one whose first direction leaves least on the held-back tokens, so
    trying several costs no pass over the others.

    Parameters
    ----------
    tokens
        Batches are added to both.
    method
        Penalties and iterations.
    solver
        How it is solved.
    results
        Where the new down projections are kept.
    """

    def __init__(
        self, tokens: RoutedTokens, method: Method, solver: Solver, results: Kept
    ) -> None:
        self._tokens, self._method, self._solver = tokens, method, solver
        self._results = results
        self._weights = weights = tokens.experts.weights
        # codes are made of what is solved for, in float32
        plain = weights.stack.scheme == "plain"
        self._solved = DTYPES[weights.stack.dtype] if plain else torch.float32
        count, inner = len(tokens.changing), weights.stack.inner
        self._columns = self._cut()
        self._sums = NormalSums(
            count,
            inner,
            self._columns[0].stop,
            blocks=solver.preconditioner == "blocks",
            device=weights.device,
        )
        self._operator: _Passes | _Gathered = _Passes(tokens)
        if solver.gathered:
            self._operator = _Gathered(NormalMatrix(count, inner, device=weights.device))
        self._tried: dict[float, float] = {}
        self._misfit = Misfit()
        self._objectives = torch.zeros(method.refit_iterations + 1, dtype=torch.float64)

    @property
    def helps(self) -> bool:
        """Whether what was found is better, on the held-back tokens, than no change."""
        return select(self._tried) is not None and self._misfit.share < 1

    @property
    def outcome(self) -> Refitted:
        """What came of it."""
        tokens, curve = self._tokens, self._objectives
        return Refitted(
            penalty=select(self._tried) if self.helps else None,
            lacking=tokens.lacking / tokens.energy if tokens.energy else 0.0,
            left=self._misfit.share if self.helps else 1.0,
            tried=tuple(self._tried.items()),
            residuals=tuple((curve / curve[0]).tolist()) if self.helps else (),
        )

    @property
    def passes(self) -> int:
        """How often `steps` goes through the batches, at most."""
        iterations = 0 if self._solver.gathered else self._method.refit_iterations
        return self._solver.column_blocks * (2 + iterations)

    def down(self, place: int) -> Tensor:
        """Return the new down projection (H, I) of a refitted expert, to be stored."""
        count = len(self._tokens.changing)
        parts = range(self._solver.column_blocks)
        return torch.cat([self._results.get(part * count + place) for part in parts])

    def add(self, portion: Portion) -> None:
        """Sum over the tokens of a batch that are fitted."""
        self._sums.add(portion.served, portion.lacking()[:, self._columns[0]])
        if isinstance(self._operator, _Gathered):
            self._operator.matrix.add(portion.served, portion.tokens)

    def steps(self) -> Iterator[None]:
        """Solve; yield after each batch of each pass."""
        for part, columns in enumerate(self._columns):
            if part == 0:
                yield from self._choose(columns)
            else:
                yield from self._turn_to(columns)
            penalty = select(self._tried)
            if penalty is None:
                return
            found = yield from solve(
                self._sums,
                self._operator,
                penalty=penalty,
                iterations=self._method.refit_iterations,
                preconditioner=self._solver.preconditioner,
            )
            self._note(found)
            count = len(self._tokens.changing)
            for place in range(count):
                down_HI = self._round(place, found.change_EIH[place], columns)
                self._results.put(part * count + place, down_HI)
            yield from self._judge({self._misfit: found.change_EIH}, columns)

    def _cut(self) -> list[slice]:
        hidden, parts = self._weights.stack.hidden, self._solver.column_blocks
        # rounded up, so that the first is the largest
        bounds = [-(-hidden * part // parts) for part in range(parts + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def _turn_to(self, columns: slice) -> Iterator[None]:
        """Sum what other columns do not share, in a pass."""
        self._sums.turn_to(columns.stop - columns.start)
        for portion in self._tokens.fitted():
            self._sums.add_target(portion.served, portion.lacking()[:, columns])
            yield

    def _choose(self, columns: slice) -> Iterator[None]:
        """Try the first direction of each penalty, at its best length."""
        misfits = {penalty: Misfit() for penalty in self._method.refit_lambda}
        directions = {
            misfit: first_direction(self._sums, penalty, self._solver.preconditioner)
            for penalty, misfit in misfits.items()
        }
        yield from self._judge(directions, columns)
        self._tried = {penalty: misfit.best_share for penalty, misfit in misfits.items()}

    def _note(self, found: Refit) -> None:
        """Add up the objective of all columns, iteration by iteration."""
        curve = torch.tensor(found.objectives, dtype=torch.float64)
        # what has arrived early stays where it is
        missing = len(self._objectives) - len(curve)
        self._objectives += torch.cat([curve, curve[-1:].expand(missing)])

    def _round(self, place: int, change_IH: Tensor, columns: slice) -> Tensor:
        """Return the new down projection; the change becomes what is stored of it.

        Scales that columns share are taken of these columns alone, which is exact unless
        they are solved in parts.
        """
        down_HI = self._weights.load(self._tokens.changing[place]).down_HI
        old_HI = down_HI[columns].float()
        new_HI = (old_HI + change_IH.T).to(self._solved)
        change_IH.copy_((self._weights.stack.stored_down(new_HI) - old_HI).T)
        return new_HI

    def _judge(self, changes: Mapping[Misfit, Tensor], columns: slice) -> Iterator[None]:
        """Measure what changes leave of the error on the tokens that are held back."""
        for portion in self._tokens.held():
            lacking_TH = portion.lacking()[:, columns]
            for misfit, change_EIH in changes.items():
                predicted_TH = predict(portion.served, change_EIH, portion.tokens)
                misfit.add(lacking_TH, predicted_TH)
            yield
