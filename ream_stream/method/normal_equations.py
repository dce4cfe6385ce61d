"""Sums over routed tokens for the normal equations of a layer's down projections.

What they are for is in `refit`. With a_e(x) the gated activations of expert e, the
matrix of the equations has E x E blocks, sum over x of a_e^T a_f. Blocks of two
experts can be had in two ways: by a pass over the tokens for each product with the
matrix (`predict`, then `project`), or by gathering them once (`NormalMatrix`).

Letters in shapes: T tokens of a batch, R rows routed to one expert, E experts,
H hidden (or some of its columns), I inner.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

WIDENED_ROWS = 1024
"""Rows of activations that are converted to float32 at once."""


class RoutedActivations(NamedTuple):
    """The tokens of a batch, padding left out, that one expert serves."""

    expert: int
    """Index of the expert among the experts that may change."""

    token_R: Tensor
    """Rows of the expert's tokens in the batch, each at most once."""

    inner_RI: Tensor
    """The expert's activations, multiplied by the model's router coefficients.

    Products with them are made in their dtype and added up in float32. Rows beyond those
    of `token_R` are zeros, which some dtypes' products are faster with.
    """


def predict(batch: Iterable[RoutedActivations], change_EIH: Tensor, num_tokens: int) -> Tensor:
    """Return sum over e of a_e D_e for each token of a batch, (T, H)."""
    output_TH = change_EIH.new_zeros(num_tokens, change_EIH.shape[2])
    for expert, token_R, inner_RI in batch:
        part_RH = inner_RI @ change_EIH[expert].to(inner_RI.dtype)
        # rows of an expert are distinct: no two additions meet, so this is reproducible
        output_TH.index_add_(0, token_R, part_RH[: len(token_R)].to(output_TH.dtype))
    return output_TH


def project(batch: Iterable[RoutedActivations], value_TH: Tensor, total_EIH: Tensor) -> None:
    """Add a_e^T value over the tokens of a batch to the total of each expert."""
    for expert, token_R, inner_RI in batch:
        value_TH = value_TH.to(inner_RI.dtype)
        # rows of zeros are given any token's value
        padded_R = functional.pad(token_R, (0, len(inner_RI) - len(token_R)))
        add_product(total_EIH[expert], inner_RI, value_TH.index_select(0, padded_R))


def add_product(total_IX: Tensor, left_RI: Tensor, right_RX: Tensor) -> None:
    """Add left^T right, made in their dtype, to a float32 total (I, X) of (R, I) and (R, X)."""
    if left_RI.dtype == total_IX.dtype:
        total_IX.addmm_(left_RI.T, right_RX)
    else:
        total_IX += left_RI.T @ right_RX


class NormalSums:
    """Sums of the normal equations except the operator; additive over batches.

    For each expert e the blocks A_e = sum of a_e^T a_e, and B_e = sum of a_e^T r::

        count_E       tokens routed to e
        diagonal_EI   diagonal of A_e, float64
        gram_EII      A_e, float32; None without `blocks`
        target_EIH    B_e, float32
        energy        sum of ||r||^2, float64

    Parameters
    ----------
    num_experts, inner, hidden
        E, I and H, or the number of columns that are refitted.
    blocks
        Whether A_e is kept, for the preconditioner; its diagonal always is.
    device
        Where the sums are.
    """

    def __init__(
        self, num_experts: int, inner: int, hidden: int, *, blocks: bool, device: torch.device
    ) -> None:
        self.count_E = torch.zeros(num_experts, dtype=torch.int64)
        self.diagonal_EI = torch.zeros(num_experts, inner, dtype=torch.float64, device=device)
        self.gram_EII: Tensor | None = None
        if blocks:
            self.gram_EII = torch.zeros(num_experts, inner, inner, device=device)
        self.target_EIH = torch.zeros(num_experts, inner, hidden, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)

    def running(self) -> list[Tensor]:
        """Return the sums themselves, to be carried from batch to batch."""
        gram = [] if self.gram_EII is None else [self.gram_EII]
        return [self.count_E, self.diagonal_EI, *gram, *self.running_target()]

    def running_target(self) -> list[Tensor]:
        """Return B_e and the energy, those of the columns that they are summed for."""
        return [self.target_EIH, self.energy]

    @staticmethod
    def nbytes(num_experts: int, inner: int, hidden: int, *, blocks: bool) -> int:
        """Return the bytes of the sums."""
        wide = 8 + 4 * hidden + (4 * inner if blocks else 0)
        return num_experts * inner * wide

    def add(self, batch: Sequence[RoutedActivations], residual_TH: Tensor) -> None:
        """Add a batch; `residual_TH` is what its tokens' outputs lack to their targets."""
        for expert, token_R, inner_RI in batch:
            self.count_E[expert] += len(token_R)
            for some_RI in torch.split(inner_RI, WIDENED_ROWS):
                wide_RI = some_RI.float()
                self.diagonal_EI[expert] += torch.linalg.vecdot(wide_RI, wide_RI, dim=0)
                if self.gram_EII is not None:
                    # the diagonal apart, A_e only helps the iterations: rounding does not harm
                    # the solution, but float16 has not the range for sums of squares
                    own_RI = some_RI if some_RI.dtype == torch.bfloat16 else wide_RI
                    add_product(self.gram_EII[expert], own_RI, own_RI)
        self.add_target(batch, residual_TH)

    def add_target(self, batch: Sequence[RoutedActivations], residual_TH: Tensor) -> None:
        """Add to B_e and the energy alone: columns of the hidden size share all the rest."""
        residual_TH = residual_TH.float()
        project(batch, residual_TH, self.target_EIH)
        self.energy += residual_TH.square().sum(dtype=torch.float64)

    def turn_to(self, hidden: int) -> None:
        """Begin B_e and the energy anew, for other columns of the hidden size."""
        self.target_EIH = self.target_EIH.new_zeros(*self.target_EIH.shape[:2], hidden)
        self.energy = torch.zeros_like(self.energy)

    def penalties(self, penalty: float) -> Tensor:
        """Return l_e for each expert, float64; 0 where no token came.

        Raises
        ------
        ValueError
            The penalty is negative or not a finite number.
        """
        if not 0 <= penalty < math.inf:
            raise ValueError(f"the penalty of a refit is {penalty}; it must be 0 or more")
        return penalty * self.diagonal_EI.mean(dim=1)


class NormalMatrix:
    """All blocks sum of a_e^T a_f, gathered in one pass: (E I)^2 numbers in float32.

    Gathering takes I I (K + 1) operations a token and expert, for K experts a
    token; a product with the matrix 2 (E I)^2 H, whatever the tokens.

    Parameters
    ----------
    num_experts, inner
        E and I.
    device
        Where the matrix is.
    """

    def __init__(self, num_experts: int, inner: int, *, device: torch.device) -> None:
        self._inner = inner
        size = num_experts * inner
        # blocks above the diagonal and on it; those below stay zero
        self._matrix_NN = torch.zeros(size, size, device=device)

    def running(self) -> list[Tensor]:
        """Return the matrix itself, to be carried from batch to batch."""
        return [self._matrix_NN]

    @staticmethod
    def nbytes(num_experts: int, inner: int) -> int:
        """Return the bytes of the matrix."""
        return 4 * (num_experts * inner) ** 2

    @staticmethod
    def gathering_flop(tokens: int, top_k: int, inner: int) -> int:
        """Return the operations of gathering it."""
        return tokens * top_k * (top_k + 1) * inner**2

    @staticmethod
    def product_flop(num_experts: int, inner: int, hidden: int) -> int:
        """Return the operations of a product with it."""
        return 2 * (num_experts * inner) ** 2 * hidden

    def add(self, batch: Sequence[RoutedActivations], num_tokens: int) -> None:
        """Add a batch of `num_tokens`."""
        batch = sorted(batch, key=lambda served: served.expert)
        wide = [inner_RI[: len(token_R)].float() for _, token_R, inner_RI in batch]
        place_T = self._matrix_NN.new_zeros(num_tokens, dtype=torch.int64)
        shared_T = self._matrix_NN.new_zeros(num_tokens, dtype=torch.bool)
        for first, (expert, token_R, _) in enumerate(batch):
            place_T[token_R] = torch.arange(len(token_R), device=place_T.device)
            shared_T.zero_()[token_R] = True
            for second in range(first, len(batch)):
                other, other_R, _ = batch[second]
                both_R = shared_T[other_R]
                block_II = self._rows(expert)[:, self._columns(other)]
                block_II.addmm_(wide[first][place_T[other_R[both_R]]].T, wide[second][both_R])

    def __call__(self, change_EIH: Tensor) -> Tensor:
        """Return the products of the matrix with D, (E, I, H)."""
        change_NH = change_EIH.flatten(0, 1)
        product_NH = torch.zeros_like(change_NH)
        for expert in range(len(change_EIH)):
            own = self._columns(expert)
            strip_IN = self._rows(expert)[:, own.start :]
            product_NH[own] += strip_IN @ change_NH[own.start :]
            product_NH[own.stop :] += strip_IN[:, self._inner :].T @ change_NH[own]
        return product_NH.view_as(change_EIH)

    def _columns(self, expert: int) -> slice:
        return slice(expert * self._inner, (expert + 1) * self._inner)

    def _rows(self, expert: int) -> Tensor:
        return self._matrix_NN[self._columns(expert)]
