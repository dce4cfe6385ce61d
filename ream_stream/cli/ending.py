"""How the command line ends: an error becomes one sentence and an exit status."""

import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import click

from ream_stream.errors import InterruptedRunError, ReamStreamError, of_system
from ream_stream.untrusted import MOST_CHARACTERS, printable

INTERRUPTED = 130


def end(error: BaseException) -> int:
    """Say why the command ends, and return its exit status."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, click.Abort):
        # click makes one exception of Ctrl-C, of an end of input and of a question answered no
        return INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else 1
    if isinstance(error, SystemExit):  # click's, of a pipe without a reader
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return 1
    known = error if isinstance(error, ReamStreamError) else of_system(error)
    if known is None:
        known = ReamStreamError(f"{_told(error)}; {_details(error)}")
    if known.told:
        return known.exit_status
    # who stopped a run knows that it is no error
    head = "" if isinstance(known, InterruptedRunError) else "error: "
    click.echo(f"{head}{printable(str(known), most=MOST_CHARACTERS)}", err=True)
    if known.then:
        click.echo(printable(known.then), err=True)
    return known.exit_status


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Let what fails beside the command be one sentence too, for the length of the block."""
    before = threading.excepthook, sys.unraisablehook

    def tell(args: SimpleNamespace) -> None:
        error = args.exc_value
        if isinstance(error, Exception) and of_system(error) is None:
            click.echo(f"note: {_told(error)}; {_details(error)}", err=True)

    threading.excepthook = sys.unraisablehook = tell  # type: ignore[assignment]
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = before


def _told(error: BaseException) -> str:
    reason = printable(" ".join(str(error).split()), most=300)
    return (
        f"something unforeseen happened ({type(error).__name__}{': ' * bool(reason)}{reason})"
    )


def _details(error: BaseException) -> str:
    """Write the traceback to a file that only its owner reads, and say where it is."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="ream-stream-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            for line in traceback.format_exception(error):
                file.write(printable(line, keep="\n"))
    except (OSError, MemoryError) as why:
        return f"the details could not be written ({type(why).__name__})"
    return f"please report it with the details in {path}"
