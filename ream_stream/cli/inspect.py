"""The verb `inspect`."""

from pathlib import Path
from typing import Any

import click

from .params import FOLDER, Verb, exit_statuses, json_option


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3))
@click.argument("path", type=FOLDER)
@json_option
def inspect(path: Path, *, as_json: bool) -> None:
    """Tell what a checkpoint holds, from its headers; of an output also how it was made.

    A model that cannot be compressed is described too, with the reason.

    Example:

    \b
        ream-stream inspect ./Qwen3-30B-A3B
        ream-stream inspect ./Qwen3-23B --json
    """
    from ream_stream.evaluation.inspection import inspect as describe

    from .console import console, facts, print_json

    known = describe(path).facts()
    if as_json:
        print_json(known)
    else:
        console(stderr=False).print(facts(_rows(known)))


def _rows(known: dict[str, Any]) -> list[tuple[str, str]]:
    from ream_stream.units import format_size

    total, mtp = known["bytes"] or 1, known["mtp_moe_layers"]
    extra = f"; {mtp} for multi-token prediction" if mtp else ""
    rows = [
        ("family", str(known["family"])),
        ("supported", "yes" if known["supported"] else f"no: {known['why_not']}"),
        ("layers", f"{known['layers']}, {known['moe_layers']} of them with experts" + extra),
        ("experts a layer", str(known["experts"])),
        ("experts a token", str(known["experts_per_token"])),
        ("weights", f"{format_size(total)} in {known['files']} files"),
        *(
            (f"  {kind}", f"{format_size(size)} ({size / total:.1%})")
            for kind, size in known["bytes_by_kind"].items()
        ),
        (
            "stored as",
            ", ".join(f"{d} {size / total:.1%}" for d, size in known["bytes_by_dtype"].items()),
        ),
    ]
    return rows + (_made_rows(known["made"]) if known["made"] else [])


def _made_rows(made: dict[str, Any]) -> list[tuple[str, str]]:
    settings = made["settings"]
    verb = "dropped" if settings.get("grouping") == "none" else "merged"
    groups = ", ".join(f"{count} of {size}" for size, count in made["groups_by_size"].items())
    return [
        ("made by", f"ream-stream {made['versions'].get('ream-stream')}"),
        ("  experts", f"{made['experts_before']} -> {made['experts_after']}, the rest {verb}"),
        ("  groups", f"{groups} (all layers)"),
        ("  settings", ", ".join(f"{name} {value}" for name, value in settings.items())),
    ]
