"""An output held against its source: what was not made must be the source's bytes.

Made are merged experts, and down projections that were refitted.
"""

import filecmp
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ream_stream.checkpoint.config_json import MTP_KEYS
from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.formats import Stored
from ream_stream.checkpoint.reader import (
    QUANTIZATION_FILE,
    Checkpoint,
    MappedTensors,
    open_checkpoint,
)
from ream_stream.compression.finalize import copied_files
from ream_stream.compression.manifest import LayerGroups
from ream_stream.compression.output_tensors import slice_rows
from ream_stream.errors import ReamStreamError
from ream_stream.events import Finding
from ream_stream.method.hash_routing import renumbered
from ream_stream.model.families import (
    COUNT_KEYS,
    TOP_K_KEYS,
    WIDTH_KEYS,
    ExpertSizes,
    resized_config,
    with_expert_count,
)
from ream_stream.planning.output_layout import FORMAT_KEYS

from .checks import Subject
from .slice_rows import SliceRows

CHECK = "against"


def against(output: Path, source: Path) -> Iterator[Finding]:
    """Compare an output with the checkpoint it was made from.

    Every tensor is compared byte for byte, but those that were merged or refitted: experts of
    groups of one with their centroid, the router's with the centroids' rows. So are config
    and other files, but for what a compression changes.

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
        drifted = list(_drifted(subject, original))
        yield from map(_bad, drifted)
        yield from _documents(subject, original)
        if drifted:
            return  # tensor by tensor it would be told again
        origins = _origins(subject, original)
        for path in subject.checkpoint.files():
            yield from _shard(subject.checkpoint, original, origins, path.name)
    except (ReamStreamError, OSError) as error:
        yield _bad(str(error))


def _drifted(subject: Subject, original: Checkpoint) -> Iterator[str]:
    """Find tensors that the source has not, or has in another dtype: merged ones too."""
    if _is_decoded(subject):
        return
    cut_from = _cut_from(subject, original) if subject.manifest.slices else {}
    for name, entry in subject.checkpoint.entries.items():
        old = original.entries.get(cut_from.get(name, name))
        if old is None:
            yield f"{name} is no tensor of the source"
        elif old.dtype != entry.dtype:
            yield f"{name} is {entry.dtype}, in the source {old.dtype}"


def _cut_from(subject: Subject, original: Checkpoint) -> dict[str, str]:
    """Return the tensor of the source that each tensor of slices was cut from."""
    found: dict[str, str] = {}
    stacks = {layer.index: layer.stack for layer in subject.model.layers if layer.stack}
    for groups in subject.manifest.layers:
        new = stacks[groups.index]
        old = original.experts[new.prefix]
        for number, group in enumerate(groups.groups):
            pairs = zip(new.expert_slots(number), old.expert_slots(group[0]), strict=True)
            found |= {name: origin for (name, _), (origin, _) in pairs}
    return found


def _is_decoded(subject: Subject) -> bool:
    return subject.manifest.fingerprint.get("dtype") == "bf16"


def _documents(subject: Subject, original: Checkpoint) -> Iterator[Finding]:
    """Compare config.json but for the counts, and the bytes of all files that are copied."""
    bad = [
        f"config.json differs from the source's in {key}"
        for key in _differences(
            _expected_config(subject, original),
            subject.checkpoint.config,
        )
    ]
    described = original.quantization_file is not None and not _is_decoded(subject)
    if described is (subject.checkpoint.quantization_file is None):
        bad.append(f"{QUANTIZATION_FILE} is {'missing' if described else 'left'}")
    copied = copied_files(original.others)
    for name in copied:
        have, want = subject.folder / name, original.folder / name
        if not have.is_file() or not filecmp.cmp(have, want, shallow=False):
            bad.append(f"{name} is not the source's byte for byte")
    yield from map(_bad, bad)
    if not bad:
        message = f"config.json differs in counts alone, {len(copied)} other files not at all"
        yield Finding(check=CHECK, ok=True, message=message)


def _expected_config(subject: Subject, original: Checkpoint) -> dict[str, Any]:
    """Return the source's config.json with the sizes of the output's experts."""
    manifest = subject.manifest
    if not manifest.slices:
        return with_expert_count(original.config, manifest.before, manifest.after)
    inner = next(iter(original.experts.values())).inner
    after = ExpertSizes(
        count=manifest.after,
        inner=next(iter(subject.stacks.values())).inner,
        top_k=subject.model.top_k,
    )
    top_k = after.top_k // max(1, manifest.slices)
    before = ExpertSizes(count=manifest.before, inner=inner, top_k=top_k)
    return resized_config(original.config, subject.family, before, after)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that differ, but for those that a compression changes."""
    # a number that was the class's default is added
    added = {*COUNT_KEYS, *TOP_K_KEYS, *WIDTH_KEYS} - old.keys()
    changing = {*MTP_KEYS, *FORMAT_KEYS, *added}
    for key in sorted((old.keys() | new.keys()) - changing):
        one, other = old.get(key), new.get(key)
        if key == "text_config" and isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other)
        elif one != other or (key in old) != (key in new):
            yield key


Pieces = Callable[[MappedTensors, MappedTensors], Iterator[tuple[Tensor, Tensor]]]
"""Yields pairs of output tensor and expected tensor, given both checkpoints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Origin:
    """Source of the bytes of an output tensor."""

    name: str
    """Name of the source tensor."""

    pieces: Pieces
    """Yields the parts of the tensor that were not merged."""

    is_whole: bool = True
    """Whether the pieces are the whole tensor."""


def _origins(subject: Subject, original: Checkpoint) -> dict[str, _Origin | None]:
    """Return the origin of every output tensor; None for what was made."""
    quantized = original.quantized
    found: dict[str, _Origin | None] = {}
    for name, entry in subject.checkpoint.entries.items():
        old_entry = original.entries.get(name)
        if name in quantized and (old_entry is None or old_entry.dtype != entry.dtype):
            found[name] = _decoded(name, quantized[name])
        else:
            found[name] = _same(name)
    stacks = original.experts
    owners = {layer.index: layer.stack for layer in subject.model.layers if layer.stack}
    for groups in subject.manifest.layers:
        new = owners[groups.index]
        old = stacks[new.prefix]
        found |= dict.fromkeys(new.slots())
        same_codec = [m.stored.codec for m in old.matrices] == [
            m.stored.codec for m in new.matrices
        ]
        if same_codec and subject.manifest.slices:
            if old.scheme == "plain":  # codes are made anew, in other groups
                found |= _of_slices(groups, new, old)
        elif same_codec:
            found |= _of_experts(groups, new, old)
        refitted = groups.refit is not None and groups.refit.penalty is not None
        if refitted and subject.manifest.fingerprint["refit_experts"] == "all":
            downs = {n for n, m in enumerate(new.matrices) if m.parts == ("down",)}
            slots = new.slots().items()
            found |= dict.fromkeys(name for name, slot in slots if slot.matrix in downs)
        found |= _of_router(subject, original, groups, (new, old))
    return found


def _of_router(
    subject: Subject,
    original: Checkpoint,
    groups: LayerGroups,
    stacks: tuple[ExpertStack, ExpertStack],
) -> dict[str, _Origin | None]:
    """Return the origin of a layer's router-side tensors: rows of the centroids."""
    old, found = stacks[1], dict[str, _Origin | None]()
    rows = [group[0] for group in groups.groups]
    routers, table = subject.family.router_tensors(old.block, original.entries)
    if table is not None:
        found[table] = _renumbered(table, routers[0], groups.groups)
    for name in routers:
        shape = original.entries[name].shape
        axis = shape.index(old.count)
        rest = range(old.count, shape[axis])
        found[name] = _rows(name, axis, torch.tensor([*rows, *rest]))
        if subject.manifest.slices:
            shares = subject.family.bias_shares(subject.manifest.slices)
            found[name] = _sliced_rows(name, routers, groups, stacks[::-1], shares)
    return found


def _same(name: str) -> _Origin:
    return _Origin(name=name, pieces=lambda ours, theirs: iter([(ours[name], theirs[name])]))


def _decoded(name: str, stored: Stored) -> _Origin:
    def pieces(ours: MappedTensors, theirs: MappedTensors) -> Iterator[tuple[Tensor, Tensor]]:
        have = ours[name]
        for index in [None] if stored.count is None else range(stored.count):
            want = theirs.matrix(stored, index, have.dtype)
            yield have if index is None else have[index], want

    return _Origin(name=name, pieces=pieces)


def _rows(name: str, axis: int, rows: Tensor) -> _Origin:
    def pieces(ours: MappedTensors, theirs: MappedTensors) -> Iterator[tuple[Tensor, Tensor]]:
        yield ours[name], theirs[name].index_select(axis, rows)

    return _Origin(name=name, pieces=pieces)


def _sliced_rows(
    name: str,
    routers: Sequence[str],
    groups: LayerGroups,
    stacks: tuple[ExpertStack, ExpertStack],
    shares: int,
) -> _Origin:
    def pieces(ours: MappedTensors, theirs: MappedTensors) -> Iterator[tuple[Tensor, Tensor]]:
        axes = {each: theirs[each].shape.index(stacks[0].count) for each in routers}
        want = slice_rows(name, theirs[name], axes, groups.groups, stacks, shares)
        yield ours[name], want

    return _Origin(name=name, pieces=pieces)


def _of_slices(
    groups: LayerGroups, new: ExpertStack, old: ExpertStack
) -> dict[str, _Origin | None]:
    """Return the origin of gate and up projections: rows of the expert that was cut."""
    rows = SliceRows(new, old, [group[0] for group in groups.groups])
    return {
        name: _Origin(name=old.prefix, pieces=partial(rows.pieces, slot))
        for name, slot in new.slots().items()
        if not {"down", "down_bias"}.intersection(new.matrices[slot.matrix].parts)
    }


def _renumbered(name: str, router: str, groups: Sequence[Sequence[int]]) -> _Origin:
    def pieces(ours: MappedTensors, theirs: MappedTensors) -> Iterator[tuple[Tensor, Tensor]]:
        yield ours[name], renumbered(theirs[name], theirs[router], groups)

    return _Origin(name=name, pieces=pieces)


def _of_experts(
    groups: LayerGroups, new: ExpertStack, old: ExpertStack
) -> dict[str, _Origin | None]:
    """Return the origins of experts that are alone in their groups."""
    alone = [(n, group[0]) for n, group in enumerate(groups.groups) if len(group) == 1]
    origins: dict[str, _Origin | None] = {}
    places: dict[str, list[tuple[int | None, str, int | None]]] = {}
    for number, expert in alone:
        for (name, into), (origin, at) in zip(
            new.expert_slots(number), old.expert_slots(expert), strict=True
        ):
            places.setdefault(name, []).append((into, origin, at))
    for name, pairs in places.items():
        whole = pairs[0][0] is None or len(alone) == new.count
        origins[name] = _Origin(name=pairs[0][1], pieces=_placed(name, pairs), is_whole=whole)
    return origins


def _placed(name: str, pairs: Sequence[tuple[int | None, str, int | None]]) -> Pieces:
    def pieces(ours: MappedTensors, theirs: MappedTensors) -> Iterator[tuple[Tensor, Tensor]]:
        have = ours[name]
        for into, origin, at in pairs:
            want = theirs[origin]
            yield have if into is None else have[into], want if at is None else want[at]

    return pieces


def _shard(
    output: Checkpoint, original: Checkpoint, origins: Mapping[str, _Origin | None], shard: str
) -> Iterator[Finding]:
    equal = made = 0
    wrong = False
    with output.open() as ours, original.open() as theirs:
        for name in sorted(
            n for n, entry in output.entries.items() if entry.path.name == shard
        ):
            origin = origins[name]
            if origin is not None and not all(
                _same_bytes(have, want) for have, want in origin.pieces(ours, theirs)
            ):
                wrong = True
                yield _bad(f"{name} in {shard} differs from {origin.name} of the source")
            elif origin is not None and origin.is_whole:
                equal += 1
            else:
                made += 1
    if not wrong:
        message = (
            f"{shard}: {equal} tensors are the source's byte for byte, "
            f"{made} were merged or refitted"
        )
        yield Finding(check=CHECK, ok=True, message=message)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Compare bits, so that NaN equals itself and 0 does not equal -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _bad(message: str) -> Finding:
    return Finding(check=CHECK, ok=False, message=message)
