"""A layer's refit in the run: passes over the calibration set for `method.refit`.

Letters in shapes: T tokens of a batch, E kept experts, H hidden, I inner.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ream_stream.checkpoint.header import torch_dtype
from ream_stream.events import RefitResult
from ream_stream.method.normal_equations import (
    WIDENED_ROWS,
    NormalMatrix,
    NormalSums,
    predict,
    project,
)
from ream_stream.method.refit import Misfit, Refit, first_direction, select, solve
from ream_stream.model.batch_store import BatchStore
from ream_stream.model.ranks.group import Relay
from ream_stream.planning.schedule import Solver
from ream_stream.settings import Method

from .refit_activations import CachedActivations, Portion


class _Passes:
    """Products with the normal matrix, each computed in a pass over the fitted tokens."""

    def __init__(
        self, tokens: CachedActivations, relay: Relay, batch_done: Callable[[], None]
    ) -> None:
        self._tokens, self._relay, self._batch_done = tokens, relay, batch_done

    def product(self, change_EIH: Tensor) -> Tensor:
        total_EIH = torch.zeros_like(change_EIH)
        for portion in self._tokens.fitted():
            predicted_TH = predict(portion.served, change_EIH, portion.tokens)
            with self._relay.turn(portion.number, [total_EIH]):
                project(portion.served, predicted_TH, total_EIH)
            self._batch_done()
        self._relay.finish([total_EIH])
        return total_EIH

    def power(self, change_EIH: Tensor) -> Tensor:
        power_H = change_EIH.new_zeros(change_EIH.shape[2], dtype=torch.float64)
        for portion in self._tokens.fitted():
            predicted_TH = predict(portion.served, change_EIH, portion.tokens)
            with self._relay.turn(portion.number, [power_H]):
                for some_RH in torch.split(predicted_TH, WIDENED_ROWS):
                    power_H += torch.linalg.vecdot(some_RH, some_RH, dim=0)
            self._batch_done()
        self._relay.finish([power_H])
        return power_H


class _ExplicitOperator:
    """Products with the normal matrix, accumulated while tokens were added; no pass."""

    def __init__(self, matrix: NormalMatrix) -> None:
        self.matrix = matrix

    def product(self, change_EIH: Tensor) -> Tensor:
        return self.matrix(change_EIH)

    def power(self, change_EIH: Tensor) -> Tensor:
        return (change_EIH * self.matrix(change_EIH)).sum(dim=(0, 1), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitSolution:
    """Result of a layer's refit."""

    outcome: RefitResult
    """Errors and penalties of the refit as numbers."""

    places: Mapping[int, int]
    """Positions in `results` of the refitted experts, by their number after compression."""

    parts: int
    """Number of parts that the hidden channels are solved in."""

    results: BatchStore
    """New down projections, part after part."""

    @property
    def helps(self) -> bool:
        """Whether the refit has a lower error on the held-back tokens than no change."""
        return self.outcome.penalty is not None

    def down(self, place: int) -> Tensor:
        """Return the new down projection (H, I) of a refitted expert, before it is encoded."""
        count = len(self.places)
        return torch.cat([self.results.get(n * count + place) for n in range(self.parts)])


class LayerRefit:
    """The refit of one layer: `add` every batch, then `solve`.

    The chosen penalty is the one whose first direction leaves the least error on the
    held-back tokens, so several penalties need no additional pass over the fitted tokens.

    Parameters
    ----------
    tokens
        Cached activations; each batch is added to them and to the refit.
    method
        Method with the penalties and the number of iterations.
    solver
        Solver of the equations.
    results
        Store of the new down projections.
    relay
        Carries sums over all batches.
    batch_done
        Called after each batch of each pass.
    """

    def __init__(
        self,
        tokens: CachedActivations,
        method: Method,
        solver: Solver,
        results: BatchStore,
        relay: Relay,
        batch_done: Callable[[], None] = lambda: None,
    ) -> None:
        self._tokens, self._method, self._solver = tokens, method, solver
        self._results, self._relay, self._batch_done = results, relay, batch_done
        self._weights = weights = tokens.experts.weights
        # codes are encoded from the float32 solution
        plain = weights.stack.scheme == "plain"
        self._solved = torch_dtype(weights.stack.dtype) if plain else torch.float32
        count, inner = len(tokens.changing), weights.stack.inner
        self._columns = solver.columns(weights.stack.hidden)
        self._sums = NormalSums(
            count,
            inner,
            self._columns[0].stop,
            blocks=solver.preconditioner == "blocks",
            device=weights.device,
        )
        self._operator: _Passes | _ExplicitOperator = _Passes(tokens, relay, batch_done)
        if solver.gathered:
            self._operator = _ExplicitOperator(
                NormalMatrix(count, inner, device=weights.device)
            )
        self._tried: dict[float, float] = {}
        self._misfit = Misfit()
        self._objectives = torch.zeros(method.refit_iterations + 1, dtype=torch.float64)

    def _found(self) -> RefitSolution:
        tokens, curve = self._tokens, self._objectives
        helps = self._helps
        outcome = RefitResult(
            penalty=select(self._tried) if helps else None,
            error_before=tokens.residual_energy / tokens.energy if tokens.energy else 0.0,
            remaining_error=self._misfit.share if helps else 1.0,
            tried=tuple(self._tried.items()),
            residuals=tuple((curve / curve[0]).tolist()) if helps else (),
        )
        places = {expert: place for place, expert in enumerate(tokens.changing)}
        parts = self._solver.column_blocks
        return RefitSolution(outcome=outcome, places=places, parts=parts, results=self._results)

    @property
    def _helps(self) -> bool:
        """Whether the solution has a lower error on the held-back tokens than no change."""
        return select(self._tried) is not None and self._misfit.share < 1

    @property
    def passes(self) -> int:
        """Most passes over the batches that `solve` makes."""
        iterations = 0 if self._solver.gathered else self._method.refit_iterations
        return self._solver.column_blocks * (2 + iterations)

    def add(self, portion: Portion) -> None:
        """Add the fitted tokens of a batch to the normal equations."""
        residual_TH = portion.residual(self._columns[0])
        with self._relay.turn(portion.number, self._sums.running()):
            self._sums.add(portion.served, residual_TH)
        if isinstance(self._operator, _ExplicitOperator):
            with self._relay.turn(portion.number, self._operator.matrix.running()):
                self._operator.matrix.add(portion.served, portion.tokens)

    def finish(self) -> None:
        """Take in what the other processes added, once all batches are."""
        self._relay.finish(self._sums.running())
        if isinstance(self._operator, _ExplicitOperator):
            self._relay.finish(self._operator.matrix.running())

    def solve(self) -> RefitSolution:
        """Choose the penalty, solve every column, and measure the held-back error.

        Raises
        ------
        ValueError
            The sums are not finite.
        """
        for part, columns in enumerate(self._columns):
            if part == 0:
                self._choose(columns)
            else:
                self._turn_to(columns)
            penalty = select(self._tried)
            if penalty is None:
                break
            found = solve(
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
            self._judge({self._misfit: found.change_EIH}, columns)
        return self._found()

    def _turn_to(self, columns: slice) -> None:
        """Sum the right-hand sides of other columns in a pass."""
        self._sums.turn_to(columns.stop - columns.start)
        for portion in self._tokens.fitted():
            residual_TH = portion.residual(columns)
            with self._relay.turn(portion.number, self._sums.running_target()):
                self._sums.add_target(portion.served, residual_TH)
            self._batch_done()
        self._relay.finish(self._sums.running_target())

    def _choose(self, columns: slice) -> None:
        """Try the first direction of each penalty, scaled to the lowest error."""
        misfits = {penalty: Misfit() for penalty in self._method.refit_lambda}
        directions = {
            misfit: first_direction(self._sums, penalty, self._solver.preconditioner)
            for penalty, misfit in misfits.items()
        }
        self._judge(directions, columns)
        self._tried = {penalty: misfit.best_share for penalty, misfit in misfits.items()}

    def _note(self, found: Refit) -> None:
        """Add up the objective of all columns, iteration by iteration."""
        curve = torch.tensor(found.objectives, dtype=torch.float64)
        # a solution that converged early keeps its last objective
        missing = len(self._objectives) - len(curve)
        self._objectives += torch.cat([curve, curve[-1:].expand(missing)])

    def _round(self, place: int, change_IH: Tensor, columns: slice) -> Tensor:
        """Return the new down projection; replace the change by its value after storage.

        Quantization scales are computed from these columns alone, which is exact unless
        columns are solved in parts.
        """
        down_HI = self._weights.load(self._tokens.changing[place]).down_HI
        old_HI = down_HI[columns].float()
        new_HI = (old_HI + change_IH.T).to(self._solved)
        change_IH.copy_((self._weights.stack.stored_down(new_HI) - old_HI).T)
        return new_HI

    def _judge(self, changes: Mapping[Misfit, Tensor], columns: slice) -> None:
        """Add the remaining error of each change on the held-back tokens to its misfit."""
        for portion in self._tokens.held():
            residual_TH = portion.residual(columns)
            for misfit, change_EIH in changes.items():
                predicted_TH = predict(portion.served, change_EIH, portion.tokens)
                with self._relay.turn(portion.number, [misfit.sums]):
                    misfit.add(residual_TH, predicted_TH)
            self._batch_done()
        for misfit in changes:
            self._relay.finish([misfit.sums])
