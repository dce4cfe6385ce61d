"""SOURCE: a folder, or a checkpoint on the hub."""

from pathlib import Path

import click


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


source_argument = click.argument("source", type=Source())
