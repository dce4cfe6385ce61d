"""A layer's refit in the run: what it is compared with, and where it is done.

The compressed layer is first written to a scratch folder, in the form that it will have
in the output, and run from there. So whatever is rounded or encoded on the way to the
file is part of what the refit makes up for, and nothing but the down projections is
computed a second time: the rest of the final shards are copies of the scratch ones.

Letters in shapes: T tokens of a batch, H hidden, I inner.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ream_stream import files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.expert_stack import Slot, one_of
from ream_stream.checkpoint.shards import Content
from ream_stream.errors import ReamStreamError
from ream_stream.events import Refitted
from ream_stream.files import FileRange
from ream_stream.model.attention_cache import Playback
from ream_stream.model.batch_store import Kept, keeping
from ream_stream.model.batches import Batches, with_states
from ream_stream.model.experts import StreamedExperts
from ream_stream.model.finite import Excluded
from ream_stream.model.hidden_states import HiddenStates
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.planning.plan import Plan
from ream_stream.planning.refit_memory import ACTIVATIONS, KEPT

from .journal import Workspace
from .refit_activations import RoutedTokens, held_back
from .refit_solver import Found, LayerRefit


class RefitJob:
    """The refit of one layer, from what is heard of the source to the final tensors.

    Parameters
    ----------
    plan
        Of the run.
    tokens
        The calibration set, what does not count masked.
    workspace
        For scratch folders.
    excluded
        Calibration sequences that are left out.
    model
        The compressed model.
    index
        The layer.
    """

    def __init__(
        self,
        plan: Plan,
        tokens: Tokens,
        workspace: Workspace,
        excluded: Excluded,
        model: StreamedModel,
        index: int,
    ) -> None:
        self._plan, self._tokens, self._workspace = plan, tokens, workspace
        self._excluded, self._model, self._index = excluded, model, index
        self._stack = ExitStack()
        self._routed: RoutedTokens | None = None
        self._found: Found | None = None
        self.folder = workspace.scratch("layer")
        """Where the compressed layer is to be written first."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make what is needed on disk for the length of the block, and remove it after.

        To its end the layer's tokens are kept, so it is run for the next layer within.
        """
        files.remove(self.folder)
        files.make_directory(self.folder)
        with self._stack:
            yield
        # activations are large
        self._routed = self._found = None
        files.remove(self.folder)

    @contextmanager
    def hearing(self, experts: nn.Module) -> Iterator[None]:
        """Keep what the source's experts give for each batch that runs in the block.

        Nothing, if it is not their outputs that are wanted.
        """
        self._wanted = self._store("wanted", self._plan.num_batches)
        if self._plan.follows:
            yield
            return
        number = 0

        def keep(_module: nn.Module, _args: Any, output_TH: Tensor) -> None:  # noqa: ANN401
            nonlocal number
            self._wanted.put(number, output_TH)
            number += 1

        handle = experts.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def want(self, number: int, leaving_BLH: Tensor) -> None:
        """Keep what leaves the layer in the original model, for one batch."""
        self._wanted.put(number, leaving_BLH)

    def steps(
        self,
        changing: Sequence[int],
        batches: Batches,
        entering: HiddenStates | None,
        playback: Playback | None,
    ) -> Iterator[tuple[int, int]]:
        """Refit what was written to the scratch folder.

        Parameters
        ----------
        changing
            Experts that may be changed, by their number after compression.
        batches, entering
            The calibration set and the states that enter the layer.
        playback
            Outputs of its attention, if they were kept.

        Yields
        ------
        tuple
            Batches passed over, and how many it will be.
        """
        plan, method = self._plan, self._plan.settings.method
        staged = plan.output_checkpoint(self.folder)
        with self._model.open_layer(self._index, staged) as experts:
            assert experts is not None
            tokens = RoutedTokens(
                experts,
                changing,
                held_back(self._tokens, plan.settings.seed),
                self._tokens.attention_mask_SL,
                self._excluded,
                self._index,
                None if plan.memory.get(ACTIVATIONS) else self._store("inputs", len(batches)),
                # of a batch it is asked for no more once it is known what lacks to it
                self._wanted,
                keeps_fitted=plan.solver.column_blocks > 1,
            )
            count = plan.solver.column_blocks * len(changing)
            results = self._store("results", count)
            refit = LayerRefit(tokens, method, plan.solver, results)
            total, done = len(batches) * (1 + refit.passes), 0
            mixers = self._model.mixers(self._index)
            with nullcontext() if playback is None else playback.through(mixers):
                for _ in self._route(tokens, refit, batches, entering):
                    done += 1
                    yield done, total
            try:
                for _ in refit.steps():
                    done += 1
                    yield min(done, total - 1), total
            except ValueError as error:
                raise ReamStreamError(f"layer {self._index}: {error}") from error
        tokens.reopened(None)
        self._routed, self._found = tokens, refit.found
        yield total, total

    @property
    def outcome(self) -> Refitted | None:
        """What came of it; None if nothing could be changed."""
        return None if self._found is None else self._found.outcome

    @contextmanager
    def answering(self, experts: StreamedExperts) -> Iterator[None]:
        """Let what is kept of the layer's tokens give its experts' outputs.

        They are those of the down projections of `experts`, for all batches in their order.
        If no expert could be changed nothing was kept, and the experts run themselves.
        """
        if self._routed is None:
            yield
            return
        self._routed.reopened(experts)
        with _replaced(experts, self._routed.again):
            yield

    def content(self) -> Callable[[str], Content]:
        """Return a function that gives each final tensor of the layer, by name."""
        entries, found = self._plan.output_checkpoint(self.folder).entries, self._found
        stack = self._model.layers[self._index].stack
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
        tokens: RoutedTokens,
        refit: LayerRefit,
        batches: Batches,
        entering: HiddenStates | None,
    ) -> Iterator[None]:
        """Run the compressed layer, as far as its target, and take what it lacks."""
        with _replaced(tokens.experts, tokens.outputs):
            for number, batch, hidden_BLH in with_states(batches, entering):
                tokens.expect(batch)
                if self._plan.follows:
                    leaving_BLH = self._model.run_layer(self._index, batch, hidden_BLH)
                    found_TH = leaving_BLH.flatten(0, 1).float()
                else:
                    self._model.observe_layer(self._index, batch, hidden_BLH)
                    found_TH = tokens.output_TH
                wanted_TH = self._wanted.get(number).to(found_TH.device).view_as(found_TH)
                refit.add(tokens.add(wanted_TH.float() - found_TH))
                yield

    def _store(self, name: str, numbers: int) -> Kept:
        """Return a store, in memory if the plan has room for it, until `open` ends."""
        in_memory = self._plan.memory[KEPT] > 0
        path = None if in_memory else self._workspace.scratch(name)
        return self._stack.enter_context(keeping(path, numbers))


@contextmanager
def _replaced(experts: StreamedExperts, outputs: Callable[..., Tensor]) -> Iterator[None]:
    """Let a function stand in for experts for the length of the block."""
    # on the instance: the module keeps its hooks
    experts.forward = outputs  # type: ignore[method-assign]
    try:
        yield
    finally:
        del experts.forward
