"""SOURCE: a folder, or a checkpoint on the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .params import F, option

if TYPE_CHECKING:
    from ream_stream.checkpoint.hub import Remote


class Source(click.ParamType[Path | str]):
    """A folder that is there, or ``ORG/NAME[@REVISION]``."""

    name = "source"

    def convert(
        self, value: Path | str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        """Return a path if there is such a folder, else the text."""
        if Path(value).is_dir():
            return Path(value)
        text = str(value)
        if text.startswith((".", "/", "~")) or text.count("/") != 1 or Path(text).exists():
            self.fail(f"{text!r} is neither a folder nor ORG/NAME on the hub", param, ctx)
        return text


def source_argument(command: F) -> F:
    """Give a command the argument SOURCE and the option that goes with it."""
    streaming: Callable[[F], F] = option(
        "Machine",
        "--stream",
        is_flag=True,
        help="Fetch each shard of a SOURCE on the hub when a layer needs it, and delete it "
        "after: the disk never holds all of them.",
    )
    return click.argument("source", type=Source())(streaming(command))


def located(source: Path | str, *, stream: bool) -> "tuple[Path, Remote | None]":
    """Return the folder of a source, of its headers if it is on the hub, and what is there.

    Raises
    ------
    UsageError
        A folder cannot be streamed, or there is no such repository.
    """
    from ream_stream.checkpoint import hub
    from ream_stream.errors import UsageError

    if isinstance(source, Path):
        if stream:
            raise UsageError(f"--stream is for a SOURCE on the hub, {source} is a folder")
        return source, None
    remote = hub.find(source)
    return hub.fetch_headers(remote), remote


def fetched(remote: "Remote", say: Callable[[str], Any]) -> Path:
    """Fetch all of a checkpoint, and return its folder."""
    from ream_stream.checkpoint import hub
    from ream_stream.units import format_size

    size = sum(file.size for file in remote.files.values())
    say(f"fetching {remote.repo} at {remote.commit[:12]}, {format_size(size)} at most")
    return hub.download(remote)
