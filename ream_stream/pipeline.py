"""The run: layer after layer, each committed alone; what happened is yielded as events.

`compress` is the whole job. Killed at any time, calling it again with the same
arguments goes on after the last committed layer and ends in the same bytes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from . import __version__, durable
from .calibration.hidden import HiddenStates, HiddenWriter
from .calibration.tokens import Tokens
from .checkpoint.shards import write_shard
from .durable import Written
from .errors import InterruptedRunError
from .events import Event, Finished, LayerDone, Phase, Started, Step
from .finish import write_rest
from .journal import (
    Journal,
    LayerRecord,
    Workspace,
    check_fingerprint,
    load,
    save,
)
from .layer import (
    Decision,
    Observer,
    Playback,
    TokenSample,
    alignment_orders,
    decide,
    layer_content,
    mean_outputs,
)
from .memory import Gauge, gauge
from .method.alignment import ALIGNMENTS
from .model import Batch, StreamedModel
from .plan import LayerPlan, Plan

StopRequest = Callable[[], int | None]
"""Tells the number of a signal that asked the run to stop, or None."""


def fingerprint(plan: Plan, tokens: Tokens) -> dict[str, Any]:
    """Return all that decides the bytes of the output, by field."""
    return {
        "version": __version__,
        "source": plan.source.digest(),
        "calibration": tokens.digest,
        **plan.settings.fields(),
    }


def compress(
    plan: Plan,
    tokens: Tokens,
    workspace: Workspace,
    *,
    device: torch.device,
    threads: int,
    stop_requested: StopRequest = lambda: None,
) -> Iterator[Event]:
    """Compress the planned checkpoint, or go on with it.

    Parameters
    ----------
    plan
        From `plan.make_plan`.
    tokens
        The calibration set.
    workspace
        Where the output and the work files go; the caller holds its lock.
    device
        Where layers are run.
    threads
        For the assignments of the alignment.
    stop_requested
        Asked after every batch and expert.

    Yields
    ------
    Event
        What happened.

    Raises
    ------
    OtherRunError
        The folder holds a run with other settings or another source.
    InterruptedRunError
        A stop was requested; what was committed stays.
    """
    workspace.check_is_ours()
    wanted = fingerprint(plan, tokens)
    if workspace.journal.is_file():
        journal = load(workspace)
        check_fingerprint(journal, wanted, workspace.output)
    else:
        journal = Journal(fingerprint=wanted, machine={"batch_sequences": plan.batch_sequences})
        save(workspace, journal)
    workspace.check_committed(journal)
    workspace.remove_strays(journal)
    yield Started(layers=len(plan.layers), committed=len(journal.layers), lock_left_by=None)
    with gauge() as meter:
        run = _Run(plan, tokens, workspace, journal, device, threads, stop_requested, meter)
        yield from run.all()


class _Run:
    """State of one call of `compress`."""

    def __init__(  # noqa: PLR0913 - the fields of a run, passed once
        self,
        plan: Plan,
        tokens: Tokens,
        workspace: Workspace,
        journal: Journal,
        device: torch.device,
        threads: int,
        stop_requested: StopRequest,
        meter: Gauge,
    ) -> None:
        self.plan, self.tokens = plan, tokens
        self.workspace, self.journal = workspace, journal
        self.device, self.threads = device, threads
        self.stop_requested, self.meter = stop_requested, meter
        self.batch = journal.machine["batch_sequences"]
        mask = tokens.attention_mask_SL
        self.mask_SL = torch.ones_like(tokens.input_ids_SL) if mask is None else mask
        self.seconds: dict[str, float] = {}
        self.peak = 0

    def all(self) -> Iterator[Event]:
        """Do what is left to do."""
        complete = (self.workspace.output / "ream_stream.json").is_file()
        if len(self.journal.layers) < len(self.plan.layers):
            yield from self._layers()
        if not complete:
            self._finish()
        yield Finished(
            output_bytes=self.plan.output_bytes,
            source_bytes=self.plan.source_bytes,
            seconds=self.seconds,
            peak_anonymous_bytes=max(self.peak, self.meter.peak),
            already_complete=complete,
        )

    def _layers(self) -> Iterator[Event]:
        source = StreamedModel(self.plan.source, self.plan.dtype, self.device)
        output = StreamedModel(
            self.plan.output_checkpoint(self.workspace.output), self.plan.dtype, self.device
        )
        with ExitStack() as stack:
            stack.enter_context(source.open_outside())
            stack.enter_context(output.open_outside())
            for layer in self.plan.layers[len(self.journal.layers) :]:
                yield from self._layer(layer, source, output)

    def _layer(
        self, layer: LayerPlan, source: StreamedModel, output: StreamedModel
    ) -> Iterator[Event]:
        before = dict(self.seconds)
        self.meter.peak = 0
        job = _LayerJob(self, layer, source, output)
        yield from job.steps()
        index = layer.keys.index
        record = LayerRecord(
            index=index,
            shards=tuple(job.shards),
            hidden=None if job.is_last else self.workspace.hidden(index + 1).name,
            statistics=job.statistics,
            saliency=job.decision.saliency if job.decision else None,
            groups=job.decision.groups if job.decision else None,
        )
        self.journal.layers.append(record)
        save(self.workspace, self.journal)
        durable.remove(self.workspace.hidden(index))
        self.peak = max(self.peak, self.meter.peak)
        groups = job.decision.groups if job.decision else ()
        yield LayerDone(
            layer=index,
            experts_before=self.plan.num_experts if groups else 0,
            experts_after=len(groups),
            changed=sum(len(group) > 1 for group in groups),
            read_bytes=sum(self.plan.source.entries[n].nbytes for n in layer.keys.names),
            written_bytes=sum(shard.size for shard in job.shards),
            seconds={k: v - before.get(k, 0.0) for k, v in self.seconds.items()},
            peak_anonymous_bytes=self.meter.peak,
        )

    def _finish(self) -> None:
        start = time.perf_counter()
        for shard in self.plan.outside[len(self.journal.outside) :]:
            entries = self.plan.source.entries
            written = write_shard(self.workspace.output, shard, lambda name: entries[name])
            self.journal.outside.append(written)
            save(self.workspace, self.journal)
        write_rest(self.plan, self.tokens, self.workspace, self.journal)
        self.spend("finish", start)

    def spend(self, phase: str, start: float) -> None:
        """Book the time since `start` on a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def check_stop(self) -> None:
        """Stop here if a signal asked for it."""
        number = self.stop_requested()
        if number is not None:
            raise InterruptedRunError(
                f"stopped after {len(self.journal.layers)} of {len(self.plan.layers)} layers; "
                "run the same command again to go on",
                signal_number=number,
            )


class _LayerJob:
    """One layer of a run, up to its commit."""

    def __init__(
        self, run: _Run, layer: LayerPlan, source: StreamedModel, output: StreamedModel
    ) -> None:
        self.run, self.plan, self.layer = run, run.plan, layer
        self.source, self.output = source, output
        self.index = layer.keys.index
        self.is_last = self.index == len(run.plan.layers) - 1
        self.shards: list[Written] = []
        self.statistics: Written | None = None
        self.decision: Decision | None = None
        self._playback: Playback | None = None
        self._hidden = self._open_hidden()

    def steps(self) -> Iterator[Step]:
        """Do the layer's phases in order."""
        if self.layer.keys.stack is None:
            yield from self._copy_shards()
            if not self.is_last:
                yield from self._propagate(self.source)
            return
        yield from self._compress()
        if self.plan.settings.sequential and not self.is_last:
            yield from self._propagate(self.output)

    def _compress(self) -> Iterator[Step]:
        plan, settings, keys = self.plan, self.plan.settings, self.layer.keys
        method, stack = settings.method, keys.stack
        compares = method.grouping != "none" and settings.experts < plan.num_experts
        sample = None
        if compares:
            sample = TokenSample(
                self.run.mask_SL, method.similarity_tokens, seed=settings.seed, layer=self.index
            )
        observer = Observer(
            plan.family,
            plan.num_experts,
            sample,
            gate_term=compares and method.gate_term,
            device=self.run.device,
        )
        assert stack is not None  # noqa: S101 - dense layers do not come here
        with self.source.open_layer(self.index) as experts, plan.source.open() as tensors:
            assert experts is not None  # noqa: S101
            with observer.listening(self.source.router(self.index), experts):
                yield from self._observe(observer)
            mean_EH = None
            if sample is not None:
                yield from self._compare(mean_outputs(experts, sample, method.similarity))
                mean_EH = self._mean_EH
            self.decision = decide(settings, plan.routing_groups, observer, mean_EH, self.index)
            orders: dict[int, Tensor] = {}
            start = time.perf_counter()
            total = plan.num_experts - settings.experts if compares else 0
            if compares:
                for member, order_I in alignment_orders(
                    method, self.decision, experts, tensors, sample, self.run.threads
                ):
                    orders[member] = order_I
                    yield self._step("align", len(orders), total)
            self.run.spend("align", start)
            start = time.perf_counter()
            content = layer_content(
                self.decision, orders, stack, self.layer.routers, plan.source.entries, tensors
            )
            for shard in self.layer.shards:
                self.shards.append(write_shard(self.run.workspace.output, shard, content))
                yield self._step("write", len(self.shards), len(self.layer.shards))
            self.run.spend("write", start)
        self.statistics = durable.write_tensors(
            self.run.workspace.statistics(self.index), observer.sums.tensors()
        )

    def _copy_shards(self) -> Iterator[Step]:
        start = time.perf_counter()
        entries = self.plan.source.entries
        for shard in self.layer.shards:
            written = write_shard(self.run.workspace.output, shard, lambda name: entries[name])
            self.shards.append(written)
            yield self._step("write", len(self.shards), len(self.layer.shards))
        self.run.spend("write", start)

    def _observe(self, observer: Observer) -> Iterator[Step]:
        start = time.perf_counter()
        sequential = self.plan.settings.sequential
        writer = None if sequential or self.is_last else self._writer()
        with ExitStack() as stack:
            if sequential and not self.is_last and self._playback_fits():
                self._playback = Playback()
                stack.enter_context(self._playback.recording(self.source.mixers(self.index)))
            for number, batch, hidden_BLH in self._batches():
                mask_BL = self.run.mask_SL[number * self.run.batch :][: self.run.batch]
                position = number * self.run.batch * self.plan.sequence_length
                observer.expect(mask_BL, position)
                if writer is None:
                    self.source.observe_layer(self.index, batch, hidden_BLH)
                else:
                    writer.write(number, self.source.run_layer(self.index, batch, hidden_BLH))
                yield self._step("observe", number + 1, self._num_batches)
        if writer is not None:
            writer.publish()
        self.run.spend("observe", start)

    def _compare(self, means: Iterator[Tensor | None]) -> Iterator[Step]:
        start = time.perf_counter()
        for done, mean_EH in enumerate(means, start=1):
            if mean_EH is not None:
                self._mean_EH = mean_EH
            else:
                yield self._step("compare", done, self.plan.num_experts)
        self.run.spend("compare", start)

    def _propagate(self, model: StreamedModel) -> Iterator[Step]:
        start = time.perf_counter()
        writer = self._writer()
        with ExitStack() as stack:
            stack.enter_context(model.open_layer(self.index))
            if self._playback is not None:
                stack.enter_context(self._playback.playing(model.mixers(self.index)))
            for number, batch, hidden_BLH in self._batches():
                writer.write(number, model.run_layer(self.index, batch, hidden_BLH))
                yield self._step("propagate", number + 1, self._num_batches)
        writer.publish()
        self.run.spend("propagate", start)

    def _playback_fits(self) -> bool:
        return self.plan.memory["attention outputs"] > 0

    def _batches(self) -> Iterator[tuple[int, Batch, Tensor | None]]:
        tokens = self.run.tokens
        for number in range(self._num_batches):
            rows = slice(number * self.run.batch, (number + 1) * self.run.batch)
            mask = tokens.attention_mask_SL
            batch = Batch(
                input_ids_BL=tokens.input_ids_SL[rows],
                attention_mask_BL=None if mask is None else mask[rows],
            )
            yield number, batch, None if self._hidden is None else self._hidden.read(number)

    @property
    def _num_batches(self) -> int:
        return -(-self.plan.sequences // self.run.batch)

    def _open_hidden(self) -> HiddenStates | None:
        if self.index == 0:
            return None
        path = self.run.workspace.hidden(self.index)
        return HiddenStates(path, self.plan.hidden_shape, self.plan.dtype, self.run.batch)

    def _writer(self) -> HiddenWriter:
        path = self.run.workspace.hidden(self.index + 1)
        return HiddenWriter(path, self.plan.hidden_shape, self.plan.dtype, self.run.batch)

    def _step(self, phase: Phase, done: int, total: int) -> Step:
        self.run.check_stop()
        return Step(layer=self.index, phase=phase, done=done, total=total)
