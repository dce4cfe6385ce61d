"""How the verbs look: options in sections, exit statuses below, paths and values as types."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ream_stream.untrusted import shell_words

F = TypeVar("F", bound=Callable[..., Any])

SECTIONS = (
    "Experts", "Method", "Comparison", "Text", "Checks", "Content", "Calibration", "Machine",
    "Output",
)  # fmt: skip
"""Sections of a verb's help in their order."""

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
"""Exit statuses with their meaning; a status that is not listed means failure."""


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
    return shell_words(["ream-stream", *arguments])


class Verb(click.Command):
    """A command whose help shows its options under the section each belongs to."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one definition list a section."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                name = getattr(param, "section", "Other")
                sections.setdefault(name, []).append(record)
        for name, records in sections.items():
            if records:
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


verbose_option = option(
    "Output", "-v", "--verbose", is_flag=True, help="Show every part of the plan."
)

quiet_option = option(
    "Output", "-q", "--quiet", is_flag=True, help="Say nothing but results and errors."
)

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)

work_dir_option = option(
    "Machine",
    "--work-dir",
    type=NEW_FOLDER,
    metavar="DIR",
    help="The --work-dir of the run, if it had one.",
)


class Parsed(click.ParamType[Any]):
    """A value that a function reads from text."""

    def __init__(self, parse: Callable[[str], Any], name: str) -> None:
        self._parse, self.name = parse, name

    def convert(
        self,
        value: Any,  # noqa: ANN401
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:  # noqa: ANN401
        """Return what the text says; a value that is read already as it is."""
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)
