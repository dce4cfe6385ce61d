"""What can go wrong, and the exit status that says so.

The message of an error is written for the person at the terminal: what is
wrong, where, and what to do. A status that is not listed here means failure.
"""


def sentence(error: OSError) -> str:
    """Return what the system says of an error, with the file that it is about."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


class ReamStreamError(Exception):
    """The run failed."""

    exit_status = 1


class UsageError(ReamStreamError):
    """What was asked for is not possible; nothing was written."""

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


class NumbersError(ReamStreamError):
    """Weights, states or statistics are NaN or infinite."""


class InterruptedRunError(ReamStreamError):
    """A signal asked the run to stop; what was committed stays."""

    exit_status = 130

    def __init__(self, message: str, *, signal_number: int = 2) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number
