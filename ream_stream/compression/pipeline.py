"""The run: layer after layer, each committed alone; what happens is reported as events.

`compress` is the whole job. Killed at any time, calling it again with the same
arguments goes on after the last committed layer and ends in the same bytes.
"""

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch

from ream_stream import __version__, files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.shards import write_shard
from ream_stream.errors import DeviceFullError, NumbersError, OverBudgetError, RankError
from ream_stream.events import (
    BatchHalved,
    Finished,
    LayerDone,
    Report,
    Started,
    Step,
    no_report,
)
from ream_stream.host_memory import Gauge, gauge, return_freed_memory
from ream_stream.model.device import peak_bytes, release, restart_peak
from ream_stream.model.finite import ExcludedSequences
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.planning.plan import LayerPlan, Plan

from .context import Context
from .finalize import check_names, output_files, write_rest
from .journal import OUTSIDE, Journal, LayerRecord, check_fingerprint, digest, load
from .layer import compress_layer
from .output_tensors import Unchanged
from .source_record import (
    SourceRecord,
    changed_shards,
    check_commit,
    check_others,
    compare,
    renewed,
)
from .statistics import Statistics
from .statistics_writer import write_statistics, write_tokens
from .workspace import Workspace


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
    statistics: Statistics | None = None,
    report: Report = no_report,
    ranks: Ranks = ALONE,
) -> Finished:
    """Compress the planned checkpoint or keep its statistics, or go on with it.

    Parameters
    ----------
    plan, tokens, workspace, statistics
        The run, its calibration set, its folders, locked, and what experts are chosen by.
    device, report, ranks
        Where layers are run; what is called with each event; processes that do it together,
        each with its own `workspace` and `device`. Rank 0 alone holds the lock and commits.

    Raises
    ------
    OtherRunError
        The folder holds a run with other settings or another source.
    InterruptedRunError
        `report` asked to stop; what was committed stays.
    """
    plan, journal, complete = _begin_together(plan, tokens, workspace, report, ranks)
    report(Started(layers=len(plan.layers), committed=len(journal.layers)))
    if plan.budgets.trims_heap:
        return_freed_memory()
    seconds, peak_device_bytes = dict[str, float](), 0
    with gauge() as meter:
        if len(journal.layers) < len(plan.layers):
            plan.fetcher.evict_after(len(journal.layers) - 1)
            plan.fetcher.fetch_outside()
            with ExitStack() as stack:
                context = _open(
                    plan, tokens, workspace, journal, device, statistics, stack, ranks
                )
                for layer in plan.layers[len(journal.layers) :]:
                    plan.fetcher.fetch(layer.keys.index)
                    done = _layer_that_fits(context, layer, journal, meter, report)
                    peak_device_bytes = max(peak_device_bytes, done.peak_device_bytes)
                    report(done)
                    plan.fetcher.evict_after(layer.keys.index)
                seconds = context.seconds
        if not complete and ranks.is_first:
            seconds["finish"] = _finish(plan, tokens, workspace, journal)
        plan.fetcher.evict_all()
    finished = Finished(
        output_bytes=plan.output_bytes,
        source_bytes=plan.source_bytes,
        seconds=seconds,
        peak_anonymous_bytes=meter.highest,
        peak_device_bytes=peak_device_bytes,
        already_complete=complete,
    )
    report(finished)
    return finished


def _begin_together(
    plan: Plan, tokens: Tokens, workspace: Workspace, report: Report, ranks: Ranks
) -> tuple[Plan, Journal, bool]:
    """Begin on rank 0, and read on the others what it wrote; tell whether all is done."""
    journal = None
    if ranks.is_first:
        plan, journal = _begin(plan, tokens, workspace, report)
    complete = ranks.broadcast(workspace.is_complete())
    if journal is None:
        journal = load(workspace.journal)
        plan = replace(plan, schedule=plan.schedule.going_on(journal.schedule))
    ranks.agree("the journal", (digest(asdict(journal)), plan.schedule))
    return plan, journal, complete


def _begin(
    plan: Plan, tokens: Tokens, workspace: Workspace, report: Report
) -> tuple[Plan, Journal]:
    """Claim the folders for a new run, or check the one that is there and keep its schedule."""
    journal, wanted = workspace.begun(), fingerprint(plan, tokens)
    if journal is not None:
        check_fingerprint(journal, wanted, workspace.output)
        plan = replace(plan, schedule=plan.schedule.going_on(journal.schedule))
        touched = _check_source(plan, journal, workspace, report)
    else:
        names = output_files(plan)
        check_names(workspace.output, names)
        touched = set()
        journal = Journal(
            fingerprint=wanted,
            schedule=plan.schedule,
            source=SourceRecord.of(plan.source),
            files=names,
        )
    workspace.claim(journal)
    if touched:
        journal.source = renewed(plan.source, journal.source, touched)
        workspace.save(journal)
    workspace.check_committed(journal)
    workspace.remove_strays(journal)
    return plan, journal


def _check_source(
    plan: Plan, journal: Journal, workspace: Workspace, report: Report
) -> set[str]:
    """Make sure that a run goes on with the source it began with.

    Returns
    -------
    set[str]
        Names of shards that were touched, and have the bytes they had.

    Raises
    ------
    OtherRunError, DamagedError
        The source is another, or lacks a file.
    """
    source, record = plan.source, journal.source
    check_commit(source, record, workspace.output)
    check_others(source, record)
    if source.fetch is not None:
        return set()
    touched = changed_shards(source, record)
    for number, layer in enumerate(plan.layers[: len(journal.layers)] if touched else ()):
        index = layer.keys.index
        compare(source, layer.keys.names, journal.read.get(str(index), {}), touched)
        report(Step(layer=index, phase="check", done=number + 1, total=len(journal.layers)))
    if journal.layers:
        inside = {name for layer in plan.layers for name in layer.keys.names}
        # of what is outside, all is read once more unless the run is at its end
        then = journal.read.get(OUTSIDE, {})
        again = touched if workspace.is_complete() else then.keys()
        compare(source, plan.kept.entries.keys() - inside, then, again)
    return touched


def _open(  # the parts of a context, each given once
    plan: Plan,
    tokens: Tokens,
    workspace: Workspace,
    journal: Journal,
    device: torch.device,
    statistics: Statistics | None,
    stack: ExitStack,
    ranks: Ranks,
) -> Context:
    """Move both models to the device and open what is outside their layers."""
    source, output = plan.source_model, plan.output_model
    source.move(plan.kept, device)
    output.move(plan.output_checkpoint(workspace.output), device)
    stack.enter_context(source.open_outside())
    stack.enter_context(output.open_outside())
    return Context(
        plan=plan,
        tokens=tokens,
        workspace=workspace,
        source=source,
        output=output,
        ranks=ranks,
        excluded=ExcludedSequences(
            tokens, (n for layer in journal.layers for n in layer.excluded)
        ),
        statistics=statistics,
    )


def _layer_that_fits(
    context: Context, layer: LayerPlan, journal: Journal, meter: Gauge, report: Report
) -> LayerDone:
    """Work on one layer, with half as much at once each time device memory is short.

    Nothing of the layer is committed by then, so it begins again. The journal gets the
    smaller batch first: it decides last bits, so a run that goes on must keep it.
    """
    several = context.ranks.size > 1
    while True:
        schedule = context.plan.schedule
        try:
            return _layer(context, layer, journal, meter, report)
        except RankError as error:
            if context.ranks.is_first and error.kind == DeviceFullError.__name__:
                journal.schedule = schedule.halved()
                context.workspace.save(journal)
            raise
        except torch.OutOfMemoryError as error:
            if schedule.batch_sequences == 1 and not schedule.resident_experts:
                raise OverBudgetError(
                    f"layer {layer.keys.index} does not fit the device with one sequence at a "
                    f"time ({str(error).splitlines()[0]}); run it with shorter sequences "
                    "(--sequence-length) or --device cpu"
                ) from error
            if several:  # the others are in the middle of it
                if context.ranks.is_first:
                    journal.schedule = schedule.halved()
                    context.workspace.save(journal)
                raise DeviceFullError(
                    f"layer {layer.keys.index} does not fit the device "
                    f"({str(error).splitlines()[0]}): start all ranks again to go on with half "
                    "as much at once"
                ) from error
        # here and not above: the error's traceback holds what was on the device
        release(context.source.device)
        journal.schedule = schedule.halved()
        context.plan = replace(context.plan, schedule=journal.schedule)
        context.workspace.save(journal)
        report(
            BatchHalved(
                layer=layer.keys.index,
                batch_sequences=journal.schedule.batch_sequences,
                resident_experts=journal.schedule.resident_experts,
            )
        )


def _layer(
    context: Context, layer: LayerPlan, journal: Journal, meter: Gauge, report: Report
) -> LayerDone:
    """Work on one layer and commit it."""
    before, index, plan = dict(context.seconds), layer.keys.index, context.plan
    meter.restart()
    restart_peak(context.source.device)
    plan.source.check_unchanged(layer.keys.names)
    try:
        result = compress_layer(context, layer, report)
    except NumbersError as error:
        if context.ranks.is_first and error.file in journal.source.shards:
            # a better one is welcome: only what was read of it must be the same
            shards = {n: s for n, s in journal.source.shards.items() if n != error.file}
            journal.source = replace(journal.source, shards=shards)
            context.workspace.save(journal)
        raise
    plan.source.check_unchanged(layer.keys.names)
    decision = result.decision
    context.ranks.agree(f"layer {index}", (decision, result.refitted))
    is_last = index == len(plan.layers) - 1
    known = {number for done in journal.layers for number in done.excluded}
    record = LayerRecord(
        index=index,
        shards=result.shards,
        hidden=None
        if is_last or not plan.settings.runs_layers
        else context.workspace.hidden(index + 1).name,
        original=context.workspace.original(index + 1).name
        if plan.tracks_original and not is_last
        else None,
        statistics=result.statistics,
        saliency=decision.saliency if decision else None,
        domain_saliency=decision.domain_saliency if decision else {},
        groups=decision.groups if decision else None,
        refitted=result.refitted,
        excluded=tuple(number for number in context.excluded if number not in known),
    )
    journal.layers.append(record)
    journal.read.update((part, dict(read)) for part, read in result.read.items())
    if context.ranks.is_first:
        context.workspace.save(journal)
        files.remove(context.workspace.hidden(index))
        if plan.tracks_original:
            files.remove(context.workspace.original(index))
    groups = decision.groups if decision else ()
    return LayerDone(
        layer=index,
        experts_before=plan.num_experts if layer.keys.stack else 0,
        experts_after=len(groups),
        changed=sum(len(group) > 1 for group in groups),
        refitted=result.refitted,
        read_bytes=sum(plan.source.entries[name].nbytes for name in layer.keys.names),
        written_bytes=sum(shard.size for shard in result.shards),
        seconds={k: v - before.get(k, 0.0) for k, v in context.seconds.items()},
        peak_anonymous_bytes=meter.peak,
        peak_device_bytes=peak_bytes(context.source.device),
        excluded=len(context.excluded),
    )


def _finish(plan: Plan, tokens: Tokens, workspace: Workspace, journal: Journal) -> float:
    """Write what is outside the layers, then what completes the output; return the seconds."""
    start = time.perf_counter()
    plan.fetcher.fetch_outside()
    with plan.source.open() as tensors:
        unchanged = Unchanged(
            entries=plan.source.entries, tensors=tensors, decoded=plan.decoded
        )
        for shard in plan.outside[len(journal.outside) :]:
            written = write_shard(workspace.output, shard, unchanged.content)
            plan.source.check_unchanged(
                name for tensor in shard.tensors for name in unchanged.origins(tensor.name)
            )
            journal.outside.append(written)
            workspace.save(journal)
    if plan.settings.observes:
        if not journal.outside:
            journal.outside.append(write_tokens(tokens, workspace.output))
            workspace.save(journal)
        write_statistics(plan, tokens, workspace.output, journal)
    else:
        write_rest(plan, tokens, workspace, journal)
    return time.perf_counter() - start
