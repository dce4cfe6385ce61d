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
from typing import Any, cast

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
from ream_stream.planning.refit_memory import ACTIVATIONS, INPUTS, KEPT

from .column_store import ColumnStore
from .held_back import held_back
from .refit_activations import CachedActivations
from .refit_solver import LayerRefit, RefitSolution
from .stored_activations import StoredActivations
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

    targets: ColumnStore
    """Target outputs by batch; a batch's residual replaces its target in the same store."""

    store: Callable[[str, str, int], BatchStore]
    """Opens a store by part of the plan, name and number of tensors; `opened` closes it after
    its block."""

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

        def keep(module: nn.Module, _args: Any, output_TH: Tensor) -> None:  # noqa: ANN401
            nonlocal number
            part = cast("StreamedExperts", module).part
            if part is not None and not part.is_last:
                return  # a sum of some blocks of experts
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
            experts.weights.resident = plan.schedule.resident_experts
            tokens = self._activations(experts, changing, len(batches))
            results = self.store(
                KEPT, "results", plan.schedule.solver.column_blocks * len(changing)
            )
            progress, relay = _Progress(report), self.ranks.relay(len(batches))
            refit = LayerRefit(
                tokens, method, plan.schedule.solver, results, relay, progress.advance
            )
            progress.total = len(batches.own) * (len(plan.refit_blocks) + 1 + refit.passes)
            self._sum(tokens, refit, batches, entering, playback, progress.advance)
            try:
                found = refit.solve()
            except ValueError as error:
                raise ReamStreamError(f"layer {self.index}: {error}") from error
        tokens.reopened(None)
        progress.finish()
        return Fitted(found=found, tokens=tokens)

    def _sum(
        self,
        tokens: CachedActivations,
        refit: LayerRefit,
        batches: Batches,
        entering: HiddenStates | None,
        playback: AttentionCache | None,
        batch_done: Callable[[], None],
    ) -> None:
        """Add all batches to the refit, whose experts may have to be run block by block."""
        blocks, weights = self.plan.refit_blocks, tokens.experts.weights
        for number, block in enumerate(blocks):
            weights.turn_to(block, "gate_up")
            collect = tokens.collecting(number, block)
            self._run(tokens, collect, batches, entering, playback, batch_done)
        tokens.turn_to_downs()
        if blocks and not self.plan.tracks_original:
            # the experts' outputs need no more of the layer than their activations
            for place, (number, batch) in enumerate(zip(batches.own, batches, strict=True)):
                tokens.expect(place, number, number * batches.size, batch)
                tokens.stored_outputs()
                self._add(tokens, refit, place, tokens.output_TH)
                batch_done()
        else:
            self._run(tokens, tokens.outputs, batches, entering, playback, batch_done, refit)
        self.excluded.join(self.index, self.ranks)
        tokens.finish()
        refit.finish()
        if blocks:
            # the solution has the device's memory for itself
            weights.resident = 0
            weights.turn_to(range(0), "down")

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

    def _activations(
        self, experts: StreamedExperts, changing: Sequence[int], batches: int
    ) -> CachedActivations:
        """Return the activations of the experts, with the stores that the plan has for them."""
        plan, inputs, stored = self.plan, None, None
        if plan.refit_blocks:
            names, count = ("fitted", "held"), batches * len(plan.refit_blocks)
            stores = [self.store(ACTIVATIONS, name, count) for name in names]
            stored = StoredActivations(stores, len(plan.refit_blocks))
        elif not plan.memory.get(ACTIVATIONS):
            inputs = self.store(INPUTS, "inputs", batches)
        return CachedActivations(
            experts,
            changing,
            held_back(self.tokens, plan.settings.seed),
            self.tokens.attention_mask_SL,
            self.excluded,
            self.index,
            inputs,
            self.targets,
            self.store(KEPT, "held-back", batches),
            self.ranks.relay(batches),
            stored=stored,
            keeps_fitted=plan.schedule.solver.column_blocks > 1,
        )

    def _run(
        self,
        tokens: CachedActivations,
        outputs: Callable[..., Tensor],
        batches: Batches,
        entering: HiddenStates | None,
        playback: AttentionCache | None,
        batch_done: Callable[[], None],
        refit: LayerRefit | None = None,
    ) -> None:
        """Run the compressed layer up to its experts, or to its target for the refit."""
        mixers = self.model.mixers(self.index)
        with (
            nullcontext() if playback is None else playback.through(mixers),
            _replaced(tokens.experts, outputs),
            with_states(batches, entering) as states,
        ):
            for place, (number, batch, hidden_BLH) in enumerate(states):
                tokens.expect(place, number, number * batches.size, batch)
                if refit is not None and self.plan.tracks_original:
                    leaving_BLH = self.model.run_layer(self.index, batch, hidden_BLH)
                    self._add(tokens, refit, place, leaving_BLH.flatten(0, 1).float())
                else:
                    self.model.observe_layer(self.index, batch, hidden_BLH)
                    if refit is not None:
                        self._add(tokens, refit, place, tokens.output_TH)
                batch_done()

    def _add(
        self, tokens: CachedActivations, refit: LayerRefit, place: int, found_TH: Tensor
    ) -> None:
        """Add what a batch's outputs lack to their target to the refit."""
        target_TH = self.targets.get(place).to(found_TH.device).view_as(found_TH)
        refit.add(tokens.add(target_TH.float() - found_TH))


class _Progress:
    """Counts the batches of all passes; the last is reported by `finish`."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report
        self.done = self.total = 0

    def advance(self) -> None:
        self.done += 1
        self._report(min(self.done, self.total - 1), self.total)

    def finish(self) -> None:
        self._report(self.total, self.total)


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
    columns = plan.schedule.solver.columns(plan.experts[1].hidden)
    with ExitStack() as stack:

        def store(part: str, name: str, count: int) -> BatchStore:
            memory, disk = plan.memory.get(part, 0), plan.scratch.get(part, 0)
            in_memory = memory > 0 and not disk
            # with what is routed to each expert, and which sequences of a batch are held back
            varies = part == ACTIVATIONS or name == "held-back"
            return stack.enter_context(
                open_batch_store(
                    None if in_memory else workspace.scratch(name),
                    None if varies else count,
                    device=model.device,
                    beside=part == ACTIVATIONS,
                    in_memory=count * memory // max(1, memory + disk),
                )
            )

        yield RefitJob(
            plan=plan,
            tokens=tokens,
            excluded=excluded,
            model=model,
            index=index,
            folder=folder,
            targets=ColumnStore(
                store(KEPT, "wanted", plan.num_batches * len(columns)), columns
            ),
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
    tokens.turn_to_downs()
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
