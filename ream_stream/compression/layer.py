"""One layer: observe it, choose its experts, write its shards, run it again.

This module does all work on a layer except its commit, which the pipeline does.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ream_stream import files
from ream_stream.calibration.tokens import mask_without_next
from ream_stream.checkpoint.reader import MappedTensors
from ream_stream.checkpoint.shards import Content, write_shard
from ream_stream.errors import NumbersError
from ream_stream.events import Phase, RefitResult, Report, Step
from ream_stream.files import Written
from ream_stream.method.alignment import Matched
from ream_stream.model.attention_cache import AttentionCache
from ream_stream.model.batches import with_states
from ream_stream.model.expert_blocks import ExpertBlockPasses, Listeners
from ream_stream.model.experts import StreamedExperts
from ream_stream.model.finite import CheckedWriter
from ream_stream.model.streamed_model import Batch, StreamedModel
from ream_stream.planning.plan import OUTPUTS, SUMS, LayerPlan

from . import refit_layer
from .context import Context
from .decision import Decision, alignment_orders, decide
from .observer import Observer, TokenSample, mean_outputs
from .output_tensors import Unchanged, finite_content, layer_content
from .refit_layer import Fitted, RefitJob
from .weight_check import check_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """Result of the work on one layer; its files are durable but not committed."""

    shards: tuple[Written, ...]
    """Files of the layer in OUTPUT."""

    statistics: Written | None = None
    """File of the layer's sums in the work folder; None for a dense layer."""

    decision: Decision | None = None
    """Groups of source experts and their weights; None for a dense layer."""

    refitted: RefitResult | None = None
    """Result of the refit; None if nothing was refitted."""

    read: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """SHA-256 of the source tensors that were read, by part and file; see `Journal.read`."""


def compress_layer(context: Context, layer: LayerPlan, report: Report) -> LayerResult:
    """Do all the work on one layer.

    Raises
    ------
    NumbersError
        Weights, statistics or merged weights are not finite.
    DamagedError
        A table of experts by token id names experts that do not exist.
    InterruptedRunError
        `report` asked to stop.
    """
    with ExitStack() as stores:
        run = _LayerRun(context, layer, stores, report)
        read = check_weights(context, layer, report)
        result = run.copy() if layer.keys.stack is None else run.compress()
        return replace(result, read=read)


class _LayerRun:
    """The phases of one layer with their shared layer, tokens and stores."""

    def __init__(
        self, context: Context, layer: LayerPlan, stores: ExitStack, report: Report
    ) -> None:
        self.context, self.plan, self.layer = context, context.plan, layer
        self.index = layer.keys.index
        self.leads_on = context.plan.leads_on(layer)
        # tokens that do not count are masked
        self.tokens = mask_without_next(context.tokens) if layer.keys.is_mtp else context.tokens
        self._stores, self._report = stores, report
        self._entering = context.hidden_reader(self.index)

    def copy(self) -> LayerResult:
        """Copy a layer without experts, and run it for the next layer."""
        with self.plan.source.open() as tensors:
            content = self._unchanged(tensors).content
            shards = self._write(content, self.context.workspace.output)
        if self.plan.propagates(self.layer):
            self._propagate(self.context.source, None, None)
        if self.plan.tracks_original_through(self.layer):
            with self.context.source.open_layer(self.index):
                self._follow(None)
        return LayerResult(shards=shards)

    def compress(self) -> LayerResult:
        """Observe a layer, merge or drop experts, write it, and run it for the next layer."""
        context, plan = self.context, self.plan
        with ExitStack() as stack:
            refit = None
            if plan.refits:
                refit = stack.enter_context(
                    refit_layer.opened(
                        plan,
                        self.tokens,
                        context.workspace,
                        context.excluded,
                        context.output,
                        self.index,
                    )
                )
            playback = self._playback()
            decision, statistics, shards = self._decide_and_write(refit, playback)
            fitted = None
            if refit is not None:
                fitted = self._fit(refit, decision, playback)
                content = refit.content(fitted.found if fitted else None)
                shards = self._write(content, context.workspace.output)
            if plan.propagates(self.layer):
                self._propagate(context.output, playback, fitted)
            return LayerResult(
                shards=shards,
                statistics=statistics,
                decision=decision,
                refitted=fitted.found.outcome if fitted else None,
            )

    def _playback(self) -> AttentionCache | None:
        """Return a cache of attention outputs; None for a single pass or without room."""
        context = self.context
        if not self.plan.keeps_outputs(self.layer):
            return None
        # no reference to self: a cycle would keep all memory of the layer alive
        stores = self._stores
        return AttentionCache(
            lambda name: stores.enter_context(context.open_batch_store(OUTPUTS, name))
        )

    def _decide_and_write(
        self, refit: RefitJob | None, playback: AttentionCache | None
    ) -> tuple[Decision, Written, tuple[Written, ...]]:
        """Return the decision, the file of statistics, and the shards of the layer."""
        source, plan = self.context.source, self.plan
        observer = self._observer()
        with source.open_layer(self.index) as experts, plan.source.open() as tensors:
            assert experts is not None
            with (
                observer.attached(source.router(self.index)),
                nullcontext() if refit is None else refit.capturing(experts),
            ):
                self._observe(observer, experts, playback, refit)
            if plan.tracks_original_through(self.layer):
                self._follow(refit)
            observer.finish(self.index)
            mean_EH = self._compare(experts, observer.sample)
            decision = decide(plan.settings, plan.routing_groups, observer, mean_EH, self.index)
            matched: dict[int, Matched] = {}
            if mean_EH is not None:
                matched = self._align(decision, experts, tensors, observer.sample)
            stack, output = self.layer.keys.stack, self.layer.stack
            assert stack is not None
            assert output is not None
            content = layer_content(
                decision,
                {member: found.order_I for member, found in matched.items()},
                stack,
                output,
                self.layer.routers,
                self.layer.table,
                self._unchanged(tensors),
            )
            folder = self.context.workspace.output if refit is None else refit.folder
            shards = self._write(content, folder)
        path = self.context.workspace.statistics(self.index)
        statistics = files.write_tensors(path, _statistics(observer, decision, matched))
        return decision, statistics, shards

    def _observer(self) -> Observer:
        """Make an observer of the statistics that the method needs."""
        plan, method = self.plan, self.plan.settings.method
        compares = plan.merges
        sample = None
        if compares:
            sample = TokenSample(
                self.tokens,
                method.similarity_tokens,
                seed=plan.settings.seed,
                layer=self.index,
            )
        return Observer(
            plan.family,
            plan.num_experts,
            sample,
            self.tokens,
            self.context.excluded,
            gate_term=compares and method.gate_term,
            device=self.context.source.device,
        )

    def _observe(
        self,
        observer: Observer,
        experts: StreamedExperts,
        playback: AttentionCache | None,
        refit: RefitJob | None,
    ) -> None:
        """Run the source layer: up to its experts, or whole if its outputs enter the next."""
        writer = None
        if not self.plan.settings.sequential and self.leads_on:
            writer = self.context.hidden_writer(self.index + 1)
        size = self.plan.schedule.batch_sequences

        def listeners(number: int, batch: Batch) -> Callable[..., None]:
            return observer.listener(number * size, batch)

        with self.context.timed("observe"):
            self._run(
                "observe",
                self.context.source,
                experts,
                writer,
                playback,
                listeners,
                captures_sums=refit is not None and not self.plan.tracks_original,
            )

    def _follow(self, refit: RefitJob | None) -> None:
        """Run the open source layer on the original model's own states."""
        context, index = self.context, self.index
        batches, entering = context.batches, context.original_reader(index)
        writer = context.original_writer(index + 1) if self.leads_on else None
        with (
            context.timed("follow"),
            writer or nullcontext(),
            with_states(batches, entering) as states,
        ):
            for number, batch, hidden_BLH in states:
                leaving_BLH = context.source.run_layer(index, batch, hidden_BLH)
                if refit is not None:
                    refit.targets.put(number, leaving_BLH)
                if writer is not None:
                    writer.write(number, leaving_BLH)
                self._step("follow", number + 1, len(batches))
            if writer is not None:
                writer.publish()

    def _compare(self, experts: StreamedExperts, sample: TokenSample | None) -> Tensor | None:
        """Return the experts' mean outputs (E, H); None if they are not compared."""
        if sample is None:
            return None
        count = experts.weights.stack.count
        with self.context.timed("compare"):
            mean_EH = mean_outputs(
                experts,
                sample,
                self.plan.settings.method.similarity,
                lambda done: self._step("compare", done, count),
            )
        if (bad_E := ~mean_EH.isfinite().all(dim=1)).any():
            raise NumbersError(
                f"layer {self.index}: the mean output of expert {int(bad_E.int().argmax())} is "
                "not finite; --compute-dtype float32 has more range"
            )
        return mean_EH

    def _align(
        self,
        decision: Decision,
        experts: StreamedExperts,
        tensors: MappedTensors,
        sample: TokenSample | None,
    ) -> dict[int, Matched]:
        with self.context.timed("align"):
            return alignment_orders(
                self.plan.settings.method,
                decision,
                experts,
                tensors,
                sample,
                self.plan.schedule.threads,
                lambda done, total: self._step("align", done, total),
            )

    def _fit(
        self, refit: RefitJob, decision: Decision, playback: AttentionCache | None
    ) -> Fitted | None:
        """Refit the layer in the scratch folder; return None if no expert may change."""
        only_merged = self.plan.settings.method.refit_experts == "changed"
        changing = [
            number
            for number, group in enumerate(decision.groups)
            if len(group) > 1 or not only_merged
        ]
        if not changing:
            return None
        with self.context.timed("refit"):
            return refit.fit(
                changing,
                self.context.batches,
                self._entering,
                playback,
                lambda done, total: self._step("refit", done, total),
            )

    def _propagate(
        self, model: StreamedModel, playback: AttentionCache | None, fitted: Fitted | None
    ) -> None:
        """Run the layer of `model` to compute the hidden states that enter the next layer."""
        with self.context.timed("propagate"):
            writer = self.context.hidden_writer(self.index + 1)
            with model.open_layer(self.index) as experts, ExitStack() as stack:
                if fitted is not None and experts is not None:
                    stack.enter_context(refit_layer.replaying(experts, fitted.tokens))
                self._run("propagate", model, experts, writer, playback)

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
    ) -> None:
        """Run the layer on all batches; the whole layer if a writer takes its outputs."""
        context, batches = self.context, self.context.batches
        schedule = self.plan.schedule
        if experts is not None:
            experts.weights.resident = schedule.resident_experts
        with ExitStack() as stack:
            stack.enter_context(writer or nullcontext())
            sums = None
            if writer is not None and schedule.expert_blocks > 1:
                sums = stack.enter_context(context.open_batch_store(SUMS, "sums"))
            passes = ExpertBlockPasses(
                model=model,
                index=self.index,
                experts=experts,
                blocks=schedule.expert_blocks,
                playback=playback,
                sums=sums,
                captures_sums=captures_sums,
            )
            total = len(passes) * len(batches)
            run = passes.run(
                batches, self._entering, listeners=listeners, captures_only=not writer
            )
            stack.enter_context(closing(run))
            for done, (number, leaving_BLH) in enumerate(run, start=1):
                if writer is not None and leaving_BLH is not None:
                    writer.write(number, leaving_BLH)
                self._step(phase, done, total)
            if writer is not None:
                writer.publish()

    def _write(self, content: Callable[[str], Content], folder: Path) -> tuple[Written, ...]:
        """Write the layer's shards; a refitted layer is also written before its refit."""
        final = folder == self.context.workspace.output
        shards: list[Written] = []
        with self.context.timed("write"):
            for shard in self.layer.shards:
                shards.append(write_shard(folder, shard, finite_content(content, self.index)))
                if final:
                    self._step("write", len(shards), len(self.layer.shards))
        return tuple(shards)

    def _unchanged(self, tensors: MappedTensors) -> Unchanged:
        entries, decoded = self.plan.source.entries, self.plan.decoded
        return Unchanged(entries=entries, tensors=tensors, decoded=decoded)

    def _step(self, phase: Phase, done: int, total: int) -> None:
        self._report(Step(layer=self.index, phase=phase, done=done, total=total))


def _statistics(
    observer: Observer, decision: Decision, matched: dict[int, Matched]
) -> dict[str, Tensor]:
    """Return the layer's statistics: sums, distances, and alignment costs."""
    tensors = observer.sums.tensors()
    if decision.distance_EE is not None:
        tensors["distance_EE"] = decision.distance_EE.float()
    if matched:
        aligned: Sequence[tuple[float, float, float]] = [
            (member, found.kept, found.least) for member, found in matched.items()
        ]
        tensors["aligned"] = torch.tensor(aligned, dtype=torch.float64)
    return tensors
