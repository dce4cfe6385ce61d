"""Lays out the files of statistics: what `observe` keeps of each MoE layer.

One safetensors file a layer, laid out before the first is written as shards of an output are.
Domains are apart, so that they can be weighted later.

Letters in shapes: D domains, E experts, H hidden, I inner, n sampled tokens.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from ream_stream.checkpoint.header import ITEM_BYTES, torch_dtype
from ream_stream.checkpoint.shards import PlannedTensor, Shard
from ream_stream.method.saliency import RoutedSums
from ream_stream.settings import Settings

from .memory import Workload
from .plan import LayerPlan

MOMENTS = "moments_DEII"
"""Tensor of the second moments of each expert's activations, A_e."""

LOGIT_GRAM = "logit_gram_EE"
"""Tensor of the inner products of the router's logit columns."""

POSITION, HIDDEN, SCORE = "sample_position_n", "sample_hidden_nH", "sample_score_nE"
"""Tensors of the token sample: positions, -1 after the last, expert inputs, router scores."""


def sums_name(name: str) -> str:
    """Return the name of a sum of `RoutedSums` with its domains along the first axis."""
    return f"{name}_D" if name == "tokens" else name.replace("_E", "_DE")


def statistics_layers(
    layers: Iterable[LayerPlan], settings: Settings, workload: Workload
) -> tuple[LayerPlan, ...]:
    """Return layers with the files of statistics in place of shards; dense ones have none.

    Parameters
    ----------
    layers
        Layers of the source.
    settings
        Settings of the observation.
    workload
        Size of the calibration set.
    """
    return tuple(replace(layer, shards=_shards(layer, settings, workload)) for layer in layers)


def _shards(layer: LayerPlan, settings: Settings, workload: Workload) -> tuple[Shard, ...]:
    stack = layer.keys.stack
    if stack is None:
        return ()
    domains, experts, inner = workload.domains, stack.count, stack.inner
    rows = min(settings.method.similarity_tokens or workload.tokens, workload.tokens)
    compute = getattr(torch, settings.compute_dtype)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("F64", (domains,) if each == "tokens" else (domains, experts))
        for each in RoutedSums.NAMES
        for name in (sums_name(each),)
    }
    shapes |= {
        LOGIT_GRAM: ("F64", (experts, experts)),
        POSITION: ("I64", (rows,)),
        HIDDEN: (
            next(k for k in ITEM_BYTES if torch_dtype(k) == compute),
            (rows, stack.hidden),
        ),
        SCORE: ("F32", (rows, experts)),
    }
    if settings.moments:
        shapes[MOMENTS] = ("F32", (domains, experts, inner, inner))
    ordered = sorted(shapes.items(), key=lambda each: (-ITEM_BYTES[each[1][0]], each[0]))
    tensors = tuple(PlannedTensor(name=n, dtype=d, shape=s) for n, (d, s) in ordered)
    return (Shard(name=f"layer-{layer.keys.index:05d}.safetensors", tensors=tensors),)
