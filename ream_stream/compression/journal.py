"""What a run has finished, in one small file that is replaced whole.

Order of writing, and the reason a kill at any point is harmless:

1. the layer's shards, in OUTPUT,
2. the statistics of the layer, in the work folder,
3. the hidden states that enter the next layer, in the work folder,
4. this journal, naming all of them with sizes and digests: the commit,
5. only then are the hidden states that entered the layer deleted.

So the journal never names a file that is not whole on disk, and a file of ours
that it does not name may be deleted at any time. Ours are, in OUTPUT, the names
listed here before the first is written and, in a folder that only we make, a few
patterns; anything else in either is somebody's and stays. Reading goes the other
way: journal first. A run that finds a journal made for other settings, another
source or another OUTPUT does not touch anything.

Every run has an identity, drawn when it begins: the journal has it, and OUTPUT
carries it in a file of its own. So a journal in another place is not taken for
that of a folder that it knows nothing of, and both may be moved.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ream_stream import files as durable
from ream_stream.errors import DamagedError, OtherRunError
from ream_stream.events import RefitResult
from ream_stream.file_access import is_inside, read_own_json
from ream_stream.files import Written
from ream_stream.planning.schedule import Begun, Schedule, Solver

from .source_record import SourceRecord

FORMAT = 6

OUTSIDE = "outside"
"""Key in `Journal.read` of tensors outside the layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """One committed layer."""

    index: int
    """Position of the layer in the model."""

    shards: tuple[Written, ...]
    """Shards of the layer in OUTPUT."""

    hidden: str | None
    """Name of the store of hidden states that enter the next layer; None after the last."""

    statistics: Written | None
    """File of the layer's sums in the work folder; None for a dense layer."""

    saliency: tuple[float, ...] | None
    """Saliency of each source expert; None for a dense layer."""

    domain_saliency: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Saliency of each source expert on each domain's tokens; empty for a single domain."""

    groups: tuple[tuple[int, ...], ...] | None
    """Source experts of each new expert, centroid first; None for a dense layer."""

    original: str | None = None
    """Name of the store of the original model's states that enter the next layer; None if they
    are not carried, or after the last."""

    refitted: RefitResult | None = None
    """Result of the refit; None without a refit or for a dense layer."""

    excluded: tuple[int, ...] = ()
    """Calibration sequences that are excluded from this layer on."""


@dataclass(kw_only=True, slots=True)
class Journal:
    """State of a run."""

    run: str = field(default_factory=lambda: secrets.token_hex(16))
    """Random identity of the run; no file in the finished OUTPUT depends on it."""

    output: str = ""
    """Path of OUTPUT when the journal was written."""

    fingerprint: dict[str, Any]
    """Inputs and settings that must be equal when the run resumes."""

    schedule: Schedule
    """Schedule chosen for the machine that the run began on; a resumed run keeps it."""

    source: SourceRecord = field(default_factory=SourceRecord)
    """Record of the source's files."""

    read: dict[str, dict[str, str]] = field(default_factory=dict)
    """SHA-256 of the tensors read from each source file, by layer, or `OUTSIDE`."""

    files: tuple[str, ...] = ()
    """Names of all files that the run writes in OUTPUT, whether they exist yet or not."""

    layers: list[LayerRecord] = field(default_factory=list)
    """Committed layers in order."""

    outside: list[Written] = field(default_factory=list)
    """Committed shards of tensors outside the layers."""

    def shards(self) -> list[Written]:
        """Return all committed shards."""
        return [shard for layer in self.layers for shard in layer.shards] + self.outside

    def begun(self) -> Begun:
        """Return the progress of the run, for a plan that resumes it."""
        written = sum(shard.size for shard in self.shards())
        return Begun(schedule=self.schedule, layers=len(self.layers), written_bytes=written)


def load(path: Path) -> Journal:
    """Read the journal of a run.

    Raises
    ------
    DamagedError
        It is not a journal.
    OtherRunError
        It is of another version, or no regular file.
    """
    try:
        value = read_own_json(path)
        if value["format"] != FORMAT:
            raise OtherRunError(f"{path} is of format {value['format']!r}, not {FORMAT}")
        if value["sha256"] != digest(value):
            raise ValueError("its content does not have its checksum")  # noqa: TRY301
        if not all(map(is_inside, value["files"])):
            raise ValueError("it names files outside the folder")  # noqa: TRY301
        return Journal(
            run=value["run"],
            output=value["output"],
            fingerprint=value["fingerprint"],
            schedule=schedule_of(value["schedule"]),
            source=SourceRecord.from_json(value["source"]),
            read={part: dict(files) for part, files in value["read"].items()},
            files=tuple(value["files"]),
            layers=[_record(record) for record in value["layers"]],
            outside=[Written(**file) for file in value["outside"]],
        )
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{path} is damaged ({error}): restore it, or delete it and what its run wrote"
        ) from error


def save(path: Path, journal: Journal, partial: Path | None = None) -> None:
    """Commit: replace the journal file, which is written under another name first."""
    value = asdict(journal)
    head = {"format": FORMAT, "sha256": digest(value)}
    durable.write_json(path, {**head, **value}, partial)


def check_fingerprint(journal: Journal, fingerprint: Mapping[str, Any], output: Path) -> None:
    """Refuse to go on with a run that was started differently.

    Raises
    ------
    OtherRunError
        The message names each field that differs, with both values.
    """
    different = [
        f"{key}: {journal.fingerprint.get(key)!r} then, {fingerprint.get(key)!r} now"
        for key in sorted({*journal.fingerprint, *fingerprint})
        if journal.fingerprint.get(key) != fingerprint.get(key)
    ]
    if different:
        raise OtherRunError(
            f"{output} was begun with other settings or another source "
            f"({'; '.join(different)}); use the same ones, another folder, or --restart "
            "to discard it"
        )


def digest(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a journal's fields, hex: a flipped digit would pass for another."""
    fields = {name: value[name] for name in Journal.__dataclass_fields__}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def schedule_of(value: Mapping[str, Any]) -> Schedule:
    """Return a schedule from its fields, as `asdict` gives them."""
    return Schedule(**{**value, "solver": Solver(**value["solver"])})


def _record(value: Mapping[str, Any]) -> LayerRecord:
    statistics, saliency, groups = value["statistics"], value["saliency"], value["groups"]
    return LayerRecord(
        index=value["index"],
        shards=tuple(Written(**shard) for shard in value["shards"]),
        hidden=value["hidden"],
        original=value.get("original"),
        statistics=Written(**statistics) if statistics else None,
        saliency=None if saliency is None else tuple(saliency),
        domain_saliency={k: tuple(v) for k, v in value.get("domain_saliency", {}).items()},
        groups=None if groups is None else tuple(tuple(group) for group in groups),
        refitted=RefitResult(**value["refitted"]) if value.get("refitted") else None,
        excluded=tuple(value["excluded"]),
    )
