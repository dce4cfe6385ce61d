"""What an output has, told from its source by plain slicing."""

import re

import plain_method
import torch
from tiny_checkpoints import STACKED
from tiny_families import EXPERTS, TINY

EXPERT = re.compile(r"((?:\w+\.)*layers\.(\d+)\..+\.experts)\.(\d+)\.(\w+\.\w+)")


def same_bits(ours, theirs):
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and torch.equal(
        ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)
    )


def sliced_by_hand(name, source, groups):
    """What is left of a source where each group keeps its centroid: plain slicing."""
    sliced = {}
    for key, tensor in source.items():
        expert = EXPERT.fullmatch(key)
        layer = re.search(r"layers\.(\d+)\.", key)
        kept = [group[0] for group in groups.get(int(layer[1]), [])] if layer else []
        router = any(
            key == f"{TINY[name].path}.{layer}.{suffix}"
            for layer in groups
            for suffix in TINY[name].routers
        )
        if expert:
            prefix, _, number, part = expert.groups()
            if int(number) in kept:
                sliced[f"{prefix}.{kept.index(int(number))}.{part}"] = tensor
        elif router:
            axis = 0 if tensor.shape[0] == EXPERTS else 1
            sliced[key] = torch.stack([tensor.select(axis, i) for i in kept], dim=axis)
        elif kept and key.endswith("tid2eid"):
            rows = source[key.replace("tid2eid", "weight")].double().numpy()
            table = plain_method.renumber(tensor.tolist(), rows, groups[int(layer[1])])
            sliced[key] = torch.tensor(table, dtype=tensor.dtype)
        elif kept and STACKED.fullmatch(key):
            sliced[key] = torch.stack([tensor[i] for i in kept])
        else:
            sliced[key] = tensor
    return sliced


def by_expert(tensors):
    """Tensors of experts by layer, number and what is left of the name; others by name."""
    split = {}
    for key, tensor in tensors.items():
        expert, layer = EXPERT.fullmatch(key), re.search(r"layers\.(\d+)\.", key)
        if expert:
            split[expert[2], expert[3], expert[4]] = tensor
        elif STACKED.fullmatch(key):
            split |= {(layer[1], str(e), key): one for e, one in enumerate(tensor)}
        else:
            split[key] = tensor
    return split
