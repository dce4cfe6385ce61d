"""A layer's refit in the run: passes over the calibration set for `method.refit`.

The compressed layer is run as far as its experts once. What they are given, and what
their outputs lack to the target, is kept; from then on each pass needs the experts alone.

Letters in shapes: B sequences of a batch, L tokens of a sequence, S sequences, T tokens
of a batch, R rows of one expert, K experts a token, E kept experts, H hidden, I inner.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .calibration.tokens import Tokens
from .checkpoint.header import DTYPES
from .errors import UsageError
from .events import Refitted
from .experts import StreamedExperts
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
class _Routing:
    """Where the tokens of a batch go: those that are fitted, those held back, padding."""

    index_TK: Tensor
    weight_TK: Tensor
    fitted: int
    tokens: int


class RoutedTokens:
    """What a compressed layer's experts are given, and what their outputs lack.

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
    inputs, lacking
        Where what is large is kept: (T, H) of each batch.
    keeps_activations
        Whether activations are kept as well, and not computed again in each pass.
    """

    def __init__(
        self,
        experts: StreamedExperts,
        changing: Sequence[int],
        held_S: Tensor,
        mask_SL: Tensor | None,
        excluded: Excluded,
        layer: int,
        inputs: Kept,
        lacking: Kept,
        *,
        keeps_activations: bool = False,
    ) -> None:
        self.experts, self.changing = experts, changing
        self._place = {expert: place for place, expert in enumerate(changing)}
        self._held_S, self._mask_SL = held_S, mask_SL
        self._excluded, self._layer = excluded, layer
        self._inputs, self._lacking = inputs, lacking
        self._routing: list[_Routing] = []
        self._keeps_activations = keeps_activations
        self._served: dict[tuple[int, int], list[Served]] = {}
        self._first = 0
        self.energy = self.lacking = 0.0
        """Squares of the targets of the tokens held back, and of what is lacking to them."""

    def __len__(self) -> int:
        return len(self._routing)

    def add(
        self,
        batch: Batch,
        given: tuple[Tensor, Tensor, Tensor],
        target_TH: Tensor,
        output_TH: Tensor,
    ) -> None:
        """Keep the next batch.

        Parameters
        ----------
        batch
            Its tokens.
        given
            What the experts were called with.
        target_TH, output_TH
            What their sum should be, and what it is.

        Raises
        ------
        NumbersError
            More sequences overflow than may be.
        """
        hidden_TH, index_TK, weight_TK = given
        target_TH = target_TH.to(hidden_TH.device).float()
        lacking_TH = target_TH - output_TH.float()
        self._leave_out(batch, lacking_TH)
        held_T, real_T = self._held(batch)
        fitted_R, held_R, padding_R = (
            torch.nonzero(which_T).squeeze(1).to(hidden_TH.device)
            for which_T in (real_T & ~held_T, real_T & held_T, ~real_T)
        )
        row_T, number = torch.cat([fitted_R, held_R, padding_R]), len(self._routing)
        self.energy += target_TH[held_R].square().sum(dtype=torch.float64).item()
        self.lacking += lacking_TH[held_R].square().sum(dtype=torch.float64).item()
        self._inputs.put(number, hidden_TH.index_select(0, row_T))
        self._lacking.put(number, lacking_TH.index_select(0, row_T))
        self._routing.append(
            _Routing(
                index_TK=index_TK.index_select(0, row_T),
                weight_TK=weight_TK.index_select(0, row_T).float(),
                fitted=len(fitted_R),
                tokens=len(fitted_R) + len(held_R),
            )
        )

    def _leave_out(self, batch: Batch, lacking_TH: Tensor) -> None:
        """Exclude the sequences of the next batch that overflow in the compressed layer."""
        lacking_BLH = lacking_TH.view(*batch.input_ids_BL.shape, -1)
        bad_B = self._excluded.bad_rows(self._first, lacking_BLH)
        if bad_B is not None:
            self._excluded.note(self._layer, self._first, bad_B)

    def _held(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return which tokens of the next batch are held back, and which count at all."""
        sequences, length = batch.input_ids_BL.shape
        rows = slice(self._first, self._first + sequences)
        kept_B = self._excluded.kept(self._first, sequences)
        self._first += sequences
        held_T = self._held_S[rows].repeat_interleave(length)
        real_T = torch.ones_like(held_T)
        if self._mask_SL is not None:
            real_T = self._mask_SL[rows].reshape(-1).bool()
        if kept_B is not None:
            real_T = real_T & kept_B.repeat_interleave(length)
        return held_T, real_T

    def fitted(self) -> Iterator["Portion"]:
        """Yield, batch by batch, the tokens that the solution sees."""
        for number, routing in enumerate(self._routing):
            yield self._portion(number, slice(0, routing.fitted))

    def held(self) -> Iterator["Portion"]:
        """Yield, batch by batch, the tokens that are held back."""
        for number, routing in enumerate(self._routing):
            yield self._portion(number, slice(routing.fitted, routing.tokens))

    def _portion(self, number: int, rows: slice) -> "Portion":
        routing, device = self._routing[number], self.experts.weights.device
        index_TK = routing.index_TK[rows]
        served = self._served.get((number, rows.start))
        if served is None:
            hidden_TH = self._inputs.get(number)[rows].to(device)
            served = self._serve(hidden_TH, index_TK, routing.weight_TK[rows])
            if self._keeps_activations:
                self._served[number, rows.start] = served
        return Portion(
            served=served,
            tokens=len(index_TK),
            lacking=lambda: self._lacking.get(number)[rows].to(device),
        )

    def _serve(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> list[Served]:
        """Return the activations of each expert that may be changed, and has tokens."""
        top_k, weight_S, served = index_TK.shape[1], weight_TK.reshape(-1), []
        for expert, slot_R in self.experts.dispatch(index_TK, self.experts.count):
            if expert in self._place:
                token_R = slot_R // top_k
                inner_RI = self.experts.activations(expert, hidden_TH, token_R)
                inner_RI[: len(token_R)] *= weight_S[slot_R, None].to(inner_RI.dtype)
                served.append(Served(self._place[expert], token_R, inner_RI))
        return served


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """Some tokens of a batch, as their experts see them."""

    served: list[Served]
    """The tokens of each expert that may be changed."""

    tokens: int
    """How many there are, T."""

    lacking: Callable[[], Tensor]
    """Reads what the output lacks to the target, (T, H) float32."""


class LayerRefit:
    """The refit of one layer: `steps` makes it, then the results can be asked for.

    The penalty is the one whose first direction leaves least on the held-back tokens, so
    trying several costs no pass over the others.

    Parameters
    ----------
    tokens
        All batches were added.
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
        self._weights = tokens.experts.weights
        self._stored = DTYPES[self._weights.stack.dtype]
        self._matrix: NormalMatrix | None = None
        self._sums: NormalSums | None = None
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
        trials = len(self._method.refit_lambda)
        return trials + self._solver.column_blocks * (2 + iterations)

    def down(self, place: int) -> Tensor:
        """Return the new down projection (H, I) of a refitted expert, as it is stored."""
        count = len(self._tokens.changing)
        parts = range(self._solver.column_blocks)
        return torch.cat([self._results.get(part * count + place) for part in parts])

    def steps(self) -> Iterator[None]:
        """Solve; yield after each batch of each pass."""
        for part, columns in enumerate(self._columns()):
            sums = yield from self._gather(columns)
            if part == 0:
                yield from self._choose(sums, columns)
            penalty = select(self._tried)
            if penalty is None:
                return
            found = yield from solve(
                sums,
                self._pass if self._matrix is None else self._product,
                penalty=penalty,
                iterations=self._method.refit_iterations,
                preconditioner=self._solver.preconditioner,
            )
            self._note(found)
            count = len(self._tokens.changing)
            for place in range(count):
                down_HI = self._round(place, found.change_EIH[place], columns)
                self._results.put(part * count + place, down_HI)
            yield from self._judge(self._misfit, found.change_EIH, columns)

    def _columns(self) -> list[slice]:
        hidden, parts = self._weights.stack.hidden, self._solver.column_blocks
        # rounded up, so that the first is the largest
        bounds = [-(-hidden * part // parts) for part in range(parts + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def _gather(self, columns: slice) -> Generator[None, None, NormalSums]:
        """Sum over the fitted tokens; what all columns share is summed for the first only."""
        count, inner = len(self._tokens.changing), self._weights.stack.inner
        width, device = columns.stop - columns.start, self._weights.device
        first = self._sums is None
        if self._sums is None:
            blocks = self._solver.preconditioner == "blocks"
            self._sums = NormalSums(count, inner, width, blocks=blocks, device=device)
            if self._solver.gathered:
                self._matrix = NormalMatrix(count, inner, device=device)
        else:
            self._sums.turn_to(width)
        for portion in self._tokens.fitted():
            lacking_TH = portion.lacking()[:, columns]
            if first:
                self._sums.add(portion.served, lacking_TH)
                if self._matrix is not None:
                    self._matrix.add(portion.served, portion.tokens)
            else:
                self._sums.add_target(portion.served, lacking_TH)
            yield
        return self._sums

    def _pass(self, change_EIH: Tensor) -> Generator[None, None, Tensor]:
        """Return the products of all activations with a change, in a pass over the tokens."""
        total_EIH = torch.zeros_like(change_EIH)
        for portion in self._tokens.fitted():
            predicted_TH = predict(portion.served, change_EIH, portion.tokens)
            project(portion.served, predicted_TH, total_EIH)
            yield
        return total_EIH

    def _product(self, change_EIH: Tensor) -> Generator[None, None, Tensor]:
        """Return the same from the products that were gathered."""
        assert self._matrix is not None
        yield
        return self._matrix(change_EIH)

    def _choose(self, sums: NormalSums, columns: slice) -> Iterator[None]:
        """Try the first direction of each penalty, at its best length."""
        for penalty in self._method.refit_lambda:
            direction_EIH = first_direction(sums, penalty, self._solver.preconditioner)
            misfit = Misfit()
            yield from self._judge(misfit, direction_EIH, columns)
            self._tried[penalty] = misfit.best_share

    def _note(self, found: Refit) -> None:
        """Add up the objective of all columns, iteration by iteration."""
        curve = torch.tensor(found.objectives, dtype=torch.float64)
        # what has arrived early stays where it is
        missing = len(self._objectives) - len(curve)
        self._objectives += torch.cat([curve, curve[-1:].expand(missing)])

    def _round(self, place: int, change_IH: Tensor, columns: slice) -> Tensor:
        """Return the new down projection as it is stored; the change becomes what that is."""
        down_HI = self._weights.load(self._tokens.changing[place]).down_HI
        old_HI = down_HI[columns].float()
        new_HI = (old_HI + change_IH.T).to(self._stored)
        change_IH.copy_((new_HI.float() - old_HI).T)
        return new_HI

    def _judge(self, misfit: Misfit, change_EIH: Tensor, columns: slice) -> Iterator[None]:
        """Measure what a change leaves of the error on the tokens that are held back."""
        for portion in self._tokens.held():
            lacking_TH = portion.lacking()[:, columns]
            predicted_TH = predict(portion.served, change_EIH, portion.tokens)
            misfit.add(lacking_TH, predicted_TH)
            yield
