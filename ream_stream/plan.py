"""What a run will read, write and hold, from headers alone.

A plan is made before anything is written or spent. It lays out every shard of
the output and checks it against transformers' own class for the compressed
config, so that a checkpoint which would not load is refused before the first
layer.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .allotment import Limits, allot
from .budget import Parts, Size
from .checkpoint.formats import Stored, rename_skipped
from .checkpoint.header import TensorEntry
from .checkpoint.quantized import tensors_of
from .checkpoint.shards import PlannedTensor, Shard, cut, name_shards
from .checkpoint.source import Checkpoint
from .checkpoint.stacks import ExpertStack
from .durable import free_bytes, same_disk
from .errors import DamagedError, OverBudgetError, UnsupportedModelError
from .families import Family, family_of, with_expert_count
from .footprint import Footprints
from .journal import Journal, Workspace
from .memory import anonymous_bytes, available_bytes
from .model import LayerKeys, StreamedModel, shape_of
from .mtp import find_mtp, without_mtp
from .refit_budget import Solver
from .settings import Settings, check_counts, check_refit
from .sizes import format_size
from .supply import Supply

RAM_SHARE = 0.8
"""Share of the free memory that is used if no budget is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """One decoder layer of the output."""

    keys: LayerKeys
    """Its tensors in the source."""

    shards: tuple[Shard, ...]
    """Its files in the output."""

    stack: ExpertStack | None
    """Its experts in the output; None in a dense layer."""

    routers: Mapping[str, int]
    """Router-side tensors, with their axis of experts; empty in a dense layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that is known before a run starts."""

    settings: Settings
    """What was asked for."""

    source: Checkpoint
    """What is read."""

    config: Mapping[str, Any]
    """config.json of the output."""

    family: Family
    """The model's family."""

    num_experts: int
    """Experts of a source layer."""

    top_k: int
    """Experts a token is sent to."""

    routing_groups: int
    """Groups the router selects in, otherwise 1."""

    layers: tuple[LayerPlan, ...]
    """Decoder layers, in order."""

    outside: tuple[Shard, ...]
    """Shards of what is outside the layers."""

    decoded: Mapping[str, Stored] = field(repr=False)
    """Quantized matrices beside the experts that are written as floats, by their names then."""

    sequences: int
    """Calibration sequences."""

    sequence_length: int
    """Tokens of a sequence."""

    batch_sequences: int
    """Sequences that are run together."""

    hidden_size: int
    """H."""

    expert_blocks: int
    """Blocks that a layer's experts are run in; with 1, all batches see all of them."""

    resident_experts: int
    """Experts that stay on the device between batches."""

    memory: Mapping[str, int] = field(repr=False)
    """Anonymous host memory at its peak, by part, bytes."""

    solver: Solver
    """How a refit is solved, if there is one."""

    device_memory: Mapping[str, int] = field(repr=False)
    """Device memory at its peak, by part, bytes; empty if layers run on the processor."""

    scratch: Mapping[str, int] = field(repr=False)
    """What is kept on disk from pass to pass over a layer, by part, bytes."""

    steady: bool
    """Whether freed memory goes back to the kernel at once: with a stated budget."""

    @property
    def moe_layers(self) -> list[LayerPlan]:
        """Layers that have experts."""
        return [layer for layer in self.layers if layer.keys.stack]

    @property
    def num_batches(self) -> int:
        """Batches of the calibration set."""
        return -(-self.sequences // self.batch_sequences)

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """Shape of the hidden states at a boundary."""
        return self.sequences, self.sequence_length, self.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """What the layers are run in."""
        dtype: torch.dtype = getattr(torch, self.settings.compute_dtype)
        return dtype

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states at one boundary."""
        tokens = self.sequences * self.sequence_length
        return tokens * self.hidden_size * self.dtype.itemsize

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(entry.nbytes for entry in self.source.entries.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the output's shards."""
        shards = [shard for layer in self.layers for shard in layer.shards]
        return sum(shard.nbytes for shard in [*shards, *self.outside])

    @property
    def disk(self) -> dict[str, int]:
        """Bytes on disk at the high-water mark, by part."""
        return {
            "shards": self.output_bytes,
            "other files": sum(path.stat().st_size for path in self.source.other_files()),
            "hidden states": 2 * self.hidden_bytes,
            "layer before its refit": self._staged_bytes,
            "streamed shards": self.supply.peak_bytes,
            **self.scratch,
        }

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk at the high-water mark."""
        return sum(self.disk.values())

    @property
    def _staged_bytes(self) -> int:
        """Bytes of the largest layer, if it is written once more to be refitted."""
        if self.settings.method.refit == "none":
            return 0
        return max(sum(s.nbytes for s in layer.shards) for layer in self.moe_layers)

    def keeps(self, part: str) -> bool:
        """Tell whether something is kept from pass to pass, in memory or on disk."""
        return bool(self.memory.get(part) or self.scratch.get(part))

    @property
    def supply(self) -> Supply:
        """The source's shards, layer by layer."""
        names = [tensor.name for shard in self.outside for tensor in shard.tensors]
        return Supply(self.source, [layer.keys.names for layer in self.layers], names)

    @property
    def memory_bytes(self) -> int:
        """Anonymous host memory at its peak."""
        return sum(self.memory.values())

    def output_checkpoint(self, folder: Path) -> Checkpoint:
        """Return the output as a checkpoint whose layer l is on disk once it was written.

        What is outside the layers is taken from the source.
        """
        entries = {}
        for layer in self.layers:
            for shard in layer.shards:
                position = len(shard.header())
                for tensor in shard.tensors:
                    entries[tensor.name] = TensorEntry(
                        name=tensor.name,
                        path=folder / shard.name,
                        dtype=tensor.dtype,
                        shape=tensor.shape,
                        start=position,
                        stop=position + tensor.nbytes,
                    )
                    position += tensor.nbytes
        inside = {name for layer in self.layers for name in layer.keys.names}
        outside = {n: e for n, e in self.source.entries.items() if n not in inside}
        config = dict(self.config)
        if self.source.quantization:  # tells how what is taken from the source is stored
            config["quantization_config"] = self.source.quantization
        return Checkpoint(
            folder=folder,
            config=config,
            entries={**entries, **outside},
            stamps=self.source.stamps,
        )


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
    _check_refit(settings, stacks)
    num_experts = stacks[0].count
    if any(stack.count != num_experts for stack in stacks):
        raise UnsupportedModelError("layers have different numbers of experts")
    routing_groups = family.groups(model.text_config)
    groups_per_token = int(getattr(model.text_config, "topk_group", None) or routing_groups)
    check_refit(settings.method)
    check_counts(settings, num_experts, model.top_k, routing_groups, groups_per_token)
    decoded = _decoded(model) if settings.dtype == "bfloat16" else {}
    layers, outside = _lay_out(model, family, num_experts, settings, decoded)
    size = Size(
        sequences=sequences,
        length=sequence_length,
        threads=torch.get_num_threads(),
        top_k=model.top_k,
        padded=padded,
    )
    parts = Parts(Footprints(model), settings, size, on_device=vram is not None)
    plan = Plan(
        settings=settings,
        source=source,
        config=_config(source, family, settings),
        family=family,
        num_experts=num_experts,
        top_k=model.top_k,
        routing_groups=routing_groups,
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
    work = 2 * plan.hidden_bytes + plan._staged_bytes + sum(plan.scratch.values())
    work += plan.supply.peak_bytes
    others = plan.source.other_files()
    if journal is not None:
        shards -= sum(shard.size for shard in journal.shards())
        left = len(plan.layers) - len(journal.layers)
        # one boundary is there already; after the last layer there is none
        work -= plan.hidden_bytes if left and journal.layers else 0 if left else work
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
    if foreign:
        raise UnsupportedModelError(
            f"{foreign[0]} are experts outside the decoder layers (a multi-token-prediction "
            "layer or a second tower); they must have the decoder's number of experts, and "
            "compressing them is not supported: --mtp drop leaves such layers out"
        )


def _check_refit(settings: Settings, stacks: Iterable[ExpertStack]) -> None:
    """Refuse to refit what is quantized, unless it is written as floats."""
    if settings.method.refit == "none" or settings.dtype == "bfloat16":
        return
    for stack in stacks:
        if stack.scheme != "plain":
            raise UnsupportedModelError(
                f"{stack.prefix} is stored as {stack.scheme}: refitting quantized experts is "
                "not supported; give --dtype bf16 or --refit none"
            )


def _lay_out(
    model: StreamedModel,
    family: Family,
    num_experts: int,
    settings: Settings,
    decoded: Mapping[str, Stored],
) -> tuple[tuple[LayerPlan, ...], tuple[Shard, ...]]:
    entries = model.checkpoint.entries
    routers = [_routers(layer, family, entries, num_experts) for layer in model.layers]
    stacks = [_output_stack(layer.stack, settings) for layer in model.layers]
    groups = []
    for layer, stack, axes in zip(model.layers, stacks, routers, strict=True):
        planned = _unchanged(layer.dense_tensors(), entries, decoded)
        if stack is not None:
            planned = [_resized(t, axes.get(t.name), settings, num_experts) for t in planned]
            planned += [
                PlannedTensor(name=name, dtype=slot.part.dtype, shape=slot.shape)
                for name, slot in stack.slots().items()
            ]
        groups.append(sorted(planned, key=lambda tensor: tensor.name))
    groups.append(_unchanged(model.outside_names, entries, decoded))
    shards = name_shards([cut(group, settings.max_shard_bytes) for group in groups])
    layers = tuple(
        LayerPlan(keys=keys, shards=tuple(files), stack=stack, routers=axes)
        for keys, files, stack, axes in zip(
            model.layers, shards[:-1], stacks, routers, strict=True
        )
    )
    return layers, tuple(shards[-1])


def _output_stack(stack: ExpertStack | None, settings: Settings) -> ExpertStack | None:
    if stack is None:
        return None
    stack = stack.resized(settings.experts)
    return stack.decoded("BF16") if _decodes(stack, settings) else stack


def _decodes(stack: ExpertStack, settings: Settings) -> bool:
    return settings.dtype == "bfloat16" and stack.scheme != "plain"


def _decoded(model: StreamedModel) -> dict[str, Stored]:
    """Return the quantized matrices that are no expert's of a layer, by name of the floats."""
    experts = {name for layer in model.layers if layer.stack for name in layer.stack.slots()}
    return {
        name: stored
        for name, stored in model.quantized.items()
        if experts.isdisjoint(tensors_of(stored))
    }


def _kept_module(name: str, count: int) -> str | None:
    """Return a module's name; None for that of an expert whose number there is no more."""
    match = re.search(r"\.experts\.(\d+)(\.|$)", name)
    return None if match and int(match[1]) >= count else name


def _config(source: Checkpoint, family: Family, settings: Settings) -> dict[str, Any]:
    """Return config.json of the output."""
    config = with_expert_count(source.config, family, settings.experts)
    if settings.mtp == "drop":
        config = without_mtp(config)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("quantization_config"), dict):
            part["quantization_config"] = rename_skipped(
                part["quantization_config"], lambda name: _kept_module(name, settings.experts)
            )
    if settings.dtype == "bfloat16":
        config.pop("quantization_config", None)
        if isinstance(config.get("text_config"), dict):
            config["text_config"].pop("quantization_config", None)
    return config


def _routers(
    layer: LayerKeys, family: Family, entries: Mapping[str, TensorEntry], num_experts: int
) -> dict[str, int]:
    """Return the router-side tensors of a layer with their axis of experts."""
    if layer.stack is None:
        return {}
    found = {}
    for suffix in family.routers:
        name = layer.stack.block + suffix
        if name not in entries:
            raise DamagedError(f"layer {layer.index} has experts but no {name}")
        if num_experts not in entries[name].shape:
            raise DamagedError(
                f"{name} has shape {entries[name].shape}, no axis of {num_experts}"
            )
        found[name] = entries[name].shape.index(num_experts)
    return found


def _unchanged(
    names: Iterable[str],
    entries: Mapping[str, TensorEntry],
    decoded: Mapping[str, Stored],
) -> list[PlannedTensor]:
    """Return tensors as they are in the source, or their floats in place of quantized ones."""
    names = list(names)
    coded = {name: plain for plain, s in decoded.items() for name in tensors_of(s)}
    planned = [
        PlannedTensor(name=name, dtype=entries[name].dtype, shape=entries[name].shape)
        for name in names
        if name not in coded
    ]
    for plain in sorted({coded[name] for name in names if name in coded}):
        shape = shape_of(plain, decoded, entries)
        planned.append(PlannedTensor(name=plain, dtype="BF16", shape=shape))
    return planned


def _resized(
    tensor: PlannedTensor, axis: int | None, settings: Settings, num_experts: int
) -> PlannedTensor:
    """Return a router-side tensor with as many experts as are kept."""
    if axis is None:
        return tensor
    shape = list(tensor.shape)
    shape[axis] -= num_experts - settings.experts
    return replace(tensor, shape=tuple(shape))
