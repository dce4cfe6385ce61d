"""Passes of all calibration batches through one layer, of the source or of the output."""

from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext

from torch import Tensor

from ream_stream.events import Phase, Report, Step
from ream_stream.model.attention_cache import AttentionCache
from ream_stream.model.batches import with_states
from ream_stream.model.expert_blocks import ExpertBlockPasses, Listeners, cut_experts
from ream_stream.model.experts import StreamedExperts
from ream_stream.model.finite import CheckedWriter
from ream_stream.model.hidden_states import HiddenStates
from ream_stream.model.streamed_model import Batch, StreamedModel
from ream_stream.planning.plan import OUTPUTS, SUMS, LayerPlan

from . import refit_layer
from .context import Context
from .cutting import ActivationGrams
from .observer import Observer
from .refit_layer import Fitted, RefitJob


class LayerPasses:
    """The passes of one layer, with the states that enter it.

    Parameters
    ----------
    context
        Shared state of the run.
    layer
        The layer.
    stores
        Closes what passes keep for later ones.
    report
        Called with the progress of each pass.
    """

    def __init__(
        self, context: Context, layer: LayerPlan, stores: ExitStack, report: Report
    ) -> None:
        self._context, self._plan, self._layer = context, context.plan, layer
        self._index = layer.keys.index
        self._leads_on = context.plan.leads_on(layer)
        self._stores, self._report = stores, report
        self.entering = context.hidden_reader(self._index)
        """States that enter the layer; None for the first, which takes embeddings."""

    def playback(self) -> AttentionCache | None:
        """Return a cache of attention outputs; None for a single pass or without room."""
        context = self._context
        if not self._plan.keeps_outputs(self._layer):
            return None
        # no reference to self: a cycle would keep all memory of the layer alive
        stores = self._stores
        return AttentionCache(
            lambda name: stores.enter_context(context.open_batch_store(OUTPUTS, name))
        )

    def observe(
        self,
        observer: Observer,
        experts: StreamedExperts,
        playback: AttentionCache | None,
        refit: RefitJob | None,
        grams: ActivationGrams | None,
    ) -> None:
        """Run the source layer: up to its experts, or whole if its outputs enter the next."""
        writer = None
        if not self._plan.settings.sequential and self._leads_on:
            writer = self._context.hidden_writer(self._index + 1)
        with (
            self._context.timed("observe"),
            nullcontext()
            if grams is None
            else grams.summing(grams.blocks[0], self._parts(experts)),
        ):

            def listeners(number: int, batch: Batch) -> Callable[..., None]:
                if grams is not None:
                    grams.begin(number, batch)
                return observer.listener(number, batch)

            self._run(
                "observe",
                self._context.source,
                experts,
                writer,
                playback,
                listeners,
                captures_sums=refit is not None and not self._plan.tracks_original,
                batch_done=None if grams is None else grams.end,
            )
        if grams is not None:
            for block in grams.blocks[1:]:
                self._sum_grams(grams, block, playback)

    def _sum_grams(
        self, grams: ActivationGrams, block: range, playback: AttentionCache | None
    ) -> None:
        """Run the layer up to its experts once more, for the sums of a block of them."""
        source, batches = self._context.source, self._context.batches
        mixers = source.mixers(self._index)
        with (
            self._context.timed("observe"),
            grams.summing(block, [block]),
            nullcontext() if playback is None else playback.through(mixers),
            with_states(batches, self.entering) as states,
        ):
            for number, batch, hidden_BLH in states:
                grams.begin(number, batch)
                with grams.only(block):
                    source.observe_layer(self._index, batch, hidden_BLH)
                grams.end()
                self.step("observe", number + 1, len(batches))

    def follow(self, experts: StreamedExperts | None, refit: RefitJob | None) -> None:
        """Run the open source layer on the original model's own states."""
        context, index = self._context, self._index
        writer = context.original_writer(index + 1) if self._leads_on else None
        with context.timed("follow"):
            self._run(
                "follow",
                context.source,
                experts,
                writer,
                None,
                entering=context.original_reader(index),
                takes=None if refit is None else refit.targets.put,
            )

    def propagate(
        self, model: StreamedModel, playback: AttentionCache | None, fitted: Fitted | None
    ) -> None:
        """Run the layer of `model` to compute the hidden states that enter the next layer."""
        with self._context.timed("propagate"):
            writer = self._context.hidden_writer(self._index + 1)
            with model.open_layer(self._index) as experts, ExitStack() as stack:
                if fitted is not None and experts is not None:
                    stack.enter_context(refit_layer.replaying(experts, fitted.tokens))
                self._run(
                    "propagate",
                    model,
                    experts,
                    writer,
                    playback,
                    blocks=1 if fitted is not None else None,
                )

    def _run(
        self,
        phase: Phase,
        model: StreamedModel,
        experts: StreamedExperts | None,
        writer: CheckedWriter | None,
        playback: AttentionCache | None,
        listeners: Listeners | None = None,
        *,
        captures_sums: bool = False,
        entering: HiddenStates | None = None,
        takes: Callable[[int, Tensor], None] | None = None,
        blocks: int | None = None,
        batch_done: Callable[[], None] | None = None,
    ) -> None:
        """Run the layer on all batches; the whole layer if its outputs are taken."""
        context, batches = self._context, self._context.batches
        schedule = self._plan.schedule
        blocks = blocks or schedule.expert_blocks
        whole = writer is not None or takes is not None
        if experts is not None:
            experts.weights.resident = schedule.resident_experts
        with ExitStack() as stack:
            stack.enter_context(writer or nullcontext())
            sums = None
            if (whole or captures_sums) and blocks > 1:
                sums = stack.enter_context(context.open_batch_store(SUMS, "sums"))
            passes = ExpertBlockPasses(
                model=model,
                index=self._index,
                experts=experts,
                blocks=blocks,
                playback=playback,
                sums=sums,
                captures_sums=captures_sums,
            )
            total = len(passes) * len(batches.own)
            run = passes.run(
                batches,
                entering or self.entering,
                listeners=listeners,
                captures_only=not whole,
            )
            stack.enter_context(closing(run))
            for done, (number, leaving_BLH) in enumerate(run, start=1):
                if batch_done is not None:
                    batch_done()
                if takes is not None and leaving_BLH is not None:
                    takes(batches.own.index(number), leaving_BLH)
                if writer is not None and leaving_BLH is not None:
                    writer.write(number, leaving_BLH)
                self.step(phase, done, total)
            self._settle()
            if writer is not None:
                writer.publish()

    def _parts(self, experts: StreamedExperts) -> list[range]:
        """Return the experts of each pass over the batches."""
        return cut_experts(experts.count, self._plan.schedule.expert_blocks)

    def _settle(self) -> None:
        """Leave out the sequences that any process leaves out."""
        self._context.excluded.join(self._index, self._context.ranks)

    def step(self, phase: Phase, done: int, total: int) -> None:
        """Report the progress of a phase."""
        self._report(Step(layer=self._index, phase=phase, done=done, total=total))
