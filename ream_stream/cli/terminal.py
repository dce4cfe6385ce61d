"""The gate to the terminal: all that is printed passes here, so that no verb must think of it.

Text of others may hold codes that a terminal obeys. What the verbs print is made of such
text, and what libraries warn of too; codes of our own come from rich alone, which is given
text that went through `printable` (`tables.console`) and the stream beneath the gate.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ream_stream.untrusted import printable

_MOVES = re.compile(r"(?:\n|\x1b\[A)+")
"""Cursor moves that tqdm writes alone between bars; a bar begins with a carriage return."""


class Stream:
    """A text stream whose errors name it.

    Parameters
    ----------
    stream
        The process's own.
    name
        For messages.
    lasting
        Whether it goes silent once it cannot be written to: a run outlives its terminal.
    """

    def __init__(self, stream: TextIO, name: str, *, lasting: bool) -> None:
        self.stream, self._name, self._lasting = stream, name, lasting
        self._failed: OSError | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, if it can be."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if it can be."""
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            if self._failed is None:
                act()
        except OSError as error:
            error.filename = self._name
            self._failed = error
            discard(self.stream)
        if self._failed is not None and not self._lasting:
            raise self._failed  # again, if somebody took it for no matter: click does


class Gate(Stream):
    """The same for text that may hold anything."""

    encoding = "utf-8"  # click goes around a stream of any other; the one beneath escapes

    def write(self, text: str) -> int:
        """Write text with visible escapes for what a terminal would obey."""
        if not _MOVES.fullmatch(text):
            bar = text[:1] == "\r"
            text = text[:bar] + printable(text[bar:], keep="\n\t")
        return super().write(text)


def beneath(stream: Any, *, lasting: bool) -> Any:  # noqa: ANN401 - what rich writes to
    """Return the stream beneath the gate, for text that went through `printable`."""
    if isinstance(stream, Gate):
        return Stream(stream.stream, stream._name, lasting=lasting)
    return stream and Stream(stream, "output", lasting=lasting)


def discard(stream: TextIO) -> None:
    """Keep Python from a second complaint when it flushes at exit."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def guarded() -> Iterator[None]:
    """Put the gate before stdout and stderr for the length of the block.

    Descriptors that were closed are opened on nothing: the next file that is opened would
    have their number, and what libraries print would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    out, err = (stream or open(os.devnull, "w", encoding="utf-8") for stream in before)  # noqa: PTH123, SIM115
    for stream in (out, err):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = Gate(out, "standard output", lasting=False)
    sys.stderr = Gate(err, "standard error", lasting=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
