"""A layer's refit in the run: its targets and its scratch files.

The compressed layer is first written to a scratch folder, in the format of the output,
and runs from there. So the refit also compensates for rounding and encoding, and only
the down projections are computed a second time: all other bytes of the final shards are
copied from the scratch shards.

Letters in shapes: T tokens of a batch, H hidden, I inner.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ream_stream import files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.expert_stack import Slot, one_of
from ream_stream.checkpoint.shards import Content
from ream_stream.errors import ReamStreamError
from ream_stream.file_access import FileRange
from ream_stream.model.attention_cache import AttentionCache
from ream_stream.model.batch_store import BatchStore, open_batch_store
from ream_stream.model.batches import Batches, with_states
from ream_stream.model.experts import StreamedExperts
from ream_stream.model.finite import ExcludedSequences
from ream_stream.model.hidden_states import HiddenStates
from ream_stream.model.ranks.group import Ranks
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.planning.plan import Plan
from ream_stream.planning.refit_memory import ACTIVATIONS, KEPT

from .refit_activations import CachedActivations, held_back
from .refit_solver import LayerRefit, RefitSolution
from .workspace import Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A refitted layer before its final shards are written."""

    found: RefitSolution
    """New down projections and the refit's result."""

    tokens: CachedActivations
    """Activations of the layer's experts on the calibration set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitJob:
    """Inputs and scratch files of one layer's refit; `opened` makes and removes them."""

    plan: Plan
    """Plan of the run."""

    tokens: Tokens
    """Calibration set; tokens that do not count are masked."""

    excluded: ExcludedSequences
    """Excluded calibration sequences."""

    model: StreamedModel
    """Compressed model."""

    index: int
    """Position of the layer in the model."""

    folder: Path
    """Scratch folder of the first version of the compressed layer."""

    targets: BatchStore
    """Target outputs by batch; a batch's residual replaces its target in the same store."""

    store: Callable[[str, int], BatchStore]
    """Opens a store by name and number of batches; `opened` closes it after its block."""

    ranks: Ranks
    """Processes that run batches; stores hold those of this one."""

    @contextmanager
    def capturing(self, experts: nn.Module) -> Iterator[None]:
        """Keep the outputs of the source's experts, batch after batch, as the targets.

        With `trajectory` as target the original model's states are the targets instead.
        """
        if self.plan.tracks_original:
            yield
            return
        number = 0

        def keep(_module: nn.Module, _args: Any, output_TH: Tensor) -> None:  # noqa: ANN401
            nonlocal number
            self.targets.put(number, output_TH)
            number += 1

        handle = experts.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def fit(
        self,
        changing: Sequence[int],
        batches: Batches,
        entering: HiddenStates | None,
        playback: AttentionCache | None,
        report: Callable[[int, int], None],
    ) -> Fitted:
        """Refit the layer in the scratch folder.

        Parameters
        ----------
        changing, report
            Experts that may change, by their number after compression; called with the number
            of batches passed over so far, and in all.
        batches, entering, playback
            The calibration set, states that enter the layer, and its cached attention outputs.

        Raises
        ------
        ReamStreamError
            The sums are not finite.
        """
        plan, method = self.plan, self.plan.settings.method
        staged = plan.output_checkpoint(self.folder)
        with self.model.open_layer(self.index, staged) as experts:
            assert experts is not None
            tokens = CachedActivations(
                experts,
                changing,
                held_back(self.tokens, plan.settings.seed),
                self.tokens.attention_mask_SL,
                self.excluded,
                self.index,
                None if plan.memory.get(ACTIVATIONS) else self.store("inputs", len(batches)),
                self.targets,
                self.ranks.relay(len(batches)),
                keeps_fitted=plan.schedule.solver.column_blocks > 1,
            )
            results = self.store("results", plan.schedule.solver.column_blocks * len(changing))
            done = 0

            def batch_done() -> None:
                nonlocal done
                done += 1
                report(min(done, total - 1), total)

            sums = self.ranks.relay(len(batches))
            refit = LayerRefit(tokens, method, plan.schedule.solver, results, sums, batch_done)
            total = len(batches.own) * (1 + refit.passes)
            mixers = self.model.mixers(self.index)
            with nullcontext() if playback is None else playback.through(mixers):
                self._route(tokens, refit, batches, entering, batch_done)
            try:
                found = refit.solve()
            except ValueError as error:
                raise ReamStreamError(f"layer {self.index}: {error}") from error
        tokens.reopened(None)
        report(total, total)
        return Fitted(found=found, tokens=tokens)

    def content(self, found: RefitSolution | None) -> Callable[[str], Content]:
        """Return a function that gives each final tensor of the layer, by name."""
        entries = self.plan.output_checkpoint(self.folder).entries
        stack = self.model.layers[self.index].stack
        assert stack is not None
        slots, count = stack.slots(), stack.count
        downs = {n for n, matrix in enumerate(stack.matrices) if matrix.parts == ("down",)}

        def one(name: str, slot: Slot, expert: int) -> Tensor | FileRange:
            entry, matrix = entries[name], stack.matrices[slot.matrix]
            place = None if found is None else found.places.get(expert)
            if found is not None and place is not None and slot.part not in matrix.activation:
                down_HI = found.down(place)
                return matrix.encode(matrix.join({"down": down_HI}))[slot.part.suffix]
            start, stop = (entry.start, entry.stop)
            if slot.expert is None:
                start, stop = one_of(entry, expert, count)
            return FileRange(path=entry.path, start=start, stop=stop)

        def content(name: str) -> Content:
            slot = slots.get(name)
            if found is None or not found.helps or slot is None or slot.matrix not in downs:
                return entries[name]
            experts = range(count) if slot.expert is None else [slot.expert]
            return (one(name, slot, expert) for expert in experts)

        return content

    def _route(
        self,
        tokens: CachedActivations,
        refit: LayerRefit,
        batches: Batches,
        entering: HiddenStates | None,
        batch_done: Callable[[], None],
    ) -> None:
        """Run the compressed layer up to its target, and add the residual to the refit."""
        with (
            _replaced(tokens.experts, tokens.outputs),
            with_states(batches, entering) as states,
        ):
            for place, (number, batch, hidden_BLH) in enumerate(states):
                tokens.expect(number, number * batches.size, batch)
                if self.plan.tracks_original:
                    leaving_BLH = self.model.run_layer(self.index, batch, hidden_BLH)
                    found_TH = leaving_BLH.flatten(0, 1).float()
                else:
                    self.model.observe_layer(self.index, batch, hidden_BLH)
                    found_TH = tokens.output_TH
                target_TH = self.targets.get(place).to(found_TH.device).view_as(found_TH)
                refit.add(tokens.add(target_TH.float() - found_TH))
                batch_done()
        self.excluded.join(self.index, self.ranks)
        tokens.finish()
        refit.finish()


@contextmanager
def opened(
    plan: Plan,
    tokens: Tokens,
    workspace: Workspace,
    excluded: ExcludedSequences,
    model: StreamedModel,
    index: int,
    ranks: Ranks,
) -> Iterator[RefitJob]:
    """Yield the refit of a layer with its scratch files, which are removed after the block.

    Within the block the layer runs for the next layer, from the cached activations.
    """
    folder = workspace.staged
    if ranks.is_first:
        files.remove(folder)
        files.make_directory(folder)
    ranks.gather(None)
    with ExitStack() as stack:

        def store(name: str, batches: int) -> BatchStore:
            path = None if plan.memory[KEPT] > 0 else workspace.scratch(name)
            return stack.enter_context(open_batch_store(path, batches))

        yield RefitJob(
            plan=plan,
            tokens=tokens,
            excluded=excluded,
            model=model,
            index=index,
            folder=folder,
            targets=store("wanted", plan.num_batches),
            store=store,
            ranks=ranks,
        )
    ranks.gather(None)
    if ranks.is_first:
        files.remove(folder)


@contextmanager
def replaying(experts: StreamedExperts, tokens: CachedActivations) -> Iterator[None]:
    """Compute the outputs of an open layer's experts from cached activations.

    The down projections are those of `experts`; batches must come in the same order.
    """
    tokens.reopened(experts)
    with _replaced(experts, tokens.again):
        yield


@contextmanager
def _replaced(experts: StreamedExperts, outputs: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the forward of experts by a function for the length of the block."""
    # on the instance: the module keeps its hooks
    experts.forward = outputs  # type: ignore[method-assign]
    try:
        yield
    finally:
        del experts.forward
