"""One layer: observe it, decide which experts go, write its shards, run it again.

Everything a layer does happens here up to its commit, which is the pipeline's.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ream_stream import files
from ream_stream.calibration.tokens import Tokens, followed
from ream_stream.checkpoint.header import TensorEntry
from ream_stream.checkpoint.reader import MappedTensors
from ream_stream.checkpoint.shards import Content, write_shard
from ream_stream.errors import DamagedError, NumbersError
from ream_stream.events import Phase, Refitted, Step
from ream_stream.files import FileRange, Written
from ream_stream.model.attention_cache import Playback
from ream_stream.model.batch_store import Kept, keeping
from ream_stream.model.batches import Batches, with_states
from ream_stream.model.expert_blocks import Passes
from ream_stream.model.experts import StreamedExperts
from ream_stream.model.finite import CheckedWriter, Excluded, is_finite, not_finite
from ream_stream.model.hidden_states import HiddenStates, HiddenWriter
from ream_stream.model.streamed_model import Batch, StreamedModel
from ream_stream.planning.allocation import OUTPUTS, SUMS
from ream_stream.planning.plan import LayerPlan, Plan

from .decision import Decision, alignment_orders, decide
from .journal import Workspace
from .observer import Observer, TokenSample, mean_outputs
from .output_tensors import Unchanged, layer_content
from .refit_layer import RefitJob


@dataclass(kw_only=True, slots=True)
class Context:
    """What all layers of a run share."""

    plan: Plan
    """What was planned."""

    tokens: Tokens
    """The calibration set."""

    workspace: Workspace
    """Where files go."""

    source: StreamedModel
    """The model as it is."""

    output: StreamedModel
    """The compressed model; its layer l can be loaded once it was written."""

    batch_sequences: int
    """Sequences of a batch."""

    expert_blocks: int
    """Blocks that a layer's experts are run in."""

    threads: int
    """For the assignments of the alignment."""

    excluded: Excluded
    """Calibration sequences that are left out."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent by phase."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Book the time of the block on a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @property
    def batches(self) -> Batches:
        """The calibration set in batches."""
        return Batches(self.tokens, self.batch_sequences)

    def hidden_reader(self, boundary: int) -> HiddenStates | None:
        """Open the states that enter a layer; None for the first, which takes embeddings."""
        return self._reader(self.workspace.hidden(boundary)) if boundary else None

    def original_reader(self, boundary: int) -> HiddenStates | None:
        """Open the same of the original model."""
        return self._reader(self.workspace.original(boundary)) if boundary else None

    def hidden_writer(self, boundary: int) -> CheckedWriter:
        """Begin the states that enter a layer."""
        return self._writer(self.workspace.hidden(boundary), boundary)

    def original_writer(self, boundary: int) -> CheckedWriter:
        """Begin the same of the original model."""
        return self._writer(self.workspace.original(boundary), boundary)

    def _reader(self, path: Path) -> HiddenStates:
        plan = self.plan
        return HiddenStates(path, plan.hidden_shape, plan.dtype, self.batch_sequences)

    def _writer(self, path: Path, boundary: int) -> CheckedWriter:
        plan, batch = self.plan, self.batch_sequences
        writer = HiddenWriter(path, plan.hidden_shape, plan.dtype, batch)
        return CheckedWriter(writer, self.excluded, boundary - 1, batch)

    def keeping(self, part: str, name: str) -> AbstractContextManager[Kept]:
        """Keep tensors of batches for the length of a block, where the plan has the part."""
        path = self.workspace.scratch(name) if self.plan.scratch.get(part) else None
        return keeping(path, len(self.batches))


class LayerJob:
    """The work on one layer; after `steps` its results are in the attributes."""

    def __init__(self, context: Context, layer: LayerPlan) -> None:
        self.context, self.plan, self.layer = context, context.plan, layer
        self.index = layer.keys.index
        self.is_last = self.index == len(context.plan.layers) - 1
        # those that count
        self.tokens = followed(context.tokens) if layer.keys.is_mtp else context.tokens
        self.shards: list[Written] = []
        self.statistics: Written | None = None
        self._aligned: list[tuple[float, float, float]] = []
        self.decision: Decision | None = None
        self.refitted: Refitted | None = None
        self._refit: RefitJob | None = None
        if layer.keys.stack is not None and self.plan.refits:
            self._refit = RefitJob(
                self.plan,
                self.tokens,
                context.workspace,
                context.excluded,
                context.output,
                self.index,
            )
        self._playback: Playback | None = None
        self._stores = ExitStack()
        self._hidden = context.hidden_reader(self.index)

    def steps(self) -> Iterator[Step]:
        """Do the layer's phases in order."""
        with self._stores:
            yield from self._phases()

    def _phases(self) -> Iterator[Step]:
        yield from self._check()
        if self.layer.keys.stack is None:
            yield from self._copy()
            if not self.is_last:
                yield from self._propagate(self.context.source)
            if not self.is_last and self.plan.follows:
                with self.context.source.open_layer(self.index):
                    yield from self._follow(None)
            return
        with nullcontext() if self._refit is None else self._refit.open():
            yield from self._compress()
            if self._refit is not None:
                yield from self._change(self._refit)
            if self.plan.settings.sequential and not self.is_last:
                yield from self._propagate(self.context.output)

    def _check(self) -> Iterator[Step]:
        """Make sure that the layer's weights are numbers; with the first, those of no layer."""
        names = list(self.layer.keys.names)
        if self.index == 0:
            names += self.context.source.outside_names
        entries = self.plan.source.entries
        with self.context.timed("check"), self.plan.source.open() as tensors:
            for done, (name, bad) in enumerate(not_finite(tensors, names), start=1):
                if bad:
                    raise NumbersError(
                        f"{name} in {entries[name].path} holds NaN or infinite numbers "
                        f"(found at layer {self.index}): fetch the file again"
                    )
                yield self._step("check", done, len(names))
            table, stack = self.layer.table, self.layer.keys.stack
            if table is not None and stack is not None:
                lowest, highest = (int(end) for end in tensors[table].aminmax())
                if lowest < 0 or highest >= stack.count:
                    raise DamagedError(
                        f"{table} in {entries[table].path} names experts {lowest} to "
                        f"{highest}, the layer has 0 to {stack.count - 1}: fetch it again"
                    )

    def _compress(self) -> Iterator[Step]:
        source, method = self.context.source, self.plan.settings.method
        refit, stack = self._refit, self.layer.keys.stack
        assert stack is not None
        observer = self._observer()
        with source.open_layer(self.index) as experts, self.plan.source.open() as tensors:
            assert experts is not None
            with (
                observer.listening(source.router(self.index), experts),
                nullcontext() if refit is None else refit.hearing(experts),
            ):
                yield from self._observe(observer, experts)
            if refit is not None and self.plan.follows:
                yield from self._follow(refit)
            observer.finish(self.index)
            mean_EH = None
            if observer.sample is not None:
                stack = experts.weights.stack
                means = torch.zeros(stack.count, stack.hidden).double()
                with self.context.timed("compare"):
                    for done in mean_outputs(
                        experts, observer.sample, method.similarity, means
                    ):
                        yield self._step("compare", done, len(means))
                mean_EH = means
                if (bad_E := ~means.isfinite().all(dim=1)).any():
                    raise NumbersError(
                        f"layer {self.index}: the mean output of expert "
                        f"{int(bad_E.int().argmax())} is not finite; --compute-dtype float32 "
                        "has more range"
                    )
            self.decision = decide(
                self.plan.settings, self.plan.routing_groups, observer, mean_EH, self.index
            )
            orders: dict[int, Tensor] = {}
            if mean_EH is not None:
                yield from self._align(experts, tensors, observer.sample, orders)
            output = self.layer.stack
            assert output is not None
            content = layer_content(
                self.decision,
                orders,
                stack,
                output,
                self.layer.routers,
                self.layer.table,
                self._unchanged(tensors),
            )
            folder = self.context.workspace.output if refit is None else refit.folder
            yield from self._write(content, folder)
        path = self.context.workspace.statistics(self.index)
        self.statistics = files.write_tensors(path, self._told(observer))

    def _observer(self) -> Observer:
        """Make an observer of what the method needs, and no more."""
        plan, method = self.plan, self.plan.settings.method
        compares = plan.settings.merges(plan.num_experts)
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

    def _observe(self, observer: Observer, experts: StreamedExperts) -> Iterator[Step]:
        """Run the source layer: up to its experts, unless its outputs go on to the next."""
        plan, sequential = self.plan, self.plan.settings.sequential
        again = self._refit is not None or (sequential and not self.is_last)
        if (again or self.context.expert_blocks > 1) and plan.keeps(OUTPUTS):
            # of this object it must not know: in a cycle, all that a layer held would stay
            stores, context = self._stores, self.context
            self._playback = Playback(
                lambda name: stores.enter_context(context.keeping(OUTPUTS, name))
            )
        writer = None
        if not sequential and not self.is_last:
            writer = self.context.hidden_writer(self.index + 1)

        def expect(number: int, batch: Batch) -> None:
            first = number * self.context.batch_sequences * plan.sequence_length
            observer.expect(batch, first)

        with self.context.timed("observe"):
            yield from self._run("observe", self.context.source, experts, writer, expect)

    def _follow(self, refit: RefitJob | None) -> Iterator[Step]:
        """Run the open source layer on the original model's own states."""
        context, index = self.context, self.index
        batches, entering = context.batches, context.original_reader(index)
        writer = None if self.is_last else context.original_writer(index + 1)
        with context.timed("follow"):
            for number, batch, hidden_BLH in with_states(batches, entering):
                leaving_BLH = context.source.run_layer(index, batch, hidden_BLH)
                if refit is not None:
                    refit.want(number, leaving_BLH)
                if writer is not None:
                    writer.write(number, leaving_BLH)
                yield self._step("follow", number + 1, len(batches))
            if writer is not None:
                writer.publish()

    def _run(
        self,
        phase: Phase,
        model: StreamedModel,
        experts: StreamedExperts | None,
        writer: CheckedWriter | None,
        expect: Callable[[int, Batch], None] = lambda _number, _batch: None,
    ) -> Iterator[Step]:
        """Run the layer on all batches; to its end if what leaves it is to be written."""
        context, batches = self.context, self.context.batches
        if experts is not None:
            experts.weights.resident = self.plan.resident_experts
        with ExitStack() as stack:
            sums = None
            if writer is not None and context.expert_blocks > 1:
                sums = stack.enter_context(context.keeping(SUMS, "sums"))
            passes = Passes(
                model=model,
                index=self.index,
                experts=experts,
                blocks=context.expert_blocks,
                playback=self._playback,
                sums=sums,
                hears_sums=self._refit is not None and not self.plan.follows,
            )
            total = len(passes) * len(batches)
            run = passes.run(batches, self._hidden, expect=expect, only_listening=not writer)
            for done, (number, leaving_BLH) in enumerate(run, start=1):
                if writer is not None and leaving_BLH is not None:
                    writer.write(number, leaving_BLH)
                yield self._step(phase, done, total)
        if writer is not None:
            writer.publish()

    def _told(self, observer: Observer) -> dict[str, Tensor]:
        """Return what is kept of the layer: sums, distances, and what alignment gained."""
        tensors = observer.sums.tensors()
        if self.decision is not None and self.decision.distance_EE is not None:
            tensors["distance_EE"] = self.decision.distance_EE.float()
        if self._aligned:
            tensors["aligned"] = torch.tensor(self._aligned, dtype=torch.float64)
        return tensors

    def _align(
        self,
        experts: StreamedExperts,
        tensors: MappedTensors,
        sample: TokenSample | None,
        orders: dict[int, Tensor],
    ) -> Iterator[Step]:
        method, threads = self.plan.settings.method, self.context.threads
        assert self.decision is not None
        total = sum(len(group) - 1 for group in self.decision.groups)
        with self.context.timed("align"):
            found = alignment_orders(method, self.decision, experts, tensors, sample, threads)
            for member, matched in found:
                orders[member] = matched.order_I
                self._aligned.append((member, matched.kept, matched.least))
                yield self._step("align", len(orders), total)

    def _change(self, refit: RefitJob) -> Iterator[Step]:
        """Refit the layer that was written to a scratch folder, and write the final one."""
        assert self.decision is not None
        only_merged = self.plan.settings.method.refit_experts == "changed"
        changing = [
            number
            for number, group in enumerate(self.decision.groups)
            if len(group) > 1 or not only_merged
        ]
        if changing:
            with self.context.timed("refit"):
                steps = refit.steps(
                    changing, self.context.batches, self._hidden, self._playback
                )
                for done, total in steps:
                    yield self._step("refit", done, total)
            self.refitted = refit.outcome
        yield from self._write(refit.content(), self.context.workspace.output)

    def _write(self, content: Callable[[str], Content], folder: Path) -> Iterator[Step]:
        """Write the layer's shards; of a layer that is refitted there is a first version."""
        final = folder == self.context.workspace.output
        with self.context.timed("write"):
            for number, shard in enumerate(self.layer.shards, start=1):
                written = write_shard(folder, shard, self._finite(content))
                if final:
                    self.shards.append(written)
                    yield self._step("write", number, len(self.layer.shards))

    def _finite(self, content: Callable[[str], Content]) -> Callable[[str], Content]:
        """Return the same content, which refuses to make numbers that are not finite."""

        def checked(name: str) -> Content:
            value = content(name)
            if isinstance(value, TensorEntry):
                return value
            return piece(name, value) if isinstance(value, Tensor) else pieces(name, value)

        def pieces(
            name: str, values: Iterable[Tensor | FileRange]
        ) -> Iterator[Tensor | FileRange]:
            for value in values:
                yield value if isinstance(value, FileRange) else piece(name, value)

        def piece(name: str, value: Tensor) -> Tensor:
            if not is_finite(value):
                raise NumbersError(
                    f"layer {self.index}: merging makes numbers of {name} that are not finite"
                )
            return value

        return checked

    def _copy(self) -> Iterator[Step]:
        with self.plan.source.open() as tensors:
            yield from self._write(
                self._unchanged(tensors).content, self.context.workspace.output
            )

    def _unchanged(self, tensors: MappedTensors) -> Unchanged:
        entries, decoded = self.plan.source.entries, self.plan.decoded
        return Unchanged(entries=entries, tensors=tensors, decoded=decoded)

    def _propagate(self, model: StreamedModel) -> Iterator[Step]:
        """Run the layer, as `model` has it, to give what enters the next."""
        with self.context.timed("propagate"):
            writer = self.context.hidden_writer(self.index + 1)
            with model.open_layer(self.index) as experts, ExitStack() as stack:
                if self._refit is not None and experts is not None:
                    stack.enter_context(self._refit.answering(experts))
                yield from self._run("propagate", model, experts, writer)

    def _step(self, phase: Phase, done: int, total: int) -> Step:
        return Step(layer=self.index, phase=phase, done=done, total=total)
