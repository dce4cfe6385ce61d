"""What to do next, at the end of what a verb prints."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console


def say_next(lines: Iterable[str], console: Console) -> None:
    """Print the next steps: commands stay in one line, so that they can be copied."""
    for number, line in enumerate(lines):
        console.print(f"{'next:' if not number else '     '} {line}", soft_wrap=True)


def say_clients(model: str, folder: Path, console: Console, **hub: Any) -> None:  # noqa: ANN401
    """Print with which command each client takes an output, and whether that was tested.

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
    from ream_stream.compression.manifest import MANIFEST, read_manifest
    from ream_stream.planning.clients import next_steps

    is_cut = read_manifest(folder / MANIFEST).slices > 1
    steps = next_steps(model, read_config(folder), is_cut=is_cut, **hub)
    say_next((f"{use}: {command}  ({tested})" for use, command, tested in steps), console)
