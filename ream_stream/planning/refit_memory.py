"""What a refit holds in memory, and how it is solved so that it fits.

Letters: T tokens of a batch, E kept experts, K experts a token, H hidden, I inner.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.header import ITEM_BYTES
from ream_stream.method.normal_equations import NormalMatrix, NormalSums
from ream_stream.method.preconditioning import Cholesky
from ream_stream.model.experts import MAX_ROWS
from ream_stream.settings import Settings

from .schedule import Solver

HELD_BACK_SHARE = 0.1
"""Share of the sequences that are held back from the refit to judge it."""

KEPT = "kept for the refit"
"""Memory part: targets, inputs and results of a refit; with 0 bytes they are on disk."""

ACTIVATIONS = "activations for the refit"
"""Memory part: cached activations of a refit; with 0 bytes each pass computes them."""

MOST_COLUMN_BLOCKS = 64
"""Most column blocks; more blocks each cost a pass over the tokens and save little."""


WIDE_COST = {4: 1, 2: 3}
"""Relative time of a float32 product to one in the run's dtype, by bytes of its numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitMemory:
    """Bytes of a refit by what they depend on."""

    settings: Settings
    """Settings of the run."""

    stack: ExpertStack
    """Experts of a source layer."""

    top_k: int
    """Number of experts that the router selects for a token, K."""

    itemsize: int
    """Bytes of a number in the run's dtype."""

    def solvers(self, tokens: int, *, remakes: bool = False) -> Iterator[Solver]:
        """Yield the ways to solve for `tokens`, from the least time to the least memory.

        With `remakes` each pass over the tokens makes activations again.
        """
        gathered = self.gathered_flop(tokens)
        # it is in float32, passes are in the run's dtype
        if gathered * WIDE_COST[self.itemsize] < self.pass_flop(tokens, remakes=remakes):
            yield Solver(preconditioner="blocks", gathered=True, column_blocks=1)
        for preconditioner in ("blocks", "diagonal"):
            blocks = 1
            while blocks <= min(MOST_COLUMN_BLOCKS, self.stack.hidden):
                yield Solver(
                    preconditioner=preconditioner, gathered=False, column_blocks=blocks
                )
                blocks *= 2

    def gathered_flop(self, tokens: int) -> int:
        """Return the operations that gather all products of activations, and iterate."""
        inner, hidden = self.stack.inner, self.stack.hidden
        product = NormalMatrix.product_flop(self.settings.experts, inner, hidden)
        gathering = NormalMatrix.gathering_flop(tokens, self.top_k, inner)
        return gathering + self.settings.method.refit_iterations * product

    def pass_flop(self, tokens: int, *, remakes: bool) -> int:
        """Return the operations of all iterations that pass over the tokens."""
        iterations = self.settings.method.refit_iterations
        # the last one only predicts; gate and up are two products
        products = 2 * iterations - 1 + (2 * iterations if remakes else 0)
        return products * tokens * self.top_k * 2 * self.stack.hidden * self.stack.inner

    def kept(self, tokens: int) -> int:
        """Return what is kept of `tokens` calibration tokens, and the results."""
        hidden, inner = self.stack.hidden, self.stack.inner
        # codes are made of float32
        stored = ITEM_BYTES[self.stack.dtype] if self.stack.scheme == "plain" else 4
        numbers = self.settings.experts * hidden * inner
        # targets, then their residuals in the same store
        return tokens * hidden * self.itemsize + numbers * stored

    def inputs(self, tokens: int) -> int:
        """Return what the experts are given, or give; it is kept where activations are not."""
        return tokens * self.stack.hidden * self.itemsize

    def activations(self, tokens: int) -> int:
        """Return what the activations of all tokens take, some rows of zeros with them."""
        return int(1.05 * tokens * self.top_k * self.stack.inner * self.itemsize)

    def routing(self, tokens: int) -> int:
        """Return what the experts of all tokens and their coefficients take."""
        # the place of a token, and of each expert its number, its gate and the token again
        return tokens * (8 + self.top_k * (8 + 4 + 8))

    def answering(self, tokens: int, solver: Solver) -> int:
        """Return what comes and goes where what was kept gives the layer's new outputs."""
        # added up in float32, and in the run's dtype
        outputs = tokens * self.stack.hidden * (4 + self.itemsize)
        return outputs + self._activations(tokens, solver)

    def solving(self, solver: Solver, tokens: int, before: int) -> int:
        """Return what comes and goes while a layer is refitted.

        Parameters
        ----------
        solver
            How it is done.
        tokens
            Of a batch, T.
        before
            Bytes that the layer takes for a batch as far as its experts.
        """
        hidden, itemsize = self.stack.hidden, self.itemsize
        columns = -(-hidden // solver.column_blocks)
        activations = self._activations(tokens, solver)
        # what is predicted, it in the run's dtype, an expert's rows of it with zeros, or its
        # share of it, for which all tokens may go to one expert
        product = tokens * columns * (4 + itemsize + max(2 * itemsize, 4 + itemsize))
        # the batch's outputs and residuals, and one copy of these to be kept
        residuals = tokens * hidden * (3 * 4 + 2 * itemsize)
        adding = before + activations + residuals + product
        inputs = tokens * hidden * itemsize
        passing = activations + 2 * inputs + product
        inner, vectors = self.stack.inner, 1 + len(self.settings.method.refit_lambda)
        factor = Cholesky.working_bytes(inner) + 2 * inner * columns * 8
        return max(
            self._held(solver, 1) + adding,
            # target, residual, change, direction and product; or what the penalties lead to
            self._held(solver, max(4, vectors)) + max(factor, passing),
        )

    def _held(self, solver: Solver, vectors: int) -> int:
        """Return what is held from pass to pass, with so many of the size of all D_e or B_e."""
        experts, inner = self.settings.experts, self.stack.inner
        columns = -(-self.stack.hidden // solver.column_blocks)
        blocks = solver.preconditioner == "blocks"
        held = NormalSums.nbytes(experts, inner, columns, blocks=blocks)
        held += (vectors - 1) * experts * inner * columns * 4
        return held + (NormalMatrix.nbytes(experts, inner) if solver.gathered else 0)

    def _activations(self, tokens: int, solver: Solver) -> int:
        """Return what the activations of a batch take, and what making them takes."""
        inner, itemsize, rows = self.stack.inner, self.itemsize, min(tokens, MAX_ROWS)
        run = rows * (3 * inner + self.stack.hidden) * itemsize + rows * inner * 2 * 4
        # all tokens may go to one expert: its parts are put together
        made = tokens * (self.top_k + 1) * inner * itemsize
        wide = tokens * self.top_k * inner * 4 if solver.gathered and itemsize < 4 else 0
        return run + made + wide
