"""An output held against its source: what was not merged must be the source's bytes."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint.layouts import ExpertStack, find_experts
from .checkpoint.source import Checkpoint, MappedTensors, open_checkpoint
from .checks import Subject
from .errors import ReamStreamError
from .manifest import LayerGroups
from .verify import Finding

CHECK = "against"


def against(output: Path, source: Path) -> Iterator[Finding]:
    """Compare an output with the checkpoint it was made from.

    Every tensor is compared byte for byte, but those of merged experts: experts of
    groups of one with their centroid, the router's with the centroids' rows.

    Parameters
    ----------
    output
        A finished output.
    source
        The checkpoint it was made from.

    Yields
    ------
    Finding
        One a shard of the output that is good, one for each tensor that differs.
    """
    try:
        subject, original = Subject(output), open_checkpoint(source)
        if original.digest() != subject.manifest.fingerprint.get("source"):
            yield _bad(f"{source} is not the checkpoint that {output} was made from")
            return
        origins = _origins(subject, original)
        for path in subject.checkpoint.files():
            yield from _shard(subject.checkpoint, original, origins, path.name)
    except (ReamStreamError, OSError) as error:
        yield _bad(str(error))


class _Origin:
    """Where the bytes of an output tensor come from."""

    def __init__(self, name: str, axis: int | None = None, rows: Tensor | None = None) -> None:
        self.name, self.axis, self.rows = name, axis, rows

    def read(self, tensors: MappedTensors) -> Tensor:
        """Return what the output should hold."""
        tensor = tensors[self.name]
        if self.axis is None or self.rows is None:
            return tensor
        return tensor.index_select(self.axis, self.rows)


def _origins(subject: Subject, original: Checkpoint) -> dict[str, _Origin | None]:
    """Return the origin of every output tensor; None for what was merged."""
    origins: dict[str, _Origin | None] = {
        name: _Origin(name) for name in subject.checkpoint.entries
    }
    stacks = find_experts(original.entries)
    owners = {layer.index: layer.stack for layer in subject.model.layers if layer.stack}
    for groups in subject.manifest.layers:
        new = owners[groups.index]
        old = stacks[new.prefix]
        origins.update(_of_experts(groups, new, old))
        rows = torch.tensor([group[0] for group in groups.groups])
        for suffix in subject.family.routers:
            name = old.block + suffix
            axis = original.entries[name].shape.index(len(old.experts))
            origins[name] = _Origin(name, axis, rows)
    return origins


def _of_experts(
    groups: LayerGroups, new: ExpertStack, old: ExpertStack
) -> Iterator[tuple[str, _Origin | None]]:
    for group, expert in zip(groups.groups, new.experts, strict=True):
        source = old.experts[group[0]]
        for name, origin in zip(expert.parts(), source.parts(), strict=True):
            yield name, _Origin(origin) if len(group) == 1 else None


def _shard(
    output: Checkpoint, original: Checkpoint, origins: Mapping[str, _Origin | None], shard: str
) -> Iterator[Finding]:
    equal = merged = 0
    wrong = False
    with output.open() as ours, original.open() as theirs:
        for name in sorted(
            n for n, entry in output.entries.items() if entry.path.name == shard
        ):
            origin = origins[name]
            if origin is None:
                merged += 1
            elif _same_bytes(ours[name], origin.read(theirs)):
                equal += 1
            else:
                wrong = True
                yield _bad(f"{name} in {shard} differs from {origin.name} of the source")
    if not wrong:
        message = f"{shard}: {equal} tensors are the source's byte for byte, {merged} merged"
        yield Finding(check=CHECK, ok=True, message=message)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Compare bits, so that NaN equals itself and 0 does not equal -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _bad(message: str) -> Finding:
    return Finding(check=CHECK, ok=False, message=message)
