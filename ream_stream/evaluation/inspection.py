"""What a checkpoint holds, from its headers; of an output also how it was made."""

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ream_stream.checkpoint.config_json import find_mtp, text_config
from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.manifest import MANIFEST, Manifest, read_manifest
from ream_stream.errors import UnsupportedModelError
from ream_stream.model.families import family_of
from ream_stream.planning.model_size import ModelSize, context_length, model_size, stored_as

_IN_LAYER = re.compile(r"(^|\.)layers\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A checkpoint, described."""

    path: Path
    """Folder of the checkpoint."""

    family: str | None
    """Model type: ``model_type`` of config.json."""

    supported: bool
    """Whether the checkpoint can be compressed."""

    why_not: str | None
    """Reason why the checkpoint cannot be compressed; None if it can."""

    layers: int | None
    """Number of decoder layers in config.json."""

    moe_layers: int
    """Number of decoder layers with experts."""

    mtp_moe_layers: int
    """Number of multi-token-prediction layers with experts."""

    experts: int | list[int] | None
    """Experts of a layer; a list of all numbers if layers differ."""

    experts_per_token: int | None
    """Experts that the router selects for a token."""

    tensors: int
    """Number of tensors in all files."""

    files: int
    """Number of shards."""

    bytes: int
    """Bytes of all tensors."""

    bytes_by_kind: Mapping[str, int]
    """Bytes of routed experts, of other parts of layers, and of tensors outside the layers."""

    bytes_by_dtype: Mapping[str, int]
    """Bytes by dtype in the safetensors format's spelling."""

    parameters: Mapping[str, Any] | None
    """Parameters in all and used for a token, and bytes at 16, 8 and 4 bits; None if a tensor
    is in a format that is not read."""

    context_length: int | None
    """Longest context in tokens; None if config.json does not tell it."""

    stored_as: str | None
    """Format of the routed experts, or of all tensors without them; None if it is not read."""

    headers_only_files: int
    """Number of shards that end before their tensors do."""

    made: Mapping[str, Any] | None
    """Facts of the manifest if ream-stream made the checkpoint; None for others."""

    def facts(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**asdict(self), "path": str(self.path)}


def inspect(path: str | Path) -> Inspection:
    """Describe a checkpoint, one that cannot be compressed too.

    Parameters
    ----------
    path
        Checkpoint folder, whose shards may end after their headers, or
        ``ORG/NAME[@REVISION]`` on the hub, of which headers and small files are fetched.

    Raises
    ------
    UsageError
        There is no checkpoint.
    DamagedError
        Its headers, or the manifest of an output, are not what they should be.
    """
    checkpoint, reason = open_checkpoint(_folder_of(path), with_data=False), None
    size: ModelSize | None = None
    stacks: Mapping[str, ExpertStack] = {}
    text = text_config(checkpoint.config)
    try:
        stacks = checkpoint.experts
        family_of(checkpoint.config)
        if not stacks:
            reason = "it has no experts"
    except UnsupportedModelError as error:
        reason = str(error)
    with suppress(UnsupportedModelError):
        size = model_size(checkpoint)
    in_stack = {name for stack in stacks.values() for name in stack.slots()}
    kinds, dtypes = Counter[str](), Counter[str]()
    for name, entry in checkpoint.entries.items():
        kinds[_kind(name, in_stack)] += entry.nbytes
        dtypes[entry.dtype] += entry.nbytes
    width = next((stack.inner for stack in stacks.values()), None)
    counts = sorted({stack.count for stack in stacks.values()})
    mtp = find_mtp(stacks, checkpoint.config)
    return Inspection(
        path=checkpoint.folder,
        family=checkpoint.config.get("model_type"),
        supported=reason is None,
        why_not=reason,
        layers=text.get("num_hidden_layers"),
        moe_layers=len(stacks) - len(mtp),
        mtp_moe_layers=len(mtp),
        experts=counts[0] if len(counts) == 1 else counts or None,
        experts_per_token=size.top_k if size else None,
        tensors=len(checkpoint.entries),
        files=len(checkpoint.files()),
        bytes=sum(dtypes.values()),
        bytes_by_kind=dict(kinds.most_common()),
        bytes_by_dtype=dict(dtypes.most_common()),
        parameters=size.facts() if size else None,
        context_length=context_length(checkpoint.config),
        stored_as=stored_as(checkpoint) if size else None,
        headers_only_files=len(checkpoint.cut_files()),
        made=_made(checkpoint.folder, size, width),
    )


def _folder_of(path: str | Path) -> Path:
    """Return the folder of a checkpoint; of one on the hub, that of its headers."""
    if Path(path).is_dir():
        return Path(path)
    from ream_stream.checkpoint import hub  # takes a second, which folders do not need

    return hub.fetch_headers(hub.find(str(path)))


def _made(folder: Path, size: ModelSize | None, width: int | None) -> dict[str, Any] | None:
    """Return how an output was made; None for other checkpoints."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder / MANIFEST)
    sizes = Counter(len(group) for layer in manifest.layers for group in layer.groups)
    return {
        "experts_before": manifest.before,
        "experts_after": manifest.after,
        "source_bytes": manifest.source_bytes,
        "width_before": manifest.width,
        "parameters_before": _size_before(manifest, size, width),
        "settings": dict(manifest.fingerprint),
        "versions": dict(manifest.versions),
        "groups_by_size": {str(size): sizes[size] for size in sorted(sizes)},
    }


def _size_before(
    manifest: Manifest, size: ModelSize | None, width: int | None
) -> dict[str, Any] | None:
    """Return the size of the source of an output; None if it is not known."""
    if size is None:
        return None
    wider = Fraction(manifest.width or 1, width or 1) if manifest.slices else Fraction(1)
    before = size.with_experts(manifest.before, wider=wider, slices=max(1, manifest.slices))
    return before.facts()


def _kind(name: str, in_stack: set[str]) -> str:
    if name in in_stack or ".experts." in name:
        return "routed experts"
    return "other parts of layers" if _IN_LAYER.search(name) else "outside the layers"
