"""What to do next, at the end of what a verb prints."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

UNTESTED = (
    "load it as its source is loaded; no server was tried with this family and format "
    "(docs/reference/clients.md)"
)
"""What is said where no client is known to work."""


def say_next(lines: Iterable[str], console: Console) -> None:
    """Print the next steps: commands stay in one line, so that they can be copied."""
    for number, line in enumerate(lines):
        console.print(f"{'next:' if not number else '     '} {line}", soft_wrap=True)


def say_clients(model: str, folder: Path, console: Console, **hub: Any) -> None:  # noqa: ANN401
    """Print with which command each client takes an output that was tested with its family.

    Parameters
    ----------
    model
        Folder of the output as it was typed, or its name on the hub.
    folder
        Folder of the output.
    console
        Console that gets the lines.
    hub
        ``on_hub`` and ``revision`` of `clients.next_steps`.
    """
    from ream_stream.checkpoint.reader import read_config
    from ream_stream.planning.clients import next_steps

    steps = [
        f"{use}: {command}  ({tested})"
        for use, command, tested in next_steps(model, read_config(folder), **hub)
    ]
    say_next(steps or [UNTESTED], console)
