"""Contradictions between config.json, the tensors and the manifest.

Functions that yield a sentence for every contradiction, saying what and where.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

from ream_stream.checkpoint.config_json import find_mtp
from ream_stream.checkpoint.formats import FLOATS, Modules, named_modules
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.compression.manifest import LayerGroups, Manifest
from ream_stream.method.grouping import centroids

_BY_SALIENCY = frozenset({"ream", "mc-smoe", "none"})
"""Groupings whose centroids are the most salient experts."""

_NUMBER = re.compile(r"\.\d+(?=\.)")


def format_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Compare whether there are quantized tensors with whether the config tells of any."""
    described = list(checkpoint.described())
    quantized = checkpoint.quantized
    if quantized and not described:
        yield f"{min(quantized)} is quantized, config.json has no quantization_config"
    if described and not quantized:
        yield f"{described[0][0]} has a quantization_config, no tensor is quantized"


def list_problems(
    checkpoint: Checkpoint, modules: Iterable[str], num_experts: int
) -> Iterator[str]:
    """Find the modules that descriptions of formats name, and that are gone.

    Parameters
    ----------
    checkpoint
        What is looked at.
    modules
        Of transformers' class, which names some otherwise than the checkpoint does.
    num_experts
        Experts of a layer.
    """
    known: Modules | None = None
    for file, described in checkpoint.described():
        for key, name in named_modules(described):
            known = known or Modules([*checkpoint.entries, *modules], num_experts)
            if name not in known:
                yield f"{file} names {name} in {key}: there is no such module"


def dtype_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Find floats whose dtype is not that of the same tensor in most layers.

    A correction bias that was rounded in one layer still loads, and routes otherwise.
    """
    apart = find_mtp(checkpoint.entries, checkpoint.config)
    kinds: dict[str, list[str]] = {}
    for name, entry in checkpoint.entries.items():
        if entry.dtype in FLOATS and name not in apart:
            kinds.setdefault(_NUMBER.sub(".N", name), []).append(name)
    for names in kinds.values():
        dtypes = Counter(checkpoint.entries[name].dtype for name in names)
        usual, _ = dtypes.most_common(1)[0]
        for name in names:
            if (dtype := checkpoint.entries[name].dtype) != usual:
                yield f"{name} is {dtype}, in most layers it is {usual}"


def group_problems(manifest: Manifest, routing_groups: int) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with the groups of a layer.

    Parameters
    ----------
    manifest
        Of the output.
    routing_groups
        ``n_group`` of group-limited routers, otherwise 1.
    """
    for layer in manifest.layers:
        for problem in _layer_problems(manifest, layer, routing_groups):
            yield f"layer {layer.index}: {problem}"


def _layer_problems(
    manifest: Manifest, layer: LayerGroups, routing_groups: int
) -> Iterator[str]:
    members = [expert for group in layer.groups for expert in group]
    kept = [group[0] for group in layer.groups if group]
    everyone = set(range(manifest.before))
    if len(layer.groups) != manifest.after or len(kept) != len(layer.groups):
        yield f"{len(kept)} groups with members, the layer has {manifest.after} experts"
    most = max(1, manifest.slices)
    if many := [e for e, n in Counter(members).items() if n > most]:
        yield (
            f"expert {many[0]} is in more than {most} groups"
            if manifest.slices
            else "an expert is in two groups"
        )
    if not everyone.issuperset(members):
        yield f"an expert is not one of the source's 0 to {manifest.before - 1}"
    if manifest.grouping == "none" and len(members) != len(layer.groups):
        yield "experts were pruned, yet a group has several members"
    if manifest.grouping != "none" and set(members) != everyone:
        yield f"experts {sorted(everyone - set(members))[:8]} are in no group"
    if kept != sorted(kept):
        yield "groups are not in the order of their centroids"
    if len(layer.saliency) != manifest.before or not all(map(math.isfinite, layer.saliency)):
        yield f"it has no {manifest.before} finite saliencies"
    elif (
        not manifest.slices
        and manifest.grouping in _BY_SALIENCY
        and set(kept) != set(_most_salient(layer.saliency, manifest.after, routing_groups))
    ):
        yield "the first members of the groups are not the most salient experts"


def _most_salient(saliency: Sequence[float], keep: int, routing_groups: int) -> list[int]:
    saliency_E = torch.tensor(saliency, dtype=torch.float64)
    try:
        return centroids(saliency_E, keep, routing_groups=routing_groups)
    except ValueError:  # the counts do not fit, which other findings tell
        return []
