"""Options of the command line, made of the fields of dataclasses that are options."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import Field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import click

from ream_stream.settings import flag_of, options_of

from .params import FILE, FOLDER, NEW_FOLDER, F, Parsed, option, together


def options_for(
    *kinds: type,
    only: Collection[str] | None = None,
    changed: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[F], F]:
    """Return a decorator that gives a command the options of dataclasses.

    Parameters
    ----------
    kinds
        Dataclasses with fields made by `settings.option`.
    only
        Names of those that are taken; None for all.
    changed
        What a verb says otherwise, by name of the option.
    """
    fields = options_of(*kinds)
    names = [name for name in fields if only is None or name in only]
    return together([_made(fields[name], (changed or {}).get(name, {})) for name in names])


def _made(field: Field[Any], changed: Mapping[str, Any]) -> Callable[[F], F]:
    """Return the decorator of one option."""
    known, flag = {**field.metadata, **changed}, flag_of(field)
    worked_out = known.get("otherwise")
    settings: dict[str, Any] = {
        "help": known["help"] + (f"  [default: {worked_out}]" if worked_out else ""),
        "required": known.get("required", False),
    }
    if field.type is bool:
        settings["is_flag"] = True
        if field.default:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
    else:
        settings["type"] = _type(field, known)
        settings["metavar"] = known.get("metavar")
        settings["multiple"] = get_origin(field.type) is tuple and "parse" not in known
    unset = field.default is None or field.default is False or field.default == ()
    if not unset and not worked_out:
        settings |= {"default": _written(field.default), "show_default": True}
    return option(known["section"], flag, field.name, **settings)


def _type(field: Field[Any], known: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return click's type of an option's values."""
    if "choices" in known:
        return click.Choice(known["choices"])
    if "parse" in known:
        return Parsed(known["parse"], known["metavar"].lower())
    if "least" in known:
        return click.IntRange(min=known["least"])
    kind = next(each for each in (*get_args(field.type), field.type) if each is not NoneType)
    if kind is not Path:
        return kind
    if not known.get("exists"):
        return NEW_FOLDER
    return FILE if known["metavar"] == "FILE" else FOLDER


def _written(value: Any) -> Any:  # noqa: ANN401
    """Return a default as one would type it."""
    if isinstance(value, tuple):
        return ",".join(f"{each:g}" for each in value)
    if isinstance(value, int) and value >= 10**9:
        return f"{value // 10**9}GB"
    return value
