"""What the verbs print with: consoles, tables of facts and of numbers, JSON."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ream_stream.model.ranks.group import is_other_rank
from ream_stream.units import format_seconds
from ream_stream.untrusted import MOST_CHARACTERS, printable

from .terminal import beneath


class _Console(Console):
    """Shows text as it is, but for what a terminal would obey: paths may hold brackets."""

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401
        """Return what is shown of a string, that of a table's cell too."""
        return super().render_str(printable(text, most=MOST_CHARACTERS), **options)


def console(*, stderr: bool, quiet: bool = False) -> Console:
    """Return a console for one of the streams; a quiet one prints nothing."""
    quiet = quiet or is_other_rank()
    # what is asked for goes to stdout and ends with its reader; a run goes on without one
    file = beneath(sys.stderr if stderr else sys.stdout, lasting=stderr)
    return _Console(
        file=file, stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False
    )


def print_json(value: object) -> None:
    """Print one JSON object to stdout, which one of several ranks does."""
    if not is_other_rank():
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
