"""What can go wrong, and the exit status that says so.

The message of an error is written for the person at the terminal: what is
wrong, where, and what to do. A status that is not listed here means failure.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers for a full disk, an exceeded quota or a file at its size limit."""


class ReamStreamError(Exception):
    """The run failed; `then` is the line that says how to go on, shown as it is."""

    exit_status = 1

    told = False
    """Whether another rank prints the message."""

    def __init__(self, message: str, *, then: str | None = None) -> None:
        super().__init__(message)
        self.then = then


class UsageError(ReamStreamError):
    """The request is not possible; nothing was written."""

    exit_status = 2


class DamagedError(ReamStreamError):
    """A file is not what it should be: truncated, inconsistent or altered."""

    exit_status = 3


class UnsupportedModelError(ReamStreamError):
    """The checkpoint is of a kind this version cannot compress."""

    exit_status = 10


class OtherRunError(ReamStreamError):
    """The output folder belongs to something else, or is in use."""

    exit_status = 11


class OverBudgetError(ReamStreamError):
    """The plan needs more memory or disk than it was given."""

    exit_status = 12


class DeviceFullError(OverBudgetError):
    """A layer does not fit the device of one of several ranks."""


class NumbersError(ReamStreamError):
    """Weights, states or statistics are NaN or infinite."""

    def __init__(self, message: str, *, file: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        """Name of the source's file that holds them, if one does: it may be replaced."""


class InterruptedRunError(ReamStreamError):
    """A signal asked the run to stop; what was committed stays."""

    exit_status = 130

    def __init__(
        self, message: str, *, then: str | None = None, signal_number: int = 2
    ) -> None:
        super().__init__(message, then=then)
        self.exit_status = 128 + signal_number


class RankError(ReamStreamError):
    """Another of several ranks ended, or came to something else."""

    def __init__(
        self,
        message: str,
        *,
        then: str | None = None,
        exit_status: int = 1,
        kind: str = "",
        dead: Sequence[int] = (),
        told: bool = False,
    ) -> None:
        super().__init__(message, then=then)
        self.exit_status = exit_status
        self.kind = kind
        """Name of the class of the error that the other rank ended with; empty if it died."""
        self.dead = dead
        """Ranks that gave no sign of life."""
        self.told = told


_SHORT_OF_MEMORY = (
    "can't allocate memory",
    "bad_alloc",
    "out of memory",
    "failed to map segment",
    "cannot allocate memory",
    "can't start new thread",
)
"""Messages of libraries' own exceptions for exhausted memory or address space."""


def sentence(error: OSError) -> str:
    """Return the system's message for an error, with the file's name."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def of_system(error: BaseException) -> ReamStreamError | None:
    """Return a failure of the system as an error of ours; None for other errors."""
    told = sentence(error) if isinstance(error, OSError) else " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL:
        return OverBudgetError(f"{told}: free some space")
    if number in {errno.EMFILE, errno.ENFILE}:
        return ReamStreamError(f"{told}: raise the limit of open files (ulimit -n)")
    short = isinstance(error, RuntimeError | ImportError) and any(
        words in told.lower() for words in _SHORT_OF_MEMORY
    )
    if isinstance(error, MemoryError) or number == errno.ENOMEM or short:
        return OverBudgetError(
            f"memory ran out ({told or type(error).__name__}): give --ram less than there is, "
            "or raise the limit of the process (ulimit -v)"
        )
    return ReamStreamError(told) if number is not None else None


@contextmanager
def space_for(path: Path) -> Iterator[None]:
    """Turn a full disk met in the block into an error that says what to do.

    Raises
    ------
    OverBudgetError
        There is no space left for `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            error.filename = error.filename or str(path)
            raise
        raise OverBudgetError(
            f"no space left for {path} ({error.strerror}): free some and run the same command "
            "again to resume"
        ) from error
