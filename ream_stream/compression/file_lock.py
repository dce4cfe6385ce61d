"""Folders that one process has for itself: the kernel holds its lock, and drops it with it."""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ream_stream.errors import OtherRunError, UsageError, space_for
from ream_stream.file_access import open_regular, regular_size
from ream_stream.files import make_directory, write_bytes

_HOLDER = re.compile(rb"process \d{1,20} on [\w.-]{1,255}")
_TAKEN = {errno.EWOULDBLOCK, errno.EACCES}

MARK, LOCK = ".ream-stream", "lock"
"""Names of the marker and lock files; with the marker, everything in a folder is ours."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder ours, and keep others out of it for the length of the block.

    Raises
    ------
    OtherRunError
        It has files and no `MARK`, or a living process is at work in it.
    """
    if regular_size(folder / MARK) is None:
        found = next(iter(folder.iterdir()), None) if folder.is_dir() else None
        if found is not None:
            raise OtherRunError(
                f"{folder} has files that are not of ream-stream (for example {found.name}); "
                "choose a new folder"
            )
        make_directory(folder)
        write_bytes(folder / MARK, b"ream-stream may delete everything in this folder\n")
    with lock(folder / LOCK):
        yield


@contextmanager
def lock(path: Path) -> Iterator[str | None]:
    """Hold a lock file for the length of the block.

    One left by a dead process does not block. What that process wrote in it is given to the
    block.

    Raises
    ------
    OtherRunError
        A living process holds it, or it is no regular file.
    UsageError
        The file system has no locks.
    """
    with open_regular(path, os.O_RDWR | os.O_CREAT) as file:
        descriptor = file.fileno()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in {errno.ENOLCK, errno.ENOTSUP}:
                raise UsageError(
                    f"the file system of {path.parent} has no locks: use another --work-dir"
                ) from error
            if error.errno not in _TAKEN:
                raise
            raise OtherRunError(
                f"{path.parent} is in use by {_named(descriptor) or 'another process'}; "
                "wait for that run or stop it"
            ) from None
        if regular_size(path) is None or path.lstat().st_ino != os.fstat(descriptor).st_ino:
            raise OtherRunError(f"{path} was replaced meanwhile; run the command again")
        left_by = _named(descriptor)
        with space_for(path):
            os.ftruncate(descriptor, 0)
            holder = f"process {os.getpid()} on {socket.gethostname()}\n"
            os.pwrite(descriptor, holder.encode(), 0)
        try:
            yield left_by
        finally:
            with suppress(OSError):  # which would hide why the block ended
                os.ftruncate(descriptor, 0)


def lock_holder(path: Path) -> str | None:
    """Return who holds a lock file, as it says itself; None if no one does.

    Raises
    ------
    OtherRunError
        It is no regular file.
    """
    if regular_size(path) is None:
        return None
    with open_regular(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            return _named(file.fileno()) or "another process"
    return None


def _named(descriptor: int) -> str | None:
    """Return the text that a process wrote in its lock; None for other text."""
    found = _HOLDER.match(os.pread(descriptor, 400, 0))
    return found[0].decode() if found else None
