"""Where the files of a run are, and whose they are.

Besides the checkpoint a run writes in folders that only we make: `HOME` in OUTPUT, and with
--work-dir `DATA` in that one, beside its journal. Each carries the identity of the run, as the
journal does. So a journal is not taken for that of an OUTPUT which it knows nothing of, both
may be moved, and what else is in a work folder is somebody's and stays.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ream_stream import files
from ream_stream.compression.file_lock import LOCK, lock, lock_holder
from ream_stream.errors import DamagedError, OtherRunError, UsageError
from ream_stream.file_access import lies_in, read_own_json, regular_size, resolved

from .journal import Journal, load, save
from .manifest import MANIFEST, STATISTICS

HOME = ".ream-stream"
"""Folder in OUTPUT of lock and identity; without --work-dir of all files except shards."""

DATA = ".ream-stream-work"
"""Folder in a separate work folder of all working files except the journal."""

_IDENTITY, _JOURNAL = "run.json", "journal.json"
_WEIGHTS = ".safetensors"

_OURS = re.compile(
    r"(journal\.json|run\.json|tokens\.safetensors|log(\.1)?\.jsonl|(hidden|original)-\d{5}"
    r"|statistics-\d{5}\.safetensors|streamed|scratch-[a-z0-9-]+)"
    rf"(?P<partial>{re.escape(files.PARTIAL)})?"
)
"""Names of the files that a run writes in its folder, except the lock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """The folders of a run, without links; from `workspace_of`."""

    output: Path
    """Folder of the checkpoint that the run writes."""

    work: Path
    """Folder of the journal: `home`, or a folder elsewhere that may hold other files."""

    rank: int = 0
    """Number of this process among those of the run."""

    @property
    def home(self) -> Path:
        """The folder in OUTPUT that says whose it is and keeps other runs out."""
        return self.output / HOME

    @property
    def data(self) -> Path:
        """The folder of everything that the journal may name besides shards."""
        return self.work if self.work == self.home else self.work / DATA

    @property
    def journal(self) -> Path:
        """The file that is replaced at each commit."""
        return self.work / _JOURNAL

    @property
    def tokens(self) -> Path:
        """The calibration set as token ids."""
        return self.data / "tokens.safetensors"

    @property
    def log(self) -> Path:
        """Events as JSON lines, appended."""
        return self.data / "log.jsonl"

    @property
    def older_log(self) -> Path:
        """The previous log, renamed when it became large."""
        return self.data / "log.1.jsonl"

    @property
    def streamed(self) -> Path:
        """Shards of the source that are fetched for a while."""
        return self.data / "streamed"

    def hidden(self, boundary: int) -> Path:
        """Return the folder of the states that enter layer `boundary`."""
        return self.data / f"hidden-{boundary:05d}"

    def original(self, boundary: int) -> Path:
        """Return the folder of the states that enter layer `boundary` in the original model."""
        return self.data / f"original-{boundary:05d}"

    def statistics(self, layer: int) -> Path:
        """Return the file of one layer's sums."""
        return self.data / f"statistics-{layer:05d}.safetensors"

    def scratch(self, name: str) -> Path:
        """Return a folder of this rank that no journal names: it serves one layer only."""
        return self.data / (f"scratch-{name}" + (f"-{self.rank}" if self.rank else ""))

    @property
    def staged(self) -> Path:
        """A folder as `scratch`, but of all ranks: a layer before its refit."""
        return self.data / "scratch-layer"

    def is_complete(self) -> bool:
        """Tell whether the output is whole: its manifest is the last file written."""
        return any((self.output / name).is_file() for name in (MANIFEST, STATISTICS))

    def has_journal(self) -> bool:
        """Tell whether there is a journal, of whatever run."""
        return regular_size(self.journal) is not None

    def save(self, journal: Journal) -> None:
        """Commit: replace the journal."""
        save(self.journal, journal, self.data / (_JOURNAL + files.PARTIAL))

    def begun(self) -> Journal | None:
        """Return the journal of the run that is here; None if one may begin.

        Raises
        ------
        OtherRunError
            There is something else: files of others, or parts of different runs.
        DamagedError
            Whose the folders are cannot be told.
        """
        if self.output.exists() and not self.output.is_dir():
            raise OtherRunError(f"{self.output} is a file; choose a new folder")
        if not self.has_journal():
            self._check_is_free()
            return None
        if self.data != self.home and not self.data.is_dir():
            raise OtherRunError(
                f"{self.journal} is not of ream-stream; choose another folder for --work-dir"
            )
        journal = load(self.journal)
        self._check_is_of(journal)
        return journal

    def claim(self, journal: Journal) -> None:
        """Write into the folders which run they belong to, then its journal if that is new.

        A kill in between leaves folders where any run may begin, or, where one goes on at
        another place, the old place in some of them.
        """
        known = {
            "run": journal.run,
            "output": str(self.output),
            "inode": self.output.stat().st_ino,
            "work": str(self.work),
        }
        for folder in self._folders():
            if self._identity(folder) != known:
                files.write_json(folder / _IDENTITY, known)
        if journal.output != known["output"] or not self.has_journal():
            journal.output = str(self.output)
            self.save(journal)

    @contextmanager
    def locked(self) -> Iterator[str | None]:
        """Create the folders and keep other runs out of them for the length of the block.

        The block is given what a process that died in its run wrote of itself.

        Raises
        ------
        OtherRunError
            They hold something else, or a living process is at work in them.
        """
        self.begun()
        with self.locks() as left_by:
            self.begun()
            yield left_by

    @contextmanager
    def locks(self) -> Iterator[str | None]:
        """Do as `locked` does, whatever the folders hold."""
        with ExitStack() as stack:
            left_by = None
            for folder in self._folders():
                files.make_directory(folder)
                left_by = stack.enter_context(lock(folder / LOCK)) or left_by
            yield left_by

    def holder(self) -> str | None:
        """Return the process that keeps other runs out now; None if none does."""
        found = [lock_holder(folder / LOCK) for folder in self._folders()]
        return next((name for name in found if name), None)

    def elsewhere(self) -> str | None:
        """Return the work folder of the run that OUTPUT is of, if that is another one."""
        known, there = self._identity(self.home), Workspace(output=self.output, work=self.home)
        if known is not None and Path(known["work"]) != Path(known["output"], HOME):
            there = Workspace(output=self.output, work=resolved(Path(known["work"])))
        if there.work == self.work:
            return None
        if known is None or there.work == self.home:
            return str(there.work) if there.has_journal() else None
        # of two copies of a work folder the one that was asked for will do
        copies = [folder for folder in (self.data, there.data) if folder != self.home]
        runs = [found and found["run"] == known["run"] for found in map(self._identity, copies)]
        return str(there.work) if runs[-1] and not any(runs[:-1]) else None

    def check_is_of_one_run(self) -> None:
        """Refuse folders of different runs, whatever has become of the journal."""
        if not self.has_journal() and (elsewhere := self.elsewhere()) is not None:
            raise UsageError(f"the run in {self.output} has its work folder in {elsewhere!r}")
        known, own = map(self._identity, (self.home, self.data))
        # who cleans deletes that of OUTPUT last
        if own is not None and (known is None or known["run"] != own["run"]):
            raise OtherRunError(f"{self.work} is not the work folder of {self.output}")

    def remove_strays(self, journal: Journal) -> None:
        """Delete files of ours that the journal does not name."""
        ours = (self.tokens, self.log, self.older_log, self.streamed)
        named = {_JOURNAL, _IDENTITY, *(path.name for path in ours)}
        named |= {record.statistics.name for record in journal.layers if record.statistics}
        for record in journal.layers[-1:]:
            named |= {name for name in (record.hidden, record.original) if name}
        self._remove_files(named)
        for name in journal.files:
            files.remove(self.output / (name + files.PARTIAL))

    def check_committed(self, journal: Journal) -> None:
        """Make sure that what the journal names is there, by name and size.

        Raises
        ------
        DamagedError
            A file is missing or has another size.
        """
        for path, told, size in self._other_sizes(journal):
            state = "is missing" if size is None else f"has {size} bytes"
            raise DamagedError(
                f"{path} {state}, the journal says {told} bytes; "
                "restore it or start over with --restart"
            )

    def clean(self) -> None:
        """Delete the work files of a run, and its folders if empty; the journal goes first."""
        files.remove(self.journal)
        self._remove_files({_IDENTITY})
        for folder in reversed(self._folders()):
            for name in (_IDENTITY, _IDENTITY + files.PARTIAL, LOCK):
                files.remove(folder / name)
            files.remove_empty(folder)
            if folder == self.data:  # before the other folder stops telling of it
                files.remove_empty(self.work)

    def discard(self) -> None:
        """Delete everything that the run here wrote, the locks aside.

        The last to be written goes first: an index never outlives a shard. The journal stops
        naming a shard before that goes, and goes last: a kill on the way can be repeated.

        Raises
        ------
        OtherRunError, DamagedError
            There is no telling which files are ours.
        """
        journal = self.begun()
        if journal is not None:
            finals = [name for name in reversed(journal.files) if not name.endswith(_WEIGHTS)]
            self._remove_output(finals)
            journal.layers, journal.outside = [], []
            self.save(journal)
            self._remove_output(reversed(journal.files))
        self._remove_files({_JOURNAL, _IDENTITY})
        files.remove(self.journal)
        for folder in self._folders():
            files.remove(folder / _IDENTITY)

    def _folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((self.home, self.data)))

    def _remove_files(self, named: Iterable[str]) -> None:
        if self.data.is_dir():
            for path in sorted(self.data.iterdir()):
                if _OURS.fullmatch(path.name) and path.name not in named:
                    files.remove(path)

    def _remove_output(self, names: Iterable[str]) -> None:
        """Delete files in OUTPUT, and folders that are empty then, inner ones first."""
        folders = set[PurePosixPath]()
        for name in names:
            files.remove(self.output / name)
            files.remove(self.output / (name + files.PARTIAL))
            folders.update(PurePosixPath(name).parents[:-1])
        for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            files.remove_empty(self.output / folder)

    def _identity(self, folder: Path) -> dict[str, Any] | None:
        """Return the identity of a folder's run; None if it records none."""
        path = folder / _IDENTITY
        if regular_size(path) is None:
            return None
        try:
            value = read_own_json(path, 1 << 16)
            if any("\0" in value[key] for key in ("run", "output", "work")):
                raise ValueError("its fields are no names")  # noqa: TRY301
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{path} is damaged ({error}); restore or delete it") from error
        return dict(value)

    def _others(self) -> list[str]:
        """Return the names of what is in OUTPUT, our folder aside."""
        found = self.output.iterdir() if self.output.is_dir() else ()
        return sorted(path.name for path in found if path != self.home)

    def _check_is_free(self) -> None:
        others, elsewhere = self._others(), self.elsewhere()
        if elsewhere is not None:
            raise OtherRunError(
                f"{self.output} is of a run that has its work folder in {elsewhere!r}, not in "
                f"{self.work}: give that one to go on, or choose a new folder"
            )
        if others:
            raise OtherRunError(
                f"{self.output} is not empty and holds no run of ream-stream "
                f"(for example {others[0]}); choose a new folder"
            )

    def _check_is_of(self, journal: Journal) -> None:
        """Refuse an OUTPUT that a journal knows nothing of.

        It may have been moved, or deleted to begin again. But who puts the work folder of one
        into another moves its identity too: what is there must be what the journal tells.
        """
        known, here = self._identity(self.home), str(self.output)
        placed = journal.output == here
        if known is None:
            ours = placed and not self._others()
        else:
            ours = known["run"] == journal.run
            placed = here == known["output"] or known.get("inode") == self.output.stat().st_ino
        if self.data != self.home:
            own = self._identity(self.data)
            ours = ours and own is not None and own["run"] == journal.run
        if not ours:
            raise OtherRunError(
                f"{self.work} holds the run of {journal.output!r}, not of {here}: give folders "
                "that belong together, or new ones"
            )
        shards = {shard.name for shard in journal.shards()}
        names = [name for name in journal.files if name not in shards]
        early = [name for name in names if not name.endswith(_WEIGHTS)]
        found = [path for name in early if os.path.lexists(path := self.output / name)]
        if len(early) < len(names) and found:
            raise OtherRunError(
                f"{found[0]} is not of the run in {self.work}, which has not come to it yet: "
                "move it away"
            )
        for path, told, size in () if placed else self._other_sizes(journal):
            raise OtherRunError(
                f"{path} should have {told} bytes and has {size or 'none'}: {here} is not the "
                f"folder of the run in {self.work}, or was not moved whole"
            )

    def _other_sizes(self, journal: Journal) -> Iterator[tuple[Path, int, int | None]]:
        """Yield the files that are not as the journal says: the size in it, and on the disk."""
        statistics = [record.statistics for record in journal.layers if record.statistics]
        named = [(self.output, shard) for shard in journal.shards()]
        for folder, file in named + [(self.data, sums) for sums in statistics]:
            if (size := regular_size(folder / file.name)) != file.size:
                yield folder / file.name, file.size, size


def workspace_of(output: Path, work_dir: Path | None, source: Path | None = None) -> Workspace:
    """Return the folders of a run, links followed.

    Raises
    ------
    UsageError
        The folders may not lie as they do.
    """
    for path in (output, work_dir):
        if path is not None and path.is_symlink() and not path.exists():
            raise UsageError(f"{path} is a link that leads nowhere")
    output = resolved(output)
    work = output / HOME if work_dir is None else resolved(work_dir)
    made = Workspace(output=output, work=work)
    if work != made.home:
        if lies_in(work, output):
            raise UsageError(
                f"--work-dir {work_dir} lies in OUTPUT: leave it out, as the work folder is in "
                "OUTPUT then, or give a folder elsewhere"
            )
        if lies_in(output, made.journal) or lies_in(output, made.data):
            raise UsageError(f"{output} would lie among the work files in {work}")
    if source is not None and output != resolved(source):
        inside = next((path for path in (work, output) if lies_in(path, source)), None)
        if inside is not None:
            raise UsageError(f"{inside} lies in SOURCE, which is only read; choose another")
    return made
