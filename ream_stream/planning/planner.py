"""Makes the plan of a run, from headers alone.

A plan is made before anything is written or spent. It lays out every shard of
the output and checks it against transformers' own class for the compressed
config, so that a checkpoint which would not load is refused before the first
layer.
"""

from dataclasses import fields, replace
from pathlib import Path

import torch

from ream_stream.checkpoint.config_json import find_mtp, lacks_mtp, text_config
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.checkpoint.shard_fetcher import ShardFetcher
from ream_stream.checkpoint.source_card import source_metadata
from ream_stream.errors import DamagedError, UnsupportedModelError, UsageError
from ream_stream.model.families import ExpertSizes, family_of
from ream_stream.model.meta_model import trusting
from ream_stream.model.mtp import why_unknown
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.settings import Settings

from .activation_memory import Footprints
from .allocation import Allocation, allocate
from .disk import scratch_room
from .memory import MemoryModel, Workload
from .output_layout import decoded_matrices, lay_out, output_config, output_quantization
from .plan import Layout, Plan
from .schedule import Begun, Budgets
from .settings_check import check_cut, check_settings
from .statistics_layout import statistics_layers

CPU = torch.device("cpu")


@trusting("no plan can be made for the values of config.json")
def make_plan(
    source: Checkpoint,
    settings: Settings,
    sequences: int,
    sequence_length: int,
    *,
    budgets: Budgets | None = None,
    threads: int | None = None,
    padded: bool = True,
    domains: int = 1,
    output: Path | None = None,
    work: Path | None = None,
    begun: Begun | None = None,
) -> Plan:
    """Plan a run.

    Parameters
    ----------
    source, settings
        The checkpoint to compress, and what was asked for.
    sequences, sequence_length, padded, domains
        Size of the calibration set; whether it has padding, True if that is not known; and its
        domains.
    budgets, threads
        What the run may take of the machine; None for most of what is free, on the processor,
        and for the threads that the run began with, or torch's own number.
    output, work, begun
        Where the run writes and how far it is, if that is known; its schedule is kept.

    Raises
    ------
    UnsupportedModelError
        The checkpoint cannot be compressed.
    UsageError
        The counts asked for do not work for it.
    OverBudgetError
        The run needs more memory or disk than the budget.
    """
    budgets = budgets or Budgets.of()
    threads = threads or (begun.schedule.threads if begun else torch.get_num_threads())
    workload = Workload(
        sequences=sequences,
        length=sequence_length,
        threads=threads,
        padded=padded,
        domains=domains,
    )
    layout, footprints = _lay_out(source, settings, workload)
    # builds the compressed config's own class: refuses shapes that would not load
    compressed = StreamedModel(layout.output_checkpoint(source.folder), layout.dtype, CPU)
    allocation = allocate(
        MemoryModel(footprints, settings, workload, on_device=budgets.vram is not None),
        budgets,
        scratch_bytes=scratch_room(layout, budgets.disk, output, work, begun),
        begun=begun.schedule if begun else None,
    )
    return _plan(layout, footprints.model, compressed, budgets, allocation)


def _plan(
    layout: Layout,
    source_model: StreamedModel,
    output_model: StreamedModel,
    budgets: Budgets,
    allocation: Allocation,
) -> Plan:
    """Put a plan together."""
    return Plan(
        **{field.name: getattr(layout, field.name) for field in fields(layout)},
        source_model=source_model,
        output_model=output_model,
        budgets=budgets,
        schedule=allocation.schedule,
        memory=allocation.memory,
        device_memory=allocation.device,
        scratch=allocation.scratch,
    )


def _lay_out(
    source: Checkpoint, settings: Settings, workload: Workload
) -> tuple[Layout, Footprints]:
    """Return the layout of the output, and the footprints of the source's layers."""
    family = family_of(source.config)
    kept = source
    if settings.mtp == "drop":
        gone = find_mtp(source.entries, source.config)
        left = {name: entry for name, entry in source.entries.items() if name not in gone}
        kept = replace(source, entries=left)
    model = StreamedModel(kept, getattr(torch, settings.compute_dtype), CPU)
    stacks = [layer.stack for layer in model.layers if layer.stack]
    if not stacks:
        raise UnsupportedModelError(f"{source.folder} is a dense model: it has no experts")
    _check_all_owned(kept, model)
    num_experts = stacks[0].count
    if any(stack.count != num_experts for stack in stacks):
        raise UnsupportedModelError("layers have different numbers of experts")
    routing = family.routing(model.text_config, model.top_k)
    if wrong := routing.problem(num_experts):
        raise DamagedError(f"config.json, for {num_experts} experts: {wrong}")
    check_settings(settings, num_experts)
    routed = replace(routing, top_k=settings.top_k(model.top_k))
    if problem := routed.problem(settings.experts):
        raise UsageError(f"--experts {settings.experts}: {problem}")
    if settings.cuts:
        check_cut(model, family, settings, stacks)
    sizes = ExpertSizes(count=num_experts, inner=stacks[0].inner, top_k=model.top_k)
    decoded = decoded_matrices(model) if settings.decodes else {}
    layers, outside = lay_out(model, family, num_experts, settings, decoded)
    shards = [*(shard for layer in layers for shard in layer.shards), *outside]
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    names += [name for name, _ in model.model.named_modules()]
    inherited, note = source_metadata(source.folder)
    beside = [tensor.name for shard in outside for tensor in shard.tensors]
    layout = Layout(
        settings=settings,
        source=source,
        kept=kept,
        fetcher=ShardFetcher(source, [layer.keys.names for layer in layers], beside),
        config=output_config(source, model.text_config, family, sizes, settings, names),
        quantization_file=output_quantization(source, settings, names),
        inherited=inherited,
        notes=(*([note] if note else []), *_without_tensors(source)),
        family=family,
        num_experts=num_experts,
        top_k=model.top_k,
        routing_groups=routing.groups,
        layers=statistics_layers(layers, settings, workload) if settings.observes else layers,
        outside=() if settings.observes else outside,
        decoded=decoded,
        sequences=workload.sequences,
        sequence_length=workload.length,
        domains=workload.domains,
        hidden_size=model.hidden_size,
    )
    footprints = Footprints(model)
    if layout.tracks_original:
        _check_adds(footprints, source)
    return layout, footprints


def _without_tensors(source: Checkpoint) -> list[str]:
    """Return a note on layers that config.json tells of and that are nowhere."""
    if not lacks_mtp(source.entries, source.config):
        return []
    return [
        "config.json tells of a multi-token-prediction layer, there is no tensor of one: the "
        "output's says 0"
    ]


def _check_all_owned(source: Checkpoint, model: StreamedModel) -> None:
    """Refuse experts outside the decoder: a file set with two expert counts does not load."""
    owned = {layer.stack.prefix for layer in model.layers if layer.stack}
    foreign = sorted(set(source.experts) - owned)
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
            raise UsageError(
                f"--refit-target trajectory: layer {index} of "
                f"{text_config(source.config).get('model_type')} does not simply add what its "
                f"experts give, it is put through {other}; use --refit-target layer"
            )
