"""What a checkpoint holds, from its headers; of an output also how it was made."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ream_stream.checkpoint.config_json import find_mtp, text_config
from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.manifest import MANIFEST, read_manifest
from ream_stream.errors import UnsupportedModelError
from ream_stream.model.families import family_of


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

    made: Mapping[str, Any] | None
    """Facts of the manifest if ream-stream made the checkpoint; None for others."""

    def facts(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**asdict(self), "path": str(self.path)}


def inspect(path: str | Path) -> Inspection:
    """Describe a checkpoint, one that cannot be compressed too.

    Raises
    ------
    UsageError
        There is no checkpoint.
    DamagedError
        Its headers, or the manifest of an output, are not what they should be.
    """
    checkpoint, reason = open_checkpoint(Path(path)), None
    stacks: Mapping[str, ExpertStack] = {}
    text = text_config(checkpoint.config)
    try:
        stacks = checkpoint.experts
        family_of(checkpoint.config)
        if not stacks:
            reason = "it has no experts"
    except UnsupportedModelError as error:
        reason = str(error)
    in_stack = {name for stack in stacks.values() for name in stack.slots()}
    kinds, dtypes = Counter[str](), Counter[str]()
    for name, entry in checkpoint.entries.items():
        kinds[_kind(name, in_stack)] += entry.nbytes
        dtypes[entry.dtype] += entry.nbytes
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
        experts_per_token=text.get("num_experts_per_tok"),
        tensors=len(checkpoint.entries),
        files=len(checkpoint.files()),
        bytes=sum(dtypes.values()),
        bytes_by_kind=dict(kinds.most_common()),
        bytes_by_dtype=dict(dtypes.most_common()),
        made=_made(checkpoint.folder),
    )


def _made(folder: Path) -> dict[str, Any] | None:
    """Return how an output was made; None for other checkpoints."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder / MANIFEST)
    sizes = Counter(len(group) for layer in manifest.layers for group in layer.groups)
    return {
        "experts_before": manifest.before,
        "experts_after": manifest.after,
        "settings": dict(manifest.fingerprint),
        "versions": dict(manifest.versions),
        "groups_by_size": {str(size): sizes[size] for size in sorted(sizes)},
    }


def _kind(name: str, in_stack: set[str]) -> str:
    if name in in_stack or ".experts." in name:
        return "routed experts"
    return "other parts of layers" if ".layers." in name else "outside the layers"
