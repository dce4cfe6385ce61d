"""How the verbs look: options in sections, exit statuses below, sizes and shares as values."""

import re
import shlex
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import click

from ream_stream.units import parse_size

F = TypeVar("F", bound=Callable[..., Any])

STATUSES = {
    0: "done",
    1: "failed",
    2: "wrong usage; nothing was written",
    3: "damaged, or verification failed",
    10: "model not supported",
    11: "OUTPUT belongs to another run or is in use",
    12: "over the memory or disk budget",
    130: "interrupted (143 terminated, 129 hung up); the same command goes on",
}
"""Exit statuses and what they say; a status that is not listed means failure."""


def exit_statuses(*numbers: int) -> str:
    """Return the paragraph of a verb's help that lists its exit statuses."""
    lines = [f"  {number:>3}  {STATUSES[number]}" for number in numbers]
    return "\n".join(["\b", "Exit status:", *lines])


class Root(click.Group):
    """The group: verbs are listed in the order they were added, the command line is kept."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs, most used first."""
        del ctx
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the arguments, for telling how to resume."""
        ctx.obj = list(args)
        return super().parse_args(ctx, args)


def resume_command(ctx: click.Context) -> str:
    """Return the command line of this process as one would type it to go on."""
    arguments = [word for word in ctx.find_root().obj or [] if word != "--restart"]
    return shlex.join(["ream-stream", *arguments])


class Verb(click.Command):
    """A command whose help shows its options under the section each belongs to."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one definition list a section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                name = getattr(param, "section", "Other")
                sections.setdefault(name, []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


class _SectionOption(click.Option):
    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.section = section


def option(section: str, *names: str, **settings: Any) -> Callable[[F], F]:  # noqa: ANN401
    """Return click's decorator for an option that its help lists under `section`."""
    return click.option(*names, cls=_SectionOption, section=section, **settings)


def together(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    """Return one decorator for several options, listed in their order."""

    def decorate(command: F) -> F:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


json_option = option(
    "Output", "--json", "as_json", is_flag=True, help="Print one JSON object to stdout."
)


class Size(click.ParamType[int | None]):
    """Bytes, as people write them; ``auto`` gives None where it is allowed."""

    name = "size"

    def __init__(self, *, auto: bool = False) -> None:
        self._auto = auto

    def convert(
        self, value: int | str, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Return the number of bytes."""
        if isinstance(value, int) or (self._auto and value == "auto"):
            return value if isinstance(value, int) else None
        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(str(error) + (", or auto" if self._auto else ""), param, ctx)
        if size < 1:
            self.fail(f"{value!r} is nothing", param, ctx)
        return size


class Penalties(click.ParamType[tuple[float, ...]]):
    """Numbers above 0 with commas between them."""

    name = "numbers"

    def convert(
        self,
        value: tuple[float, ...] | str,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[float, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(word) for word in value.split(","))
        except ValueError:
            self.fail(
                f"{value!r} is not a list of numbers; write for example 0.3,1", param, ctx
            )


class Percent(click.ParamType[Fraction]):
    """A share of a whole, above 0% up to 100%."""

    name = "percent"

    def convert(
        self, value: Fraction | str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fraction:
        """Return the share as an exact fraction."""
        if isinstance(value, Fraction):
            return value
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*", value)
        share = Fraction(match[1]) / 100 if match else Fraction(0)
        if not 0 < share <= 1:
            self.fail(f"{value!r} is not a share; write for example 75%", param, ctx)
        return share
