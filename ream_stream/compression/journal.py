"""What a run has finished, in one small file that is replaced whole.

Order of writing, and the reason a kill at any point is harmless:

1. the layer's shards, in OUTPUT,
2. the statistics of the layer, in the work folder,
3. the hidden states that enter the next layer, in the work folder,
4. this journal, naming all of them with sizes and digests: the commit,
5. only then are the hidden states that entered the layer deleted.

So the journal never names a file that is not whole on disk, and a file of ours
that it does not name may be deleted at any time. Ours are, in OUTPUT, the names
listed here before the first is written and, in the work folder, a few patterns;
anything else in either is somebody's and stays. Reading goes the other way:
journal first. A run that finds a journal made for other settings or another
source does not touch anything.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ream_stream import files as durable
from ream_stream.errors import DamagedError, OtherRunError
from ream_stream.events import Refitted
from ream_stream.files import Written
from ream_stream.parsing import read_json
from ream_stream.planning.schedule import Begun, Schedule, Solver

FORMAT = 3

_OURS = re.compile(
    r"(journal\.json|tokens\.safetensors|log(\.1)?\.jsonl|(hidden|original)-\d{5}"
    r"|statistics-\d{5}\.safetensors|streamed|scratch-[a-z0-9-]+)"
    rf"(?P<partial>{re.escape(durable.PARTIAL)})?"
)
"""What a run writes in its work folder, the lock aside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """One committed layer."""

    index: int
    """Its position in the model."""

    shards: tuple[Written, ...]
    """Its files in OUTPUT."""

    hidden: str | None
    """Name of the store that enters the next layer; None after the last."""

    statistics: Written | None
    """Its sums, in the work folder; None for a dense layer."""

    saliency: tuple[float, ...] | None
    """One number a source expert; None for a dense layer."""

    domain_saliency: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The same of each domain's tokens alone; empty if there is one domain."""

    groups: tuple[tuple[int, ...], ...] | None
    """Source experts of each new expert, centroid first; None for a dense layer."""

    original: str | None = None
    """Name of the store of what enters the next layer in the original model; None if it is
    not carried, or after the last."""

    refitted: Refitted | None = None
    """What refitting came to; None if it was not asked for, or the layer is dense."""

    excluded: tuple[int, ...] = ()
    """Calibration sequences that count no more from this layer on."""


@dataclass(kw_only=True, slots=True)
class Journal:
    """State of a run."""

    fingerprint: dict[str, Any]
    """What must be the same for a run to be resumed."""

    schedule: Schedule
    """What was chosen for the machine the run began on, and is kept when it resumes."""

    files: tuple[str, ...] = ()
    """Names of all that the run writes in OUTPUT, whether it is there yet or not."""

    layers: list[LayerRecord] = field(default_factory=list)
    """Committed layers, from the first on."""

    outside: list[Written] = field(default_factory=list)
    """Committed shards of what is outside the layers."""

    def shards(self) -> list[Written]:
        """Return all committed shards."""
        return [shard for layer in self.layers for shard in layer.shards] + self.outside

    def begun(self) -> Begun:
        """Return how far the run is, for a plan that goes on with it."""
        written = sum(shard.size for shard in self.shards())
        return Begun(schedule=self.schedule, layers=len(self.layers), written_bytes=written)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """Where the files of a run are."""

    output: Path
    """The checkpoint being written."""

    work: Path
    """Journal, lock, hidden states, statistics and log."""

    @property
    def journal(self) -> Path:
        """The file that `save` replaces."""
        return self.work / "journal.json"

    @property
    def tokens(self) -> Path:
        """The calibration set as token ids."""
        return self.work / "tokens.safetensors"

    @property
    def log(self) -> Path:
        """Events as JSON lines, appended."""
        return self.work / "log.jsonl"

    @property
    def older_log(self) -> Path:
        """What was the log until it was large."""
        return self.work / "log.1.jsonl"

    @property
    def streamed(self) -> Path:
        """Shards of the source that are fetched for a while."""
        return self.work / "streamed"

    def hidden(self, boundary: int) -> Path:
        """Return the folder of the states that enter layer `boundary`."""
        return self.work / f"hidden-{boundary:05d}"

    def original(self, boundary: int) -> Path:
        """Return the folder of the states that enter layer `boundary` in the original model."""
        return self.work / f"original-{boundary:05d}"

    def statistics(self, layer: int) -> Path:
        """Return the file of one layer's sums."""
        return self.work / f"statistics-{layer:05d}.safetensors"

    def scratch(self, name: str) -> Path:
        """Return a folder that no journal names: what is in it serves one layer only."""
        return self.work / f"scratch-{name}"

    @contextmanager
    def locked(self) -> Iterator[str | None]:
        """Create both folders and keep other runs out of them for the length of the block.

        Raises
        ------
        OtherRunError
            The output folder holds something else, or a living process is at work in it.
        """
        self.check_is_ours()
        durable.make_directory(self.work)
        durable.make_directory(self.output)
        with durable.lock(self.work / "lock") as left_by:
            yield left_by

    def holder(self) -> str | None:
        """Return the process that keeps other runs out now; None if none does."""
        return durable.lock_holder(self.work / "lock")

    def check_is_ours(self) -> None:
        """Refuse an output folder that holds something else.

        Raises
        ------
        OtherRunError
            It is not empty and has no journal.
        """
        if self.output.exists() and not self.output.is_dir():
            raise OtherRunError(f"{self.output} is a file; choose a new folder")
        if self.journal.is_file() or not self.output.is_dir():
            return
        foreign = [path for path in self.output.iterdir() if path != self.work]
        if foreign:
            raise OtherRunError(
                f"{self.output} is not empty and holds no run of ream-stream "
                f"(for example {foreign[0].name}); choose a new folder"
            )

    def remove_strays(self, journal: Journal) -> None:
        """Delete files of ours that the journal does not name."""
        named = {self.journal.name, self.tokens.name, self.log.name, self.older_log.name}
        named.add(self.streamed.name)
        named |= {record.statistics.name for record in journal.layers if record.statistics}
        for record in journal.layers[-1:]:
            named |= {name for name in (record.hidden, record.original) if name}
        for path in self.work.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in named:
                durable.remove(path)
        for name in journal.files:
            durable.remove(self.output / (name + durable.PARTIAL))

    def check_committed(self, journal: Journal) -> None:
        """Make sure that what the journal names is there, by name and size.

        Raises
        ------
        DamagedError
            A file is missing or has another size.
        """
        statistics = [record.statistics for record in journal.layers if record.statistics]
        for folder, files in ((self.output, journal.shards()), (self.work, statistics)):
            for file in files:
                path = folder / file.name
                size = path.stat().st_size if path.is_file() else None
                if size != file.size:
                    state = "is missing" if size is None else f"has {size} bytes"
                    raise DamagedError(
                        f"{path} {state}, the journal says {file.size} bytes; "
                        "restore it or start over with --restart"
                    )

    def clean(self) -> None:
        """Delete the work files of a run, and the work folder if nothing else is in it.

        The journal goes first, as it names what goes next. What is in OUTPUT stays.
        """
        durable.remove(self.journal)
        for path in sorted(self.work.iterdir()):
            if _OURS.fullmatch(path.name):
                durable.remove(path)
        durable.remove(self.work / "lock")
        durable.remove_empty(self.work)

    def discard(self) -> None:
        """Delete everything this run wrote, the lock aside; nothing else is touched.

        First the journal stops naming what it named, and it goes last: killed on
        the way, the folder is still known for ours and can be discarded again.

        Raises
        ------
        DamagedError
            There is no telling which files are ours.
        """
        if self.journal.is_file():
            journal = load(self)
            journal.layers, journal.outside = [], []
            save(self, journal)
            # the last to be written goes first: an index never outlives a shard
            for name in reversed(journal.files):
                durable.remove(self.output / name)
                durable.remove(self.output / (name + durable.PARTIAL))
            for folder in _folders(journal.files):
                durable.remove_empty(self.output / folder)
        for path in sorted(self.work.iterdir()):
            if _OURS.fullmatch(path.name) and path != self.journal:
                durable.remove(path)
        durable.remove(self.journal)


def load(workspace: Workspace) -> Journal:
    """Read the journal of a run.

    Raises
    ------
    DamagedError
        It is not a journal.
    """
    try:
        value = read_json(workspace.journal, text=False)
        if value["format"] != FORMAT:
            raise OtherRunError(
                f"{workspace.journal} is of format {value['format']}, not {FORMAT}"
            )
        if value["sha256"] != digest(value):
            raise ValueError("its content does not have its checksum")  # noqa: TRY301
        if not all(map(_is_inside, value["files"])):
            raise ValueError("it names files outside the folder")  # noqa: TRY301
        return Journal(
            fingerprint=value["fingerprint"],
            schedule=_schedule(value["schedule"]),
            files=tuple(value["files"]),
            layers=[_record(record) for record in value["layers"]],
            outside=[Written(**file) for file in value["outside"]],
        )
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{workspace.journal} is damaged ({error}); "
            f"delete {workspace.output} and {workspace.work} and start over"
        ) from error


def save(workspace: Workspace, journal: Journal) -> None:
    """Commit: replace the journal file."""
    value = asdict(journal)
    head = {"format": FORMAT, "sha256": digest(value)}
    durable.write_json(workspace.journal, {**head, **value})


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


def _is_inside(name: str) -> bool:
    """Tell whether a relative name, written the one usual way, stays in its folder."""
    path = PurePosixPath(name)
    usual = path.as_posix() == name and not path.is_absolute()
    return usual and bool(path.parts) and ".." not in path.parts


def _folders(names: Iterable[str]) -> list[PurePosixPath]:
    """Return the folders that names are in, the inner before the outer."""
    parents = {parent for name in names for parent in PurePosixPath(name).parents[:-1]}
    return sorted(parents, key=lambda folder: len(folder.parts), reverse=True)


def _schedule(value: Mapping[str, Any]) -> Schedule:
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
        refitted=Refitted(**value["refitted"]) if value.get("refitted") else None,
        excluded=tuple(value["excluded"]),
    )
