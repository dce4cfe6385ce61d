"""The only module that creates, replaces or deletes files.

Every file appears under its final name whole and durable, or not at all:

1. it is written under ``NAME.partial`` in the same folder,
2. its data is synced,
3. it is renamed,
4. the folder is synced, so that the rename itself survives a power cut.

Folders (stores of hidden states) are published the same way, each file in them synced.
So what has a ``.partial`` name may be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from .errors import DamagedError, space_for
from .file_access import (
    FileRange,
    Origin,
    check_folder,
    drop_cached,
    open_regular,
    pieces,
    regular_size,
)

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"
FLUSH_BYTES = 64 << 20
"""Bytes copied between two flushes; a smaller file is synced once, at its end."""

LOG_BYTES = 10_000_000
"""Size above which a run rotates its log; a run of a day writes a tenth of it."""

_NOT_COPIED = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
)
"""Error numbers of kernels that cannot copy between these files: other disks, FUSE, old."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A file that was written."""

    name: str
    """File name, without its folder."""

    size: int
    """Size of the file in bytes."""

    sha256: str
    """SHA-256 of the whole file, hex."""


class BackgroundHasher:
    """Hashes and flushes an open file on threads while it is written; one block for each file.

    Hashing takes as long as copying, and the disk longer than either: without threads a copy
    reaches half of the disk's rate.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self._threads = ThreadPoolExecutor(2, "write")
        self._hashing: Future[None] | None = None
        self._flushing: Future[None] | None = None
        self._copied = 0

    def __enter__(self) -> Self:
        """Enter the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the threads; raise a failed flush, unless the block itself failed."""
        self._threads.shutdown()
        if error is None and self._flushing is not None:
            self._flushing.result()

    def hash(self, piece: bytes | memoryview, *, lasting: bool) -> None:
        """Add a piece to the digest; on a thread if the piece is `lasting`, else at once."""
        self._wait()
        if lasting:
            self._hashing = self._threads.submit(self._digest.update, piece)
        else:
            self._digest.update(piece)

    def flush(self, size: int) -> None:
        """Count `size` copied bytes, and start writing to disk after `FLUSH_BYTES` of them.

        The file is synced at its end too. The kernel tells an error of the disk once only.

        Raises
        ------
        OSError
            The disk failed.
        """
        self._copied += size
        if self._copied >= FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._flushing = self._threads.submit(os.fsync, self._file.fileno())
            self._copied = 0

    def hexdigest(self) -> str:
        """Return the digest of all pieces."""
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None


def write_stream(
    path: Path,
    parts: Iterable[bytes | memoryview | FileRange],
    partial: Path | None = None,
    *,
    sha256: str | None = None,
) -> Written:
    """Write a file part after part; memory is that of the largest part in memory.

    Parameters
    ----------
    path
        Its name when it is whole; what was there is replaced.
    parts
        What it is of.
    partial
        Its name until then, on the same disk, by default that with `PARTIAL`.
    sha256
        Digest that it must have to get its name, hex; None for any.

    Raises
    ------
    OverBudgetError
        The disk is full.
    DamagedError
        The content does not have the digest.
    """
    size = 0
    with _partial(path, partial) as file, BackgroundHasher(file) as beside:
        for part in parts:
            for piece, origin in pieces(part):
                # what comes from a file was read for the digest alone
                beside.hash(piece, lasting=origin is not None)
                _fill(file, piece, origin)
                size += len(piece)
                if origin is not None:
                    beside.flush(len(piece))
        if sha256 not in {None, beside.hexdigest()}:
            raise DamagedError(
                f"{path} is not written: what it is copied from is not what it was"
            )
    return Written(name=path.name, size=size, sha256=beside.hexdigest())


def write_chunk(path: Path, pieces: Sequence[memoryview], *, flush: bool) -> None:
    """Write a file of a folder that `publish_directory` will sync, or that is scratch.

    Missing folders are made; a file of the same size is written over. `flush` lets the kernel
    begin to write to the disk; nothing waits for it.
    """
    _put(path, pieces)
    if flush:
        with open_regular(path) as file:
            drop_cached(file)  # of what is not on the disk yet this begins the writing


def sync_chunk(path: Path, *, drop: bool) -> None:
    """Sync a file that `write_chunk` wrote, and `drop` it from the page cache."""
    with open_regular(path) as file:
        _sync(file.fileno())
        if drop:
            drop_cached(file)


def write_bytes(path: Path, data: bytes) -> Written:
    """Write a small file."""
    return write_stream(path, [data])


def write_json(path: Path, value: object, partial: Path | None = None) -> Written:
    """Write a JSON document as people read it: indented, keys in the given order."""
    # what is no text, such as the name of a file that is not UTF-8, becomes JSON's own escape
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_stream(path, [text.encode(errors="backslashreplace")], partial)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write a small safetensors file."""
    from safetensors.torch import save  # not save_file: it neither syncs nor honors the umask

    told = {"format": "pt", **(metadata or {})}
    told = {key: t.encode(errors="backslashreplace").decode() for key, t in told.items()}
    return write_bytes(path, save(dict(tensors), metadata=told))


def copy_file(source: Path, target: Path) -> Written:
    """Copy a file's bytes; permissions are those of a new file."""
    return write_stream(target, [FileRange(path=source, start=0, stop=source.stat().st_size)])


def make_directory(path: Path) -> None:
    """Create a folder and the missing ones above it, durably.

    Raises
    ------
    OtherRunError
        A link leads to it.
    """
    check_folder(path)
    if path.is_dir():
        return
    make_directory(path.parent)
    with space_for(path):
        _make(path)
        _sync_directory(path.parent)


def adopt(partial: Path, path: Path) -> None:
    """Sync a file that others wrote on the same disk, then give it its final name."""
    check_folder(path.parent)
    with space_for(path):
        with partial.open("rb") as file:
            _sync(file.fileno())
        _publish(partial, path)


def publish_directory(partial: Path, path: Path, *, drop: bool = False) -> None:
    """Sync all files of a folder, `drop` them from the page cache, and give it its name."""
    for folder, _, names in os.walk(partial):
        for name in names:
            sync_chunk(Path(folder, name), drop=drop)
        _sync_directory(Path(folder))
    _publish(partial, path)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it; a missing one is no error.

    Raises
    ------
    OtherRunError
        A link leads to the folder that it is in. It may itself be a link, which is deleted.
    """
    check_folder(path.parent)
    if path.is_dir() and not path.is_symlink():
        # what marks a folder as ours has the first name, and goes last
        for entry in sorted(path.iterdir(), reverse=True):
            remove(entry)
        _remove_empty(path)
    else:
        _unlink(path)


def remove_empty(path: Path) -> None:
    """Delete a folder if there is nothing in it."""
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        _remove_empty(path)


@contextmanager
def open_log(path: Path, older: Path) -> Iterator[FileIO]:
    """Open a log for `append`, for the block; a large one is put aside as `older` first."""
    if (regular_size(path) or 0) > LOG_BYTES:
        _replace(path, older)
    file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    size = file.seek(0, os.SEEK_END)
    if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
        append(file, "\n")  # after a line that a full disk cut
    try:
        yield file
    finally:
        with suppress(OSError):  # which would hide why the block ended
            file.close()


def append(file: FileIO, text: str) -> None:
    """Write at the end of a log: all of it has reached the kernel when this returns."""
    with space_for(Path(os.fsdecode(file.name))):
        _fill(file, text.encode())


def scratch_file() -> BinaryIO:
    """Return an open file without a name, in the system's temporary folder: it ends with us."""
    return tempfile.TemporaryFile()


@contextmanager
def _partial(path: Path, partial: Path | None) -> Iterator[FileIO]:
    """Open ``NAME.partial`` for the block, then sync and publish it under its name."""
    partial = partial or path.with_name(path.name + PARTIAL)
    check_folder(path.parent)
    remove(partial)
    with space_for(path):
        # no buffer: what could not be written would fail again, and hide why, when it is closed
        with partial.open("xb", buffering=0) as file:
            yield file
            _sync(file.fileno())
        _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    _replace(partial, path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _copy(file: FileIO, size: int, origin: Origin) -> int:
    """Let the kernel copy from file to file; return the number of copied bytes."""
    source, start = origin
    done = 0
    try:
        while hasattr(os, "copy_file_range") and done < size:
            copied = os.copy_file_range(
                source, file.fileno(), size - done, offset_src=start + done
            )
            if not copied:
                break
            done += copied
    except OSError as error:
        if error.errno not in _NOT_COPIED:
            raise
    return done


# The primitives below are the only calls here that change a disk; the crash tests wrap them.


def _fill(file: FileIO, piece: bytes | memoryview, origin: Origin | None = None) -> None:
    done = _copy(file, len(piece), origin) if origin is not None else 0
    while done < len(piece):
        done += file.write(memoryview(piece)[done:])


def _put(path: Path, pieces: Sequence[memoryview]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(path, os.O_RDWR | os.O_CREAT) as file:
        for piece in pieces:
            left = piece
            while left:
                left = left[file.write(left) :]


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network and FUSE file systems have no sync for folders
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise


def _replace(partial: Path, path: Path) -> None:
    os.replace(partial, path)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _make(path: Path) -> None:
    path.mkdir(exist_ok=True)


def _remove_empty(path: Path) -> None:
    path.rmdir()
