"""How files of a source are opened: only what is a file, and only where it may lie.

A source is a stranger's. During a run a file of it may become a link to a file of this
machine, a pipe that never answers, or a device.
"""

import errno
import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from .errors import DamagedError


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
        _check_regular(path, Path(name).stat().st_mode)  # opening a device may do something
        descriptor = _open_within(path, within, flags) if within else os.open(name, flags)
        try:
            _check_regular(path, os.fstat(descriptor).st_mode)
        except DamagedError:
            os.close(descriptor)
            raise
        return descriptor

    return io.open(path, "rb", buffering, opener=opener)  # noqa: UP020 - has the opener


def _check_regular(path: Path, mode: int) -> None:
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
