"""How files are opened: bounded, never waited for, and never through a link that leads away.

A run leaves its folders for hours and comes back: what bears the name of a file of ours may be
anything by then. A link would lead to somebody's file, a pipe would never answer, a device
would be read to no end. A source is a stranger's, and during a run a file of it may become
the same.
"""

import errno
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ream_stream.untrusted import parse_json

from .errors import DamagedError, OtherRunError

MAX_JSON_BYTES = 200_000_000
"""That of an index of a million tensors."""

MAX_BYTES = 1 << 28
"""Largest file read whole; a journal of 100 layers, 512 experts, 10 domains has 12 MB."""

_TAIL_BYTES = 1 << 24
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)
_COPY_BYTES = 1 << 22

Origin = tuple[int, int]
"""An open file, and the offset of a piece in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRange:
    """Bytes of an existing file, to be copied without passing through memory."""

    path: Path
    """The file they are in."""

    start: int
    """Offset of the first byte."""

    stop: int
    """Offset after the last byte."""

    within: tuple[Path, ...] = ()
    """Folders that a link may lead into; empty if it may lead anywhere."""


def check_folder(path: Path) -> None:
    """Refuse a folder that a link leads to: paths that users give are resolved before.

    Raises
    ------
    OtherRunError
        It, or a folder above it, is a link.
    """
    if os.path.realpath(path) != os.path.abspath(path):  # noqa: PTH100 - links must stay
        raise OtherRunError(
            f"{path} is behind a link, and nothing is written, read or deleted through one; "
            "put the folder itself there"
        )


def resolved(path: Path) -> Path:
    """Return a path that a user gave, absolute and with its links followed."""
    return Path(os.path.realpath(path))


def regular_size(path: Path) -> int | None:
    """Return the bytes of a regular file, unread; None if there is nothing.

    Raises
    ------
    OtherRunError
        There is something else.
    """
    check_folder(path.parent)
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "a device")
        raise OtherRunError(f"{path} is {kind}, where a file of ours would be; move it away")
    return status.st_size


def open_regular(path: Path, flags: int = os.O_RDONLY) -> io.FileIO:
    """Open a regular file, without a buffer that could fail once more when it is closed.

    Parameters
    ----------
    path
        Created, if `flags` say so and nothing is there.
    flags
        Of `os.open`. What is opened for writing has no other name.

    Raises
    ------
    OtherRunError
        There is something else.
    """
    regular_size(path)
    writes = flags & os.O_ACCMODE != os.O_RDONLY

    def opener(name: str, _: int) -> int:
        # what was exchanged since is not followed, and not waited for
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)

    file = io.open(path, "r+b" if writes else "rb", buffering=0, opener=opener)  # noqa: SIM115, UP020
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or (writes and status.st_nlink > 1):
        file.close()
        raise OtherRunError(
            f"{path} is, by another name, not a file of ours alone; move it away"
        )
    return file


def drop_cached(file: io.FileIO) -> None:
    """Ask the kernel to drop an open file from the page cache, where it can be asked.

    Pages that are not on the disk yet stay; the kernel begins to write them.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_regular(path: Path, most: int = MAX_BYTES) -> bytes:
    """Read a regular file whole.

    Raises
    ------
    OtherRunError
        There is something else.
    DamagedError
        It has more than `most` bytes.
    """
    if (regular_size(path) or 0) > most:
        raise DamagedError(f"{path} is larger than any that a run writes")
    try:
        with open_regular(path) as file:
            return file.readall()
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_own_json(path: Path, most: int = MAX_BYTES, *, finite: bool = True) -> Any:  # noqa: ANN401
    """Read a JSON document of ours; see `read_regular` and `parse_json`."""
    try:
        return parse_json(read_regular(path, most), finite=finite, text=False)
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing") from error
    except ValueError as error:
        raise DamagedError(f"{path} is not valid JSON: {error}") from error


def last_lines(path: Path) -> list[str]:
    """Return the lines at the end of a log, most of it; none if there is no log."""
    size = regular_size(path)
    if size is None:
        return []
    with open_regular(path) as file:
        file.seek(max(0, size - _TAIL_BYTES))
        data = file.read(min(size, _TAIL_BYTES))
    return data.decode(errors="replace").split("\n")


def open_source(path: Path, within: Sequence[Path] = (), *, buffering: int = -1) -> BinaryIO:
    """Open a file for reading; pipes and devices are refused, and never waited for.

    What is checked is what was opened: nothing can take its place in between.

    Parameters
    ----------
    path
        The file, or a link to it.
    within
        Folders without links in their paths; a link that leads into none of them is
        refused. Empty if links may lead anywhere.
    buffering
        As in `io.open`.

    Raises
    ------
    DamagedError
        It is no file, or lies elsewhere.
    """

    def opener(name: str, flags: int) -> int:
        flags |= os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        _check_file(path, Path(name).stat().st_mode)  # opening a device may do something
        descriptor = _open_within(path, within, flags) if within else os.open(name, flags)
        try:
            _check_file(path, os.fstat(descriptor).st_mode)
        except DamagedError:
            os.close(descriptor)
            raise
        return descriptor

    return io.open(path, "rb", buffering, opener=opener)  # noqa: UP020 - has the opener


def read_json(
    path: Path, most: int = MAX_JSON_BYTES, *, finite: bool = True, text: bool = True
) -> Any:  # noqa: ANN401
    """Read a JSON file; see `parse_json`.

    Raises
    ------
    DamagedError
        It is not JSON, or no regular file of at most `most` bytes.
    """
    try:
        with open_source(path) as file:
            if os.fstat(file.fileno()).st_size > most:
                raise DamagedError(f"{path} is not a file of at most {most} bytes")
            return parse_json(file.read(), finite=finite, text=text)
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing") from error
    except ValueError as error:
        raise DamagedError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_object(
    path: Path, most: int = MAX_JSON_BYTES, *, finite: bool = True
) -> dict[str, Any]:
    """Read a JSON object; see `read_json`."""
    value = read_json(path, most, finite=finite)
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is not a JSON object")
    return value


def digest(ranges: Iterable[FileRange]) -> str:
    """Return the SHA-256 of bytes of files, one range after another, hex."""
    found = hashlib.sha256()
    for each in ranges:
        for piece, _ in pieces(each):
            found.update(piece)
    return found.hexdigest()


def lies_in(path: Path, folder: Path) -> bool:
    """Tell whether a path is a folder or lies in it, whatever either is called."""
    return any(
        each == folder or (each.exists() and folder.exists() and each.samefile(folder))
        for each in (path, *path.parents)
    )


def is_inside(name: str) -> bool:
    """Tell whether a relative name, written the one usual way, stays in its folder."""
    path = PurePosixPath(name)
    usual = path.as_posix() == name and not path.is_absolute()
    return usual and bool(path.parts) and ".." not in path.parts


def pieces(
    part: bytes | memoryview | FileRange,
) -> Iterator[tuple[bytes | memoryview, Origin | None]]:
    """Cut a part so that copying never holds more than a few megabytes.

    Of a file's bytes the origin is told too: they are read for their digest, and copied by
    the kernel.
    """
    if not isinstance(part, FileRange):
        view = memoryview(part).cast("B")
        for start in range(0, len(view), _COPY_BYTES):
            yield view[start : start + _COPY_BYTES], None
        return
    with open_source(part.path, part.within, buffering=0) as file:
        file.seek(part.start)
        left = part.stop - part.start
        while left:
            with reading(part.path):
                piece = file.read(min(left, _COPY_BYTES))
            if not piece:
                raise DamagedError(
                    f"{part.path} ends before byte {part.stop}: it was cut while it was read"
                )
            yield piece, (file.fileno(), part.stop - left)
            left -= len(piece)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let errors of the disk met in the block name a file: that of a read names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def free_bytes(path: Path) -> int:
    """Return what the file system of the nearest existing folder has free."""
    return shutil.disk_usage(existing(path)).free


def same_disk(one: Path, other: Path) -> bool:
    """Tell whether what is written to either takes space from both."""
    return existing(one).stat().st_dev == existing(other).stat().st_dev


def why_not_writable(path: Path) -> str | None:
    """Tell why nothing can be written where a folder is or would be; None if it can."""
    folder = existing(path)
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return "its file system is read-only"
    return None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"


def existing(path: Path) -> Path:
    """Return the nearest folder that is there."""
    while not path.exists():
        path = path.parent
    return path


def _check_file(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        if path.is_symlink():
            kind = f"a link to {kind}"
        raise DamagedError(f"{path} is {kind}, not a file")


def _open_within(path: Path, within: Sequence[Path], flags: int) -> int:
    """Open what a path leads to, folder by folder below one of `within`, without any link."""
    target = Path(os.path.realpath(path))
    home = next((home for home in within if target.is_relative_to(home)), None)
    if home is None:
        raise DamagedError(
            f"{path} is a link to {target}, outside of the folder: replace it by a copy"
        )
    *folders, name = target.relative_to(home).parts
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            inner = os.open(
                folder,
                os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                dir_fd=descriptor,
            )
            os.close(descriptor)
            descriptor = inner
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=descriptor)
    except OSError as error:
        if error.errno not in {errno.ELOOP, errno.ENOTDIR}:
            raise
        raise DamagedError(f"{path} became a link while it was opened") from error
    finally:
        os.close(descriptor)
