"""What makes the iterations of a refit few: each expert's own equations, solved exactly.

Experts are coupled only by tokens they share. Leaving that out, expert e is left
with the matrix A_e + l_e (`normal.NormalSums`), whose inverse is a good guess.

Letters in shapes: E experts, H hidden (or some of its columns), I inner.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .normal_equations import NormalSums

WELL_CONDITIONED = 1e4
"""Bound on trace(A_e) / l_e, I / lambda, and thereby on the condition number."""


class Preconditioner(Protocol):
    """Something near the inverse of each expert's A_e + l_e, symmetric and positive."""

    def solve(self, expert: int, residual_IH: Tensor) -> Tensor:
        """Return about (A_e + l_e)^-1 residual; zeros for an expert without tokens."""
        ...


class Diagonal:
    """Only the diagonals: E I numbers, and more iterations."""

    def __init__(self, sums: NormalSums, penalty_E: Tensor) -> None:
        diagonal_EI = sums.diagonal_EI + penalty_E[:, None]
        inverse_EI = torch.where(diagonal_EI > 0, 1 / diagonal_EI, 0)
        self._inverse_EI1 = inverse_EI.float()[:, :, None]

    def solve(self, expert: int, residual_IH: Tensor) -> Tensor:
        """Divide by the diagonal."""
        return residual_IH * self._inverse_EI1[expert]


class Cholesky:
    """Exact inverses of A_e + l_e, or of their factors, that take the place of the blocks.

    Inverted, because products are ten times as fast as triangular solutions. The inverse is
    surely positive in float32 up to `WELL_CONDITIONED`; beyond, with X the factor's inverse,
    X^T X is, for twice the operations. The lower triangles of ``sums.gram_EII`` are
    overwritten, with the diagonals. The upper ones stay, so that the sums can be factorised
    again for another penalty, but no more tokens can be added.

    Raises
    ------
    ValueError
        The sums were gathered without blocks, or the penalty is 0 and an
        expert's activations do not determine its down projection.
    """

    def __init__(self, sums: NormalSums, penalty_E: Tensor) -> None:
        if sums.gram_EII is None:
            raise ValueError("the sums hold no blocks to factorise; use the diagonal")
        self._factor_EII = sums.gram_EII
        self._whole: dict[int, bool] = {}
        self._reached = [trace > 0 for trace in sums.diagonal_EI.sum(dim=1).tolist()]
        for expert, penalty in enumerate(penalty_E.tolist()):
            if self._reached[expert]:
                self._factorise(expert, sums.diagonal_EI[expert], penalty)

    @staticmethod
    def working_bytes(inner: int) -> int:
        """Return the transient bytes: a block in float64, its triangle, factor and square."""
        return 4 * 8 * inner**2

    def _factorise(self, expert: int, diagonal_I: Tensor, penalty: float) -> None:
        stored_II = self._factor_EII[expert]
        upper_II = stored_II.double().triu(1)
        block_II = upper_II + upper_II.T
        # sums in float32 are good to this: smaller eigenvalues, negative ones too, are rounding
        noise = diagonal_I.sum().item() * torch.finfo(torch.float32).eps
        shift = max(penalty, noise) if penalty else 0.0
        while True:
            block_II.diagonal().copy_(diagonal_I + shift)
            factor_II, info = torch.linalg.cholesky_ex(block_II)
            if not info.item() and factor_II.diagonal().square().min() > noise / 2:
                break
            if not shift < diagonal_I.sum().item():
                raise ValueError(f"the activations of kept expert {expert} are not finite")
            if not penalty:
                raise ValueError(
                    f"the tokens of kept expert {expert} do not determine the outputs of its "
                    f"{len(diagonal_I)} neurons: more tokens, or a penalty above 0"
                )
            # the factor only helps the iterations: the solution does not depend on it
            shift *= 10
        whole = bool(diagonal_I.sum() < WELL_CONDITIONED * shift)
        if whole:
            inverse_II = torch.cholesky_inverse(factor_II)
        else:
            unit_II = torch.eye(len(diagonal_I), dtype=torch.float64, device=factor_II.device)
            inverse_II = torch.linalg.solve_triangular(factor_II, unit_II, upper=False)
        self._whole[expert] = whole
        stored_II.copy_(stored_II.triu(1) + inverse_II.tril())

    def solve(self, expert: int, residual_IH: Tensor) -> Tensor:
        """Solve with the inverse."""
        if not self._reached[expert]:
            return torch.zeros_like(residual_IH)
        inverse_II = self._factor_EII[expert].tril()
        if self._whole[expert]:
            return (inverse_II + inverse_II.tril(-1).T) @ residual_IH
        return inverse_II.T @ (inverse_II @ residual_IH)


PRECONDITIONERS: Mapping[str, Callable[[NormalSums, Tensor], Preconditioner]] = {
    "blocks": Cholesky,
    "diagonal": Diagonal,
}
"""Preconditioners by name; each is built from the sums and the penalty l_e of each expert."""
