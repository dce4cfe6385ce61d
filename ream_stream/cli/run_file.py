"""A run file: the options of a run as YAML, by the names that they have on the command line."""

from collections.abc import Mapping
from decimal import Decimal
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .params import FILE, NEW_FILE, option

_HEAD = "# a run of ream-stream: ream-stream compress --config THIS\n"
_NOT_OF_A_RUN = ("config", "save", "help", "as_json", "verbose", "quiet")
"""Options that a run file does not hold."""

ONLY_OF_COMPRESS = ("dry-run", "restart", "keep-work")
"""Names that `plan` passes over, so that both verbs read the same file."""


def _read(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Make the values of a run file the defaults of a verb's options."""
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **values_of(path, ctx.command)}


config_option = option(
    "Output",
    "--config",
    type=FILE,
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_read,
    help="Take SOURCE, OUTPUT and options from this YAML file; those of the command line win.",
)

save_option = option(
    "Output",
    "--save",
    type=NEW_FILE,
    metavar="FILE",
    help="Write what was given here as a new file for compress --config.",
)


def values_of(path: Path, command: click.Command) -> dict[str, Any]:
    """Return what a run file says for a verb, by the names of its parameters.

    Raises
    ------
    UsageError
        It is no YAML mapping of names to text or lists of text, or names what there is not.
    """
    from ream_stream.errors import UsageError
    from ream_stream.file_access import read_regular
    from ream_stream.untrusted import MAX_YAML_CHARACTERS, parse_yaml, printable

    try:
        found = parse_yaml(read_regular(path, 4 * MAX_YAML_CHARACTERS).decode("utf-8-sig"))
    except ValueError as error:
        raise UsageError(f"{path}: it is no run file: {error}") from error
    if not isinstance(found, Mapping):
        raise UsageError(f"{path}: it is no run file: names with values are needed")
    known, given = _names(command), {}
    for name, value in found.items():
        word = str(name).replace("_", "-")
        if word not in known:
            if word in ONLY_OF_COMPRESS:
                continue
            near = get_close_matches(word, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            said = printable(str(name), most=100)
            raise UsageError(f"{path}: there is no option {said}{hint}")
        param, values = known[word], value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) for each in values):
            raise UsageError(f"{path}: {word}: text or a list of text is needed")
        if not param.multiple and isinstance(value, list):
            raise UsageError(f"{path}: {word}: it takes one value, not a list")
        given[str(param.name)] = values if param.multiple else value
    return given


def save(ctx: click.Context, path: Path) -> None:
    """Write what a verb was given as a new run file.

    Raises
    ------
    UsageError
        The file exists.
    """
    import yaml  # type: ignore[import-untyped]

    from ream_stream import files
    from ream_stream.errors import UsageError
    from ream_stream.file_access import resolved

    if path.exists() or path.is_symlink():
        raise UsageError(f"--save {path}: it exists; give a new file")
    given = {
        word: _written(ctx.params[str(param.name)], multiple=param.multiple)
        for word, param in _names(ctx.command).items()
        if ctx.get_parameter_source(str(param.name)) is not ParameterSource.DEFAULT
        and not (isinstance(param, click.Argument) and ctx.params[str(param.name)] is None)
    }
    text = _HEAD + yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    files.write_bytes(resolved(path.parent) / path.name, text.encode())


def _names(command: click.Command) -> dict[str, Any]:
    """Return the parameters of a run by their names in a run file, arguments first."""
    found: dict[str, Any] = {}
    for param in command.params:
        if param.name in _NOT_OF_A_RUN:
            continue
        is_option = isinstance(param, click.Option)
        found[param.opts[0].removeprefix("--") if is_option else str(param.name)] = param
    return found


def _written(value: Any, *, multiple: bool) -> Any:  # noqa: ANN401
    """Return a value as one would write it in a run file: text that is read back the same."""
    if isinstance(value, tuple) and not multiple and isinstance(value[0], tuple):
        return ",".join(f"{name}={weight:g}" for name, weight in value)
    if isinstance(value, tuple):
        texts = [str(each) if multiple else f"{each!r}" for each in value]
        return texts if multiple else ",".join(texts)
    if isinstance(value, Fraction):
        percent = Decimal(value.numerator * 100) / Decimal(value.denominator)
        return f"{percent.normalize():f}%"
    if value is None:  # of a size
        return "auto"
    return value if isinstance(value, bool) else str(value)
