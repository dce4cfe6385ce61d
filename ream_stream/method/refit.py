"""Refitting the down projections of the kept experts to what the original layer said.

Routing and inner activations of the compressed layer are fixed, so its output is
linear in the down projections. With a_e(x) = g_e(x) act(gate_e x) (up_e x) for a
token routed to expert e, r(x) what the compressed layer's output lacks to its
target, and D_e the transposed change of W_down,e::

    minimize   sum over x ||r(x) - sum over e a_e(x) D_e||^2 + sum over e l_e ||D_e||^2

with l_e = penalty * mean diagonal of A_e, A_e = sum over x of a_e^T a_e. The normal
equations are solved for all experts at once by conjugate gradients, preconditioned
by each expert's own A_e + l_e. Columns of D (hidden channels) share the matrix but
not the step sizes: they are problems of their own, so any set of columns can be
solved alone, with the same result, where not all fit in memory.

Cost: each iteration is one pass over the tokens, 2 I H operations a token and
expert for a D, 2 I H for a^T of it, which the last does without, and 4 I H for the
activations unless they were kept; the layer itself takes 6 I H. The sums are one more
pass (with 2 I I for A_e). Held are 4 x E I H numbers (change, residual, direction and
product) and E I I for the preconditioner; no array grows with the tokens. Where its
(E I)^2 numbers fit, `normal.NormalMatrix` takes the place of all passes but one.

Letters in shapes: T tokens of a batch, E experts, H hidden (or some of its
columns), I inner.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .normal_equations import NormalSums
from .preconditioning import PRECONDITIONERS, Preconditioner


class Operator(Protocol):
    """Multiplies a change D (E, I, H) by the normal matrix without the penalties."""

    def product(self, change_EIH: Tensor) -> Tensor:
        """Return sum over x of a_e^T (sum over f of a_f D_f), (E, I, H)."""
        ...

    def power(self, change_EIH: Tensor) -> Tensor:
        """Return sum over x of (sum over f of a_f D_f)^2, (H,) float64; half the work."""
        ...


class ConjugateGradients:
    """The iterations, one at a time: the caller makes the product in between.

    ::

        solver = ConjugateGradients(sums.target_EIH, penalty_E, preconditioner, energy)
        while not solver.finished:
            solver.advance(operator.product(solver.direction_EIH))

    Vectors are float32, inner products and step sizes float64. The objective
    falls by construction of the step sizes; nothing else is assumed of the
    operator than that it is linear, symmetric and not negative.

    Parameters
    ----------
    target_EIH
        B_e; overwritten, it becomes the residual of the normal equations.
    penalty_E
        l_e of each expert.
    preconditioner
        May be made for another penalty than `penalty_E`.
    energy
        Objective at D = 0.

    Raises
    ------
    ValueError
        The sums are not finite numbers.
    """

    def __init__(
        self,
        target_EIH: Tensor,
        penalty_E: Tensor,
        preconditioner: Preconditioner,
        energy: float,
    ) -> None:
        self.objectives = [energy]
        self.change_EIH = torch.zeros_like(target_EIH)
        self.direction_EIH = torch.zeros_like(target_EIH)
        self._residual_EIH = target_EIH
        self._penalty_E = penalty_E.tolist()
        self._preconditioner = preconditioner
        if not math.isfinite(energy) or not target_EIH.sum(dtype=torch.float64).isfinite():
            raise ValueError("the outputs to refit are not finite numbers")
        self._size_H = torch.zeros(
            target_EIH.shape[2], dtype=torch.float64, device=target_EIH.device
        )
        self._turn(torch.empty_like(target_EIH))

    @property
    def finished(self) -> bool:
        """Whether nothing is left to gain in any column."""
        return not bool((self._size_H > 0).any())

    def advance(self, product_EIH: Tensor) -> None:
        """Go along the direction, and choose the next.

        Parameters
        ----------
        product_EIH
            What `Operator.product` gives for the direction; overwritten.
        """
        curvature_H = torch.zeros_like(self._size_H)
        for expert, penalty in enumerate(self._penalty_E):
            direction_IH, product_IH = self.direction_EIH[expert], product_EIH[expert]
            product_IH.add_(direction_IH, alpha=penalty)
            curvature_H += _dot(direction_IH, product_IH)
        step_H = self._move(curvature_H)
        for expert in range(len(self._penalty_E)):
            self._residual_EIH[expert].addcmul_(product_EIH[expert], step_H, value=-1)
        self._turn(product_EIH)

    def arrive(self, power_H: Tensor) -> None:
        """Go along the direction for the last time.

        Parameters
        ----------
        power_H
            What `Operator.power` gives for the direction.
        """
        curvature_H = power_H.clone()
        for expert, penalty in enumerate(self._penalty_E):
            direction_IH = self.direction_EIH[expert]
            curvature_H += penalty * _dot(direction_IH, direction_IH)
        self._move(curvature_H)

    def _move(self, curvature_H: Tensor) -> Tensor:
        """Go to the lowest point along the direction; return how far in each column."""
        # a column without curvature or without residual has arrived
        moves_H = (curvature_H > 0) & (self._size_H > 0)
        step_H = torch.where(moves_H, self._size_H / curvature_H, 0)
        self.objectives.append(self.objectives[-1] - (step_H * self._size_H).sum().item())
        self._size_H = torch.where(moves_H, self._size_H, 0)
        step_H = step_H.float()
        for expert in range(len(self._penalty_E)):
            self.change_EIH[expert].addcmul_(self.direction_EIH[expert], step_H)
        return step_H

    def _turn(self, scratch_EIH: Tensor) -> None:
        """Choose the next direction, conjugate to all before; `scratch_EIH` is overwritten."""
        before_H = self._size_H
        size_H = torch.zeros_like(before_H)
        for expert, residual_IH in enumerate(self._residual_EIH):
            scratch_EIH[expert] = self._preconditioner.solve(expert, residual_IH)
            size_H += _dot(residual_IH, scratch_EIH[expert])
        keep32_H = torch.where(before_H > 0, size_H / before_H, 0).float()
        self.direction_EIH.mul_(keep32_H).add_(scratch_EIH)
        self._size_H = size_H


def _dot(left_IH: Tensor, right_IH: Tensor) -> Tensor:
    """Return the inner products of columns in float64."""
    product_H: Tensor = torch.linalg.vecdot(left_IH.double(), right_IH.double(), dim=0)
    return product_H


@dataclass(frozen=True, kw_only=True, slots=True)
class Refit:
    """A solution and how it was found."""

    change_EIH: Tensor
    """Change D_e of the transposed down projections, float32."""

    penalty: float
    """Ridge penalty of the solution, from the grid."""

    objectives: tuple[float, ...]
    """Objective before the first iteration and after each."""


def solve(
    sums: NormalSums,
    operator: Operator,
    *,
    penalty: float,
    iterations: int = 2,
    tolerance: float = 0.0,
    preconditioner: str = "blocks",
) -> Refit:
    """Solve for one penalty; ``sums.target_EIH`` is overwritten.

    Parameters
    ----------
    sums
        Over all tokens that `operator` runs over.
    operator
        Gives products, each in a pass over the tokens.
    penalty
        lambda, in shares of the mean diagonal of A_e.
    iterations
        Passes at most.
    tolerance
        Share of the objective at D = 0 that an iteration must gain for another.
    preconditioner
        Key of `preconditioning.PRECONDITIONERS`.

    Raises
    ------
    ValueError
        The penalty is negative, the sums are not finite or, with blocks, the
        penalty is 0 and the tokens do not determine D.
    """
    penalty_E = sums.penalties(penalty)
    solver = ConjugateGradients(
        sums.target_EIH,
        penalty_E,
        PRECONDITIONERS[preconditioner](sums, penalty_E),
        sums.energy.item(),
    )
    objectives = solver.objectives
    for left in reversed(range(iterations)):
        if solver.finished:
            break
        if left:
            solver.advance(operator.product(solver.direction_EIH))
        else:
            solver.arrive(operator.power(solver.direction_EIH))
        if objectives[-2] - objectives[-1] < tolerance * objectives[0]:
            break
    return Refit(
        change_EIH=solver.change_EIH,
        penalty=penalty,
        objectives=tuple(objectives),
    )


def first_direction(sums: NormalSums, penalty: float, preconditioner: str) -> Tensor:
    """Return each expert's own solution (E, I, H), where conjugate gradients begin."""
    helper = PRECONDITIONERS[preconditioner](sums, sums.penalties(penalty))
    direction_EIH = torch.empty_like(sums.target_EIH)
    for expert, target_IH in enumerate(sums.target_EIH):
        direction_EIH[expert] = helper.solve(expert, target_IH)
    return direction_EIH


class Misfit:
    """Squared error of outputs on held-back tokens, before and after a change."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)
        """Sums of ||r||^2, of r . p and of ||p||^2, for a residual r and its prediction p."""

    def add(self, residual_TH: Tensor, predicted_TH: Tensor) -> None:
        """Add the residual of a batch, and the prediction of it by the change (`predict`)."""
        residual, predicted = residual_TH.double().flatten(), predicted_TH.double().flatten()
        products = residual.dot(residual), residual.dot(predicted), predicted.dot(predicted)
        self.sums += torch.stack(products).cpu()

    @property
    def before(self) -> float:
        """Squared error without the change."""
        return self.sums[0].item()

    @property
    def share(self) -> float:
        """Share of the squared error that remains; 1 if there was none."""
        before, shared, power = self.sums.tolist()
        return (before - 2 * shared + power) / before if before else 1.0

    @property
    def best_share(self) -> float:
        """Remaining share if the change is multiplied by its best factor, at least 0."""
        before, shared, power = self.sums.tolist()
        return 1 - max(0.0, shared) ** 2 / (power * before) if before and power else 1.0


def select(errors: Mapping[float, float]) -> float | None:
    """Return the penalty that leaves least of the held-back error.

    Parameters
    ----------
    errors
        For each penalty, what is left of it.

    Returns
    -------
    float or None
        None if no solution is better than no change; of equals the larger.
    """
    best, least = None, 1.0
    for penalty in sorted(errors, reverse=True):
        if errors[penalty] < least:
            best, least = penalty, errors[penalty]
    return best
