"""Memory of a refit, and the choice of solvers that fit into it.

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

KEPT = "targets of the refit"
"""Memory part: targets, then residuals, and results of a refit."""

INPUTS = "inputs for the refit"
"""Memory part: inputs of the experts, from which each pass of a refit computes activations."""

ACTIVATIONS = "activations for the refit"
"""Memory part: activations of all experts; without them each pass computes them."""

MOST_COLUMN_BLOCKS = 64
"""Most column blocks; more blocks each cost a pass over the tokens and save little."""


WIDE_COST = {4: 1, 2: 3}
"""Relative time of a float32 product to one in the run's dtype, by bytes of its numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitMemory:
    """Bytes that a refit takes, as functions of tokens and solver."""

    settings: Settings
    """Settings of the run."""

    stack: ExpertStack
    """Experts of an output layer, in the source's format."""

    top_k: int
    """Number of the output's experts that the router selects for a token, K."""

    itemsize: int
    """Bytes of a number in the run's dtype."""

    def solvers(self, tokens: int, *, remakes: bool = False) -> Iterator[Solver]:
        """Yield the solvers for `tokens`, from the fastest to the one with the least memory.

        With `remakes` each pass over the tokens computes activations again.
        """
        gathered = self.gathered_flop(tokens)
        # gathering is in float32, passes are in the run's dtype
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
        """Return the operations to accumulate the normal matrix, and to iterate with it."""
        inner, hidden = self.stack.inner, self.stack.hidden
        product = NormalMatrix.product_flop(self.settings.experts, inner, hidden)
        gathering = NormalMatrix.gathering_flop(tokens, self.top_k, inner)
        return gathering + self.settings.method.refit_iterations * product

    def pass_flop(self, tokens: int, *, remakes: bool) -> int:
        """Return the operations of all iterations, if each passes over the tokens."""
        iterations = self.settings.method.refit_iterations
        # the last iteration only predicts; gate and up are two products
        products = 2 * iterations - 1 + (2 * iterations if remakes else 0)
        return products * tokens * self.top_k * 2 * self.stack.hidden * self.stack.inner

    def kept(self, tokens: int) -> int:
        """Return the bytes of the targets, residuals and results of `tokens` tokens."""
        hidden, inner = self.stack.hidden, self.stack.inner
        # codes are encoded from float32
        stored = ITEM_BYTES[self.stack.dtype] if self.stack.scheme == "plain" else 4
        numbers = self.settings.experts * hidden * inner
        # targets, then their residuals in the same store, but for those held back
        states = tokens * hidden * self.itemsize
        return states + int(HELD_BACK_SHARE * states) + numbers * stored

    def inputs(self, tokens: int) -> int:
        """Return the bytes of expert inputs, kept if activations are not, or of outputs."""
        return tokens * self.stack.hidden * self.itemsize

    def activations(self, tokens: int) -> int:
        """Return the bytes of all tokens' activations, with some rows of zeros."""
        return int(1.05 * tokens * self.top_k * self.stack.inner * self.itemsize)

    def routing(self, tokens: int) -> int:
        """Return the bytes of all tokens' expert indices and router coefficients."""
        # index of the token; for each of its experts index, coefficient and token index
        return tokens * (8 + self.top_k * (8 + 4 + 8))

    def replaying(self, tokens: int, solver: Solver) -> int:
        """Return the transient bytes of computing the layer's outputs from kept tensors."""
        # the sum in float32, and its copy in the run's dtype
        outputs = tokens * self.stack.hidden * (4 + self.itemsize)
        return outputs + self._activations(tokens, solver)

    def collecting(self, tokens: int, solver: Solver, before: int) -> int:
        """Return the transient bytes of storing a block's activations on a batch.

        Parameters
        ----------
        tokens
            Tokens of a batch, T.
        solver
            Solver of the refit.
        before
            Bytes of the layer's forward on a batch up to its experts.
        """
        # all tokens may go to the block
        together = tokens * self.top_k * self.stack.inner * self.itemsize
        return before + self._activations(tokens, solver) + together

    def summing(self, tokens: int, solver: Solver, before: int) -> int:
        """Return the transient bytes of adding a batch to the sums, as for `collecting`."""
        # the batch's outputs and residuals, and one copy of the residuals to keep
        residuals = tokens * self.stack.hidden * (3 * 4 + 2 * self.itemsize)
        adding = before + self._activations(tokens, solver) + residuals
        return self._held(solver, 1) + adding + self._product(tokens, solver)

    def solving(self, tokens: int, solver: Solver) -> int:
        """Return the transient bytes of the solution and its passes over batches."""
        columns = -(-self.stack.hidden // solver.column_blocks)
        inputs = tokens * self.stack.hidden * self.itemsize
        passing = self._activations(tokens, solver) + 2 * inputs + self._product(tokens, solver)
        inner, vectors = self.stack.inner, 1 + len(self.settings.method.refit_lambda)
        factor = Cholesky.working_bytes(inner) + 2 * inner * columns * 8
        # target, residual, change, direction and product; or a direction of each penalty
        return self._held(solver, max(4, vectors)) + max(factor, passing)

    def _product(self, tokens: int, solver: Solver) -> int:
        """Return the bytes of a prediction for a batch."""
        columns, itemsize = -(-self.stack.hidden // solver.column_blocks), self.itemsize
        # the prediction, its copy in the run's dtype, and one expert's rows or share of it:
        # all tokens may go to one expert
        return tokens * columns * (4 + itemsize + max(2 * itemsize, 4 + itemsize))

    def _held(self, solver: Solver, vectors: int) -> int:
        """Return the bytes held between passes, with `vectors` tensors as large as all D_e."""
        experts, inner = self.settings.experts, self.stack.inner
        columns = -(-self.stack.hidden // solver.column_blocks)
        blocks = solver.preconditioner == "blocks"
        held = NormalSums.nbytes(experts, inner, columns, blocks=blocks)
        held += (vectors - 1) * experts * inner * columns * 4
        return held + (NormalMatrix.nbytes(experts, inner) if solver.gathered else 0)

    def _activations(self, tokens: int, solver: Solver) -> int:
        """Return the bytes of a batch's activations and of their computation."""
        inner, itemsize, rows = self.stack.inner, self.itemsize, min(tokens, MAX_ROWS)
        run = rows * (3 * inner + self.stack.hidden) * itemsize + rows * inner * 2 * 4
        # all tokens may go to one expert, whose parts are concatenated
        made = tokens * (self.top_k + 1) * inner * itemsize
        wide = tokens * self.top_k * inner * 4 if solver.gathered and itemsize < 4 else 0
        return run + made + wide


def refit_memory(
    settings: Settings, stack: ExpertStack, top_k: int, itemsize: int
) -> RefitMemory:
    """Return the memory of a refit, given the experts and the router of a source layer."""
    return RefitMemory(
        settings=settings,
        stack=stack.resized(settings.experts, settings.width(stack.inner)),
        top_k=settings.top_k(top_k),
        itemsize=itemsize,
    )
