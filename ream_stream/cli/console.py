"""What the verbs print with: consoles, tables of facts and of numbers, JSON."""

import errno
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

import click
from rich.console import Console
from rich.table import Table

from ream_stream.units import format_seconds


def console(*, stderr: bool) -> Console:
    """Return a console that prints text as it is: paths may hold brackets and colons."""
    # what is asked for goes to stdout and ends with its reader; a run goes on without one
    file: Any = _Lasting(sys.stderr) if stderr else None
    return Console(file=file, stderr=stderr, markup=False, emoji=False, highlight=False)


class _Lasting:
    """A stream that goes silent once its reader is gone: a run outlives its terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._gone = stream, False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, if anyone reads."""
        self._lasting(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if anyone reads."""
        self._lasting(self._stream.flush)

    def _lasting(self, act: Callable[[], object]) -> None:
        try:
            if not self._gone:
                act()
        except OSError as error:
            if error.errno not in {errno.EPIPE, errno.EIO}:
                raise
            self._gone = True


def print_json(value: object) -> None:
    """Print one JSON object to stdout."""
    click.echo(json.dumps(value, indent=2))


def facts(rows: Iterable[tuple[str, str]], *, title: str | None = None) -> Table:
    """Return a table of names and values, one a line."""
    table = Table(
        show_header=False, box=None, title=title, title_justify="left", pad_edge=False
    )
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def columns(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def phases(seconds: Mapping[str, float]) -> str:
    """Return the time of each phase in one line."""
    return ", ".join(f"{name} {format_seconds(time)}" for name, time in seconds.items())
