"""One layer: observe it, choose its experts, write its shards, run it again.

This module does all work on a layer except its commit, which the pipeline does.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ream_stream import files
from ream_stream.calibration.tokens import mask_without_next
from ream_stream.checkpoint.reader import MappedTensors
from ream_stream.checkpoint.shards import Content, write_shard
from ream_stream.errors import NumbersError
from ream_stream.events import RefitResult, Report
from ream_stream.files import Written
from ream_stream.method.alignment import Matched
from ream_stream.model.attention_cache import AttentionCache
from ream_stream.model.batch_store import BatchStore
from ream_stream.model.experts import StreamedExperts
from ream_stream.model.ranks.group import in_turn
from ream_stream.planning.plan import GRAMS, LayerPlan

from . import refit_layer
from .context import Context
from .cutting import ActivationGrams, choose_slices, cut_of
from .decision import Decision, alignment_orders, decide
from .layer_passes import LayerPasses
from .observer import Observed, Observer, TokenSample, mean_outputs
from .output_tensors import Unchanged, finite_content, layer_content
from .refit_layer import Fitted, RefitJob
from .statistics_writer import statistics_content
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
    OtherRunError
        The statistics that experts are chosen by are of other weights.
    InterruptedRunError
        `report` asked to stop.
    """
    with ExitStack() as stores:
        run = _LayerRun(context, layer, stores, report)
        # once: what it reads stays in the page cache, and one must name what is wrong
        read = check_weights(context, layer, report) if context.ranks.is_first else {}
        if context.statistics is not None and layer.keys.stack is not None:
            context.statistics.check_read(layer.keys.index, read)
        if layer.keys.stack is None:
            result = run.copy()
        else:
            result = run.observe() if context.plan.settings.observes else run.compress()
        return replace(result, read=read)


class _LayerRun:
    """The phases of one layer with their shared layer, tokens and stores."""

    def __init__(
        self, context: Context, layer: LayerPlan, stores: ExitStack, report: Report
    ) -> None:
        self.context, self.plan, self.layer = context, context.plan, layer
        self.index = layer.keys.index
        # tokens that do not count are masked
        self.tokens = mask_without_next(context.tokens) if layer.keys.is_mtp else context.tokens
        self._stores = stores
        self._passes = LayerPasses(context, layer, stores, report)

    def copy(self) -> LayerResult:
        """Copy a layer without experts, and run it for the next layer."""
        with self.plan.source.open() as tensors:
            content = self._unchanged(tensors).content
            shards = self._write(content, self.context.workspace.output)
        if self.plan.propagates(self.layer):
            self._passes.propagate(self.context.source, None, None)
        if self.plan.tracks_original_through(self.layer):
            with self.context.source.open_layer(self.index) as experts:
                self._passes.follow(experts, None)
        return LayerResult(shards=shards)

    def observe(self) -> LayerResult:
        """Run the source's layer for the next layer, and write what is known of its experts."""
        playback = self._passes.playback()
        with self.context.source.open_layer(self.index) as experts:
            assert experts is not None
            observed, moments = self._gather(experts, None, playback)
            content = statistics_content(self.layer, observed, moments)
            shards = self._write(content, self.context.workspace.output)
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
                        context.ranks,
                    )
                )
            playback = self._passes.playback()
            decision, statistics, shards = self._decide_and_write(refit, playback)
            fitted = None
            if refit is not None:
                fitted = self._fit(refit, decision, playback)
                content = refit.content(fitted.found if fitted else None)
                shards = self._write(content, context.workspace.output)
            if plan.propagates(self.layer):
                self._passes.propagate(context.output, playback, fitted)
            return LayerResult(
                shards=shards,
                statistics=statistics,
                decision=decision,
                refitted=fitted.found.outcome if fitted else None,
            )

    def _decide_and_write(
        self, refit: RefitJob | None, playback: AttentionCache | None
    ) -> tuple[Decision, Written, tuple[Written, ...]]:
        """Return the decision, the file of statistics, and the shards of the layer."""
        source, plan = self.context.source, self.plan
        with source.open_layer(self.index) as experts, plan.source.open() as tensors:
            assert experts is not None
            observed, grams = self._gather(experts, refit, playback)
            matched: dict[int, Matched] = {}
            if grams is None:
                mean_EH = self._compare(experts, observed.sample)
                decision = decide(
                    plan.settings, plan.routing_groups, observed, mean_EH, self.index
                )
                if mean_EH is not None:
                    matched = self._align(decision, experts, tensors, observed.sample)
            else:
                decision = self._cut(observed, experts, tensors, grams)
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
                None if grams is None else cut_of(plan, grams),
            )
            folder = self.context.workspace.output if refit is None else refit.folder
            shards = self._write(content, folder)
        return decision, self._keep_statistics(observed, decision, matched), shards

    def _keep_statistics(
        self, observed: Observed, decision: Decision, matched: dict[int, Matched]
    ) -> Written:
        """Write the layer's statistics, which rank 0 does."""
        told = None
        if self.context.ranks.is_first:
            path = self.context.workspace.statistics(self.index)
            told = asdict(files.write_tensors(path, _statistics(observed, decision, matched)))
        return Written(**self.context.ranks.broadcast(told))

    def _gather(
        self, experts: StreamedExperts, refit: RefitJob | None, playback: AttentionCache | None
    ) -> tuple[Observed, BatchStore | None]:
        """Return what is known of the experts, and their second moments if those are needed.

        It is observed, or has been by an earlier run.
        """
        plan, source = self.plan, self.context.source
        if self.context.statistics is not None:
            stored = self._stores.enter_context(
                self.context.statistics.layer(self.index, plan.settings, source.device)
            )
            return stored, stored.moments
        observer = self._observer()
        grams = self._grams(experts) if plan.settings.sums_moments else None
        with (
            observer.attached(source.router(self.index)),
            nullcontext() if refit is None else refit.capturing(experts),
        ):
            self._passes.observe(observer, experts, playback, refit, grams)
        if plan.tracks_original_through(self.layer):
            self._passes.follow(experts, refit)
        observer.finish(self.index)
        return observer, None if grams is None else grams.store

    def _observer(self) -> Observer:
        """Make an observer of the statistics that the method needs."""
        plan, method = self.plan, self.plan.settings.method
        compares = plan.merges or plan.settings.observes
        sample = None
        if compares:
            sample = TokenSample.drawn(
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
            batch_sequences=plan.schedule.batch_sequences,
            ranks=self.context.ranks,
        )

    def _grams(self, experts: StreamedExperts) -> ActivationGrams:
        """Return the sums of activations that slices are chosen from."""
        context = self.context
        domains = self.plan.domains if self.plan.settings.observes else 1
        store = context.open_batch_store(GRAMS, "grams", domains * experts.count)
        return ActivationGrams(
            self.plan,
            experts,
            self.tokens,
            context.excluded,
            self._stores.enter_context(store),
            context.ranks,
        )

    def _cut(
        self,
        observed: Observed,
        experts: StreamedExperts,
        tensors: MappedTensors,
        grams: BatchStore,
    ) -> Decision:
        """Choose the slices of the experts that stay."""
        with self.context.timed("cut"):
            return choose_slices(
                self.plan,
                observed,
                grams,
                experts,
                tensors,
                self.index,
                lambda done, total: self._passes.step("cut", done, total),
                self.context.ranks,
            )

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
                lambda done: self._passes.step("compare", done, count),
                self.context.ranks,
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
                lambda done, total: self._passes.step("align", done, total),
                self.context.ranks,
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
                self._passes.entering,
                playback,
                lambda done, total: self._passes.step("refit", done, total),
            )

    def _write(self, content: Callable[[str], Content], folder: Path) -> tuple[Written, ...]:
        """Write the layer's shards; a refitted layer is also written before its refit.

        Each rank writes its share, and goes on when all are written.
        """
        final, ranks = folder == self.context.workspace.output, self.context.ranks
        shards, own = self.layer.shards, list[Written]()
        with self.context.timed("write"):
            for number in ranks.own(len(shards)):
                own.append(
                    write_shard(folder, shards[number], finite_content(content, self.index))
                )
                if final:
                    self._passes.step("write", number + 1, len(shards))
            found = in_turn(ranks.gather([asdict(each) for each in own]), len(shards))
            return tuple(Written(**each) for each in found)

    def _unchanged(self, tensors: MappedTensors) -> Unchanged:
        entries, decoded = self.plan.source.entries, self.plan.decoded
        return Unchanged(entries=entries, tensors=tensors, decoded=decoded)


def _statistics(
    observed: Observed, decision: Decision, matched: dict[int, Matched]
) -> dict[str, Tensor]:
    """Return the layer's statistics: sums, distances, and alignment costs."""
    tensors = observed.sums.tensors()
    if decision.distance_EE is not None:
        tensors["distance_EE"] = decision.distance_EE.float()
    if decision.score_EC is not None:
        tensors["score_EC"] = decision.score_EC
        tensors["neuron_SW"] = torch.cat([*decision.neurons.values()]).int()
    if matched:
        aligned: Sequence[tuple[float, float, float]] = [
            (member, found.kept, found.least) for member, found in matched.items()
        ]
        tensors["aligned"] = torch.tensor(aligned, dtype=torch.float64)
    return tensors
