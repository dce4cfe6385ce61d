"""What a run was begun with: which bytes of its source, and how that is told when it goes on.

An output must be that of one source. Reading all of it again to make sure would cost as much
as a run, so a run keeps what costs little: of every shard its size, its times and the digest
of a sample, and of all that was read its SHA-256, taken while it was read. Going on, a shard
whose times are the same is taken for the same; of any other what was read is read and
compared once more. What nobody has read yet may then be new without harm: a run of that
source from the beginning would give the same bytes. On the hub a commit says it all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ream_stream import deferred
from ream_stream.checkpoint.header import TensorEntry
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.errors import DamagedError, OtherRunError
from ream_stream.file_access import FileRange, digest
from ream_stream.files import Written

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

SAMPLE_BLOCKS = 16
"""Number of evenly spaced sample blocks of a shard; other weights differ in all blocks."""

BLOCK_BYTES = 4096

_PIECE_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """Record of a shard of the source at the run's start."""

    size: int
    """Size of the shard in bytes."""

    modified: int
    """Time of the shard's last change of data, nanoseconds."""

    changed: int
    """Time of the shard's last change of data or attributes, nanoseconds."""

    sample: str
    """SHA-256 of `SAMPLE_BLOCKS` blocks of the shard, hex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecord:
    """Record of the source at the run's start."""

    commit: str | None = None
    """Commit on the hub; None if the source is not known to be from there."""

    shards: Mapping[str, ShardRecord] = field(default_factory=dict)
    """Records of the shards by file name; empty if the shards are streamed."""

    others: Mapping[str, Written] = field(default_factory=dict)
    """All files except config and weights, by name relative to the folder."""

    @classmethod
    def of(cls, source: Checkpoint) -> SourceRecord:
        """Return the record of a checkpoint; reads the other files, and a sample of shards."""
        return cls(
            commit=source.commit,
            shards={} if source.fetch else {p.name: _shard(source, p) for p in source.files()},
            others={name: _other(source, name) for name in source.others},
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SourceRecord:
        """Return the record that a journal has."""
        return cls(
            commit=value["commit"],
            shards={name: ShardRecord(**each) for name, each in value["shards"].items()},
            others={name: Written(**each) for name, each in value["others"].items()},
        )


class TensorDigests:
    """SHA-256 of the tensors that are read of each file, taken in a thread; one block a set.

    Reading pages that another thread is reading costs nothing but the hashing.
    """

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self._entries = entries
        self._digests: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1, "digest")
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread."""
        self._thread.shutdown()

    def add(self, name: str, values: Tensor) -> None:
        """Add values of a tensor, one-dimensional and not to be changed."""
        data: Any = values.view(torch.uint8).numpy()
        file = self._entries[name].path.name
        update = self._digests.setdefault(file, hashlib.sha256()).update
        self._wait()
        self._running = self._thread.submit(update, data)

    def result(self) -> dict[str, str]:
        """Return the digests of all that was added, hex, by file."""
        self._wait()
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()


def in_order(entries: Mapping[str, TensorEntry], names: Iterable[str]) -> list[str]:
    """Return names of tensors as their bytes lie in the files: so they are read and hashed."""
    return sorted(names, key=lambda name: (entries[name].path.name, entries[name].start, name))


def check_commit(source: Checkpoint, record: SourceRecord, output: Path) -> None:
    """Refuse to go on with another commit of a repository.

    Raises
    ------
    OtherRunError
        The branch has moved, or another revision was named.
    """
    known = source.fetch is not None or (record.commit and source.commit)
    if known and record.commit != source.commit:
        then = f"commit {record.commit}" if record.commit else "files on the disk"
        raise OtherRunError(
            f"{output} was begun from {then} and SOURCE is now commit {source.commit}: name "
            "the one it was begun from, another folder, or --restart to discard it"
        )


def check_others(source: Checkpoint, record: SourceRecord) -> None:
    """Refuse to go on where a file that is to be copied, or its digest, is not there any more.

    Raises
    ------
    DamagedError
        A file is gone.
    OtherRunError
        One has other content.
    """
    for name, then in record.others.items():
        if name not in source.others or not (source.folder / name).exists():
            raise DamagedError(
                f"{source.folder / name} was there when the run began and is gone: "
                "bring it back and run the same command again"
            )
        if source.others[name] != then.size or _other(source, name) != then:
            raise _changed(source.folder / name)


def changed_shards(source: Checkpoint, record: SourceRecord) -> set[str]:
    """Return the names of shards that may be others: touched, copied or replaced.

    Raises
    ------
    OtherRunError
        One has another size, or the sample of it is another.
    """
    found = set()
    for path in [] if source.fetch else source.files():
        then, now = record.shards.get(path.name), source.stamps[path]
        if then is None:
            found.add(path.name)
        elif (then.modified, then.changed) != (now.modified, now.changed):
            if then.size != now.size or then.sample != sample_of(path):
                raise _changed(path)
            found.add(path.name)
    return found


def compare(
    source: Checkpoint, names: Iterable[str], then: Mapping[str, str], shards: Collection[str]
) -> None:
    """Compare tensors with what was read of them.

    Parameters
    ----------
    source
        Where they are now.
    names
        The tensors.
    then
        What `TensorDigests` gave of them.
    shards
        Files that are looked at.

    Raises
    ------
    OtherRunError
        A file has other bytes.
    """
    ordered = (source.entries[name] for name in in_order(source.entries, names))
    for path, entries in groupby(ordered, key=lambda entry: entry.path):
        ranges = [FileRange(path=path, start=each.start, stop=each.stop) for each in entries]
        if path.name in shards and digest(ranges) != then.get(path.name):
            raise _changed(path)


def renewed(source: Checkpoint, record: SourceRecord, shards: Iterable[str]) -> SourceRecord:
    """Return a record with shards as they are now: they were compared."""
    paths = [path for path in source.files() if path.name in shards]
    now = {path.name: _shard(source, path) for path in paths}
    return replace(record, shards={**record.shards, **now})


def _changed(path: Path) -> OtherRunError:
    return OtherRunError(
        f"{path} is not what the run was begun with, its content is another: bring the old one "
        "back, choose another folder, or --restart to discard the run"
    )


def _shard(source: Checkpoint, path: Path) -> ShardRecord:
    stamp = source.stamps[path]
    return ShardRecord(
        size=stamp.size, modified=stamp.modified, changed=stamp.changed, sample=sample_of(path)
    )


def sample_of(path: Path) -> str:
    """Return the SHA-256 of `SAMPLE_BLOCKS` blocks of a shard, hex."""
    size = path.stat().st_size
    length = min(size, BLOCK_BYTES)
    # the last block ends with the file
    starts = [(size - length) * n // (SAMPLE_BLOCKS - 1) for n in range(SAMPLE_BLOCKS)]
    return digest(FileRange(path=path, start=at, stop=at + length) for at in starts)


def _other(source: Checkpoint, name: str) -> Written:
    size = source.others[name]
    return Written(name=name, size=size, sha256=digest([source.other(name)]))
