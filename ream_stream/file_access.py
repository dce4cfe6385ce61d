"""How files of ours are opened: regular ones, never through a link, no larger than they can be.

A run leaves its folders for hours and comes back: what bears the name of a file of ours may be
anything by then. A link would lead to somebody's file, a pipe would never answer, a device
would be read to no end.
"""

import io
import os
import stat
from pathlib import Path
from typing import Any

from .errors import DamagedError, OtherRunError
from .parsing import parse_json

MAX_BYTES = 1 << 28
"""Largest file read whole; a journal of 100 layers, 512 experts, 10 domains has 12 MB."""

_TAIL_BYTES = 1 << 24
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


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
