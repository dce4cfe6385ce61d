"""What an output says of itself: digests of its shards, and which experts became which.

`finish` writes the manifest as the last file of a run; it is read here without trust.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ream_stream import __version__
from ream_stream.errors import DamagedError
from ream_stream.file_access import is_inside, read_object
from ream_stream.files import Written

from .journal import Journal

MANIFEST = "ream_stream.json"

STATISTICS = "statistics.json"
"""Last file of statistics that are kept, as `MANIFEST` is of an output."""

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitOutcome:
    """Outcome of a layer's refit; see `events.RefitResult`."""

    penalty: float | None
    """Ridge penalty of the refit; None if none lowered the error: the layer is unchanged."""

    error_before: float
    """Squared error of routed outputs before the refit, relative to their squares."""

    remaining_error: float
    """Share of `error_before` that remains after the refit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroups:
    """One MoE layer."""

    index: int
    """Position of the layer in the model."""

    saliency: tuple[float, ...]
    """Saliency of each source expert."""

    domains: Mapping[str, tuple[float, ...]]
    """Saliency of each source expert on each domain's tokens; empty for a single domain."""

    groups: tuple[tuple[int, ...], ...]
    """Source experts of each new expert, centroid first."""

    refit: RefitOutcome | None
    """Outcome of the refit of the down projections; None without a refit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The manifest of an output."""

    fingerprint: Mapping[str, Any]
    """Settings, and digests of source and calibration set."""

    versions: Mapping[str, str]
    """Versions of the programs and libraries that made the output."""

    before: int
    """Experts of a source layer."""

    after: int
    """Experts of an output layer."""

    files: Mapping[str, Written] = field(repr=False)
    """Shards of the output by name."""

    width: int | None
    """Inner width of an expert in the source; None if an older version did not record it."""

    source_bytes: int | None
    """Bytes of the source's tensors; None if an older version did not record them."""

    documents: Mapping[str, Written] | None = field(repr=False)
    """Other files of the output by name; None if an older version did not record them."""

    layers: tuple[LayerGroups, ...] = field(repr=False)
    """Groups of the MoE layers."""

    @property
    def slices(self) -> int:
        """Slices that each expert was cut into; 0 if experts are whole."""
        return _count(self.fingerprint.get("slices", 0))

    @property
    def grouping(self) -> str:
        """Key of `method.grouping.GROUPINGS`."""
        return str(self.fingerprint["grouping"])


def manifest_of(
    journal: Journal,
    num_experts: int,
    kept: int,
    documents: Mapping[str, Written],
    *,
    source_bytes: int,
    width: int,
) -> dict[str, Any]:
    """Return the JSON of a manifest; `read_manifest` reads it back.

    Parameters
    ----------
    journal
        Journal of a run whose layers are all committed.
    num_experts, kept
        Experts of an MoE layer in the source and in the output.
    documents
        Files beside the shards, by name.
    source_bytes
        Bytes of the source's tensors.
    width
        Inner width of an expert in the source.
    """
    return {
        "format": FORMAT,
        "fingerprint": journal.fingerprint,
        "versions": {
            "ream-stream": __version__,
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "experts": {"before": num_experts, "after": kept, "width_before": width},
        "source_bytes": source_bytes,
        "files": {shard.name: _told(shard) for shard in journal.shards()},
        "documents": {
            name: _told(file)
            for name, file in documents.items()
            # JSON has no word for other names, and a hub takes none of them
            if _is_utf8(name)
        },
        "layers": [
            {
                "index": record.index,
                "saliency": record.saliency,
                **({"domains": record.domain_saliency} if record.domain_saliency else {}),
                "groups": record.groups,
                **({"refitted": asdict(record.refitted)} if record.refitted else {}),
            }
            for record in journal.layers
            if record.groups is not None
        ],
    }


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of an output.

    Raises
    ------
    DamagedError
        It is missing, or not a manifest.
    """
    if not path.is_file():
        raise DamagedError(
            f"{path} is missing: the run that writes it has not finished, or the folder is not "
            "an output of ream-stream"
        )
    value = read_object(path)
    if value.get("format") != FORMAT:
        raise DamagedError(f"{path} is of format {value.get('format')!r}, not {FORMAT}")
    try:
        return _manifest(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path} is not a manifest of ream-stream: {error!r}") from error


def _manifest(value: Mapping[str, Any]) -> Manifest:
    fingerprint = dict(value["fingerprint"])
    if "grouping" not in fingerprint:
        raise KeyError("grouping")
    source_bytes, width = value.get("source_bytes"), value["experts"].get("width_before")
    return Manifest(
        fingerprint=fingerprint,
        versions={str(key): str(text) for key, text in value["versions"].items()},
        before=_count(value["experts"]["before"]),
        after=_count(value["experts"]["after"]),
        width=None if width is None else _count(width),
        source_bytes=None if source_bytes is None else _count(source_bytes),
        files={name: _file(name, file) for name, file in value["files"].items()},
        documents=_documents(value.get("documents")),
        layers=tuple(_layer(layer) for layer in value["layers"]),
    )


def _file(name: str, value: Mapping[str, Any]) -> Written:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is not the name of a shard")
    return _written(name, value)


def _documents(value: Mapping[str, Any] | None) -> dict[str, Written] | None:
    if value is None:
        return None
    for name in value:
        if not is_inside(name) or re.search(r"(^|/)\.", name):
            raise ValueError(f"{name!r} is not the name of a file of an output")
    return {name: _written(name, file) for name, file in value.items()}


def _written(name: str, value: Mapping[str, Any]) -> Written:
    if not re.fullmatch(r"[0-9a-f]{64}", value["sha256"]):
        raise ValueError(f"{name} has no SHA-256")
    return Written(name=name, size=_count(value["size"]), sha256=value["sha256"])


def _layer(value: Mapping[str, Any]) -> LayerGroups:
    return LayerGroups(
        index=_count(value["index"]),
        saliency=_numbers(value["saliency"]),
        domains={str(k): _numbers(v) for k, v in value.get("domains", {}).items()},
        groups=tuple(tuple(_count(expert) for expert in group) for group in value["groups"]),
        refit=_refit(value.get("refitted")),
    )


def _refit(value: Mapping[str, Any] | None) -> RefitOutcome | None:
    if value is None:
        return None
    penalty = value["penalty"]
    return RefitOutcome(
        penalty=None if penalty is None else float(penalty),
        error_before=float(value["error_before"]),
        remaining_error=float(value["remaining_error"]),
    )


def _numbers(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(number) for number in values)


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _told(file: Written) -> dict[str, Any]:
    return {"size": file.size, "sha256": file.sha256}


def _is_utf8(name: str) -> bool:
    """Tell whether a file's name is UTF-8: Python has lone surrogates for what is not."""
    return os.fsencode(name) == name.encode(errors="replace")
