"""Makes the plan of a run, from headers alone.

A plan is made before anything is written or spent. It lays out every shard of
the output and checks it against transformers' own class for the compressed
config, so that a checkpoint which would not load is refused before the first
layer.
"""

from dataclasses import replace
from pathlib import Path

import torch

from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.compression.journal import Journal, Workspace
from ream_stream.errors import OverBudgetError, UnsupportedModelError, UsageError
from ream_stream.files import free_bytes, same_disk
from ream_stream.host_memory import anonymous_bytes, available_bytes
from ream_stream.model.families import family_of, text_config
from ream_stream.model.mtp import find_mtp, why_unknown
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.settings import Settings, check_settings
from ream_stream.units import format_size

from .activation_memory import Footprints
from .allocation import Limits, allot
from .memory import Parts, Size
from .output_layout import decoded_matrices, lay_out, output_config
from .plan import Plan
from .refit_memory import Solver

RAM_SHARE = 0.8
"""Share of the free memory that is used if no budget is given."""


def make_plan(
    source: Checkpoint,
    settings: Settings,
    sequences: int,
    sequence_length: int,
    *,
    ram: int | None = None,
    vram: int | None = None,
    disk: int | None = None,
    padded: bool = True,
    workspace: Workspace | None = None,
    journal: Journal | None = None,
) -> Plan:
    """Plan a run.

    Parameters
    ----------
    source
        The checkpoint to compress.
    settings
        What was asked for.
    sequences, sequence_length
        Size of the calibration set.
    ram
        Budget of anonymous host memory, bytes; None for most of what is free.
    vram
        Budget of device memory; None if layers run on the processor.
    disk
        Budget of what output and work folder hold together; None for no limit.
    padded
        Whether there is padding in the calibration set; True if that is not known.
    workspace
        Where the run writes, if that is known: its disk has so much free.
    journal
        Of the run that is gone on with, whose batch is kept.

    Raises
    ------
    UnsupportedModelError
        The checkpoint cannot be compressed.
    UsageError
        The counts asked for do not work for it.
    OverBudgetError
        The run needs more memory or disk than the budget.
    """
    available = available_bytes()
    family = family_of(source.config)
    dtype: torch.dtype = getattr(torch, settings.compute_dtype)
    kept = source
    if settings.mtp == "drop":
        gone = find_mtp(source.entries, source.config)
        left = {name: entry for name, entry in source.entries.items() if name not in gone}
        kept = replace(source, entries=left)
    model = StreamedModel(kept, dtype, torch.device("cpu"))
    stacks = [layer.stack for layer in model.layers if layer.stack]
    if not stacks:
        raise UnsupportedModelError(f"{source.folder} is a dense model: it has no experts")
    _check_all_owned(kept, model)
    num_experts = stacks[0].count
    if any(stack.count != num_experts for stack in stacks):
        raise UnsupportedModelError("layers have different numbers of experts")
    routing = family.routing(model.text_config, model.top_k)
    check_settings(settings, num_experts)
    if problem := routing.problem(settings.experts):
        raise UsageError(f"--experts {settings.experts}: {problem}")
    decoded = decoded_matrices(model) if settings.decodes else {}
    layers, outside = lay_out(model, family, num_experts, settings, decoded)
    shards = [*(shard for layer in layers for shard in layer.shards), *outside]
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    names += [name for name, _ in model.model.named_modules()]
    size = Size(
        sequences=sequences,
        length=sequence_length,
        threads=torch.get_num_threads(),
        top_k=model.top_k,
        padded=padded,
    )
    footprints = Footprints(model)
    if settings.follows(num_experts):
        _check_adds(footprints, source)
    parts = Parts(footprints, settings, size, on_device=vram is not None)
    plan = Plan(
        settings=settings,
        source=source,
        kept=kept,
        config=output_config(source, family, settings, names),
        family=family,
        num_experts=num_experts,
        top_k=model.top_k,
        routing_groups=routing.groups,
        layers=layers,
        outside=outside,
        decoded=decoded,
        sequences=sequences,
        sequence_length=sequence_length,
        batch_sequences=sequences,
        expert_blocks=1,
        resident_experts=0,
        hidden_size=model.hidden_size,
        memory={},
        solver=parts.solvers[0],
        device_memory={},
        scratch={},
        steady=ram is not None,
    )
    # builds the compressed config's own class: refuses shapes that would not load
    StreamedModel(plan.output_checkpoint(source.folder), dtype, torch.device("cpu"))
    limits = Limits(
        ram=ram if ram is not None else int(RAM_SHARE * available),
        steady=ram is not None,
        available=available + anonymous_bytes(),
        disk=_scratch_room(plan, disk, workspace, journal),
        vram=vram,
        batch_sequences=journal.machine["batch_sequences"] if journal else None,
        expert_blocks=journal.machine["expert_blocks"] if journal else None,
        solver=Solver(**journal.machine["solver"])
        if journal and "solver" in journal.machine
        else None,
    )
    allotment = allot(parts, limits, sequences=sequences, length=sequence_length)
    return replace(
        plan,
        batch_sequences=allotment.batch_sequences,
        expert_blocks=allotment.expert_blocks,
        resident_experts=allotment.resident_experts,
        memory=allotment.memory,
        solver=allotment.solver,
        device_memory=allotment.device,
        scratch=allotment.scratch,
    )


def _scratch_room(
    plan: Plan, disk: int | None, workspace: Workspace | None, journal: Journal | None
) -> int | None:
    """Return what budget and disk leave for scratch stores; None if nothing limits them.

    Raises
    ------
    OverBudgetError
        Even without any the run needs more than the budget.
    """
    rooms = []
    if disk is not None:
        rooms.append(disk - plan.disk_bytes)
        if rooms[0] < 0:
            largest = sorted(plan.disk.items(), key=lambda part: -part[1])[:3]
            told = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in largest)
            raise OverBudgetError(
                f"output and work folder need {format_size(plan.disk_bytes)} of disk, the "
                f"budget is {format_size(disk)}; the largest parts are {told}. Give --disk "
                f"{plan.disk_bytes} or more, keep fewer experts, or use fewer --sequences"
            )
    if workspace is not None:
        needed, hidden = _left_to_write(plan, workspace.output, journal)
        together = same_disk(workspace.output, workspace.work)
        rooms.append(free_bytes(workspace.work) - hidden - needed * together)
    return min(rooms) if rooms else None


def _left_to_write(plan: Plan, output: Path, journal: Journal | None) -> tuple[int, int]:
    """Return the bytes still to be written in the output, and in the work folder at most."""
    shards = plan.output_bytes
    work = 2 * plan.boundary_bytes + plan.staged_bytes + sum(plan.scratch.values())
    work += plan.supply.peak_bytes
    others = plan.source.other_files()
    if journal is not None:
        shards -= sum(shard.size for shard in journal.shards())
        left = len(plan.layers) - len(journal.layers)
        # one boundary is there already; after the last layer there is none
        work -= plan.boundary_bytes if left and journal.layers else 0 if left else work
        others = [
            p for p in others if not (output / p.relative_to(plan.source.folder)).exists()
        ]
    return shards + sum(path.stat().st_size for path in others), work


def check_disk(
    plan: Plan, output: Path, work: Path | None = None, journal: Journal | None = None
) -> None:
    """Refuse a run that a disk cannot hold.

    Parameters
    ----------
    plan
        The run.
    output, work
        Where its shards and its hidden states go; they may be on different disks.
    journal
        Of the run that is gone on with: what it names is on the disk already.

    Raises
    ------
    OverBudgetError
        With what is needed and what is free.
    """
    work = work or output
    shards, hidden = _left_to_write(plan, output, journal)
    streamed = plan.supply.peak_bytes
    together = same_disk(output, work)
    for place, needed in ((output, shards + hidden * together), (work, hidden)):
        free = free_bytes(place)
        if needed > free:
            raise OverBudgetError(
                f"the run needs {format_size(needed)} on the disk of {place} "
                f"({format_size(shards)} of shards, {format_size(hidden)} of hidden states"
                f"{' and streamed shards' if streamed else ''}"
                f"{'' if together else ' elsewhere'}), {format_size(free)} are free; "
                "fewer --sequences need less"
            )


def _check_all_owned(source: Checkpoint, model: StreamedModel) -> None:
    """Refuse experts outside the decoder: a file set with two expert counts does not load."""
    owned = {layer.stack.prefix for layer in model.layers if layer.stack}
    foreign = sorted(set(source.experts()) - owned)
    if not foreign:
        return
    mtp = find_mtp(foreign, source.config)
    if not mtp:
        raise UnsupportedModelError(
            f"{foreign[0]} are experts outside the decoder layers, such as those of a second "
            "tower: they are not supported"
        )
    raise UnsupportedModelError(
        f"{min(mtp)} are experts of a multi-token-prediction layer, and "
        f"{why_unknown(mtp, source.config)}: they cannot be compressed with the others; "
        "--mtp drop leaves such layers out"
    )


def _check_adds(footprints: Footprints, source: Checkpoint) -> None:
    """Refuse layers whose output does not change by as much as that of their experts."""
    for index in footprints.kinds():
        if footprints.model.layers[index].stack is None:
            continue
        other = footprints.beyond_adding(index)
        if other is not None:
            raise UnsupportedModelError(
                f"--refit-target trajectory: layer {index} of "
                f"{text_config(source.config).get('model_type')} does not simply add what its "
                f"experts give, it is put through {other}; use --refit-target layer"
            )
