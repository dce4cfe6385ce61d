"""Lays out the files of the output: each layer's tensors, their shapes, and config.json."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ream_stream.checkpoint.config_json import lacks_mtp, text_config
from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.formats import Modules, Stored, without_gone
from ream_stream.checkpoint.header import TensorEntry
from ream_stream.checkpoint.quantized import is_cache_scale, tensors_of
from ream_stream.checkpoint.reader import QUANTIZATION_KEYS, Checkpoint
from ream_stream.checkpoint.shards import PlannedTensor, Shard, cut, name_shards
from ream_stream.errors import DamagedError
from ream_stream.model.families import (
    COUNT_KEYS,
    TOP_K_KEYS,
    WIDTH_KEYS,
    ExpertSizes,
    Family,
    resized_config,
)
from ream_stream.model.mtp import without_mtp
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.model.tensor_map import LayerTensors, shape_of
from ream_stream.settings import Settings

from .plan import LayerPlan

FORMAT_KEYS = (*QUANTIZATION_KEYS, "expert_dtype")
"""Keys of config.json that describe the storage format of weights."""


def lay_out(
    model: StreamedModel,
    family: Family,
    num_experts: int,
    settings: Settings,
    decoded: Mapping[str, Stored],
) -> tuple[tuple[LayerPlan, ...], tuple[Shard, ...]]:
    """Return the layers of the output and the shards of what is outside them.

    Parameters
    ----------
    model, family, num_experts
        The source's layers, which tensors are the router's, and experts of a source layer.
    settings
        How many are kept, in which dtype, in shards of which size.
    decoded
        Quantized matrices beside the experts that are written as floats.

    Raises
    ------
    DamagedError
        A router-side tensor is not there, or has no axis of experts.
    """
    entries = model.checkpoint.entries
    coded = model.checkpoint.quantization is not None and settings.decodes

    def kept(names: Iterable[str]) -> list[str]:
        """Leave out what belongs to a format that the output has not."""
        return [name for name in names if not (coded and is_cache_scale(name))]

    routers = [_routers(layer, family, entries, num_experts) for layer in model.layers]
    stacks = [_output_stack(layer.stack, settings) for layer in model.layers]
    groups = []
    for layer, stack, axes in zip(model.layers, stacks, routers, strict=True):
        planned = _unchanged(kept(layer.dense_tensors()), entries, decoded)
        if stack is not None:
            planned = [_resized(t, axes.get(t.name), settings, num_experts) for t in planned]
            planned += [
                PlannedTensor(name=name, dtype=slot.part.dtype, shape=slot.shape)
                for name, slot in stack.slots().items()
            ]
        groups.append(sorted(planned, key=lambda tensor: tensor.name))
    groups.append(_unchanged(kept(model.outside_names), entries, decoded))
    shards = name_shards([cut(group, settings.max_shard_bytes) for group in groups])
    layers = tuple(
        LayerPlan(
            keys=keys,
            shards=tuple(files),
            stack=stack,
            routers=axes,
            table=family.router_tensors(stack.block, entries)[1] if stack else None,
        )
        for keys, files, stack, axes in zip(
            model.layers, shards[:-1], stacks, routers, strict=True
        )
    )
    return layers, tuple(shards[-1])


def _output_stack(stack: ExpertStack | None, settings: Settings) -> ExpertStack | None:
    if stack is None:
        return None
    stack = stack.resized(settings.experts, settings.width(stack.inner))
    return stack.decoded("BF16") if _decodes(stack, settings) else stack


def _decodes(stack: ExpertStack, settings: Settings) -> bool:
    return settings.decodes and stack.scheme != "plain"


def decoded_matrices(model: StreamedModel) -> dict[str, Stored]:
    """Return the quantized matrices that are no expert's of a layer, by name of the floats."""
    experts = {name for layer in model.layers if layer.stack for name in layer.stack.slots()}
    return {
        name: stored
        for name, stored in model.quantized.items()
        if experts.isdisjoint(tensors_of(stored))
    }


def output_config(
    source: Checkpoint,
    built: Any,  # noqa: ANN401 - a config of transformers
    family: Family,
    before: ExpertSizes,
    settings: Settings,
    names: Iterable[str],
) -> dict[str, Any]:
    """Return config.json of the output, whose tensors and modules have these names.

    `built` is what transformers made of the source's: of its text decoder.
    """
    after = output_sizes(before, settings)
    config = resized_config(source.config, family, before, after)
    for keys, old, new in (
        (COUNT_KEYS, before.count, after.count),
        (TOP_K_KEYS, before.top_k, after.top_k),
        (WIDTH_KEYS, before.inner, after.inner),
    ):
        config = _telling(config, built, keys, old, new)
    if settings.mtp == "drop" or lacks_mtp(source.entries, source.config):
        config = without_mtp(config)
    known = Modules(names if source.quantization else (), settings.experts)
    for part in (config, config.get("text_config")):
        for key in FORMAT_KEYS:
            if isinstance(part, dict) and key in part:
                if settings.decodes:
                    del part[key]
                else:
                    part[key] = without_gone(part[key], known)
    return config


def output_sizes(before: ExpertSizes, settings: Settings) -> ExpertSizes:
    """Return the sizes of the output's experts."""
    return ExpertSizes(
        count=settings.experts,
        inner=settings.width(before.inner),
        top_k=settings.top_k(before.top_k),
    )


def _telling(
    config: dict[str, Any],
    built: Any,  # noqa: ANN401 - a config of transformers
    keys: Iterable[str],
    old: int,
    new: int,
) -> dict[str, Any]:
    """Return a config that tells a number that changed, which was the class's default."""
    text = text_config(config)
    told = [text[key] for key in keys if key in text]
    if old == new or new in told or any(isinstance(each, list) for each in told):
        return config
    key = next(key for key in keys if getattr(built, key, None) == old)
    added = {built.attribute_map.get(key, key): new}
    return config | (added if text is config else {"text_config": {**text, **added}})


def output_quantization(
    source: Checkpoint, settings: Settings, names: Iterable[str]
) -> dict[str, Any] | None:
    """Return the description of formats that is a file of the output; None if there is none."""
    if source.quantization_file is None or settings.decodes:
        return None
    followed: dict[str, Any] = without_gone(
        source.quantization_file, Modules(names, settings.experts)
    )
    return followed


def _routers(
    layer: LayerTensors, family: Family, entries: Mapping[str, TensorEntry], num_experts: int
) -> dict[str, int]:
    """Return the router-side tensors of a layer with their axis of experts."""
    if layer.stack is None:
        return {}
    found = {}
    for name in family.router_tensors(layer.stack.block, entries)[0]:
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
