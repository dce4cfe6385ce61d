"""The verb `inspect`."""

from pathlib import Path
from typing import Any

import click

from .params import Verb, exit_statuses, json_option
from .source import Source


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3))
@click.argument("path", type=Source())
@json_option
def inspect(path: Path | str, *, as_json: bool) -> None:
    """Tell what a checkpoint holds, from its headers; of an output also how it was made.

    PATH is a checkpoint folder, or ORG/NAME[@REVISION] on the hub, of which headers and
    small files are fetched. A folder may hold no more than those. A model that cannot be
    compressed is described too, with the reason.

    Example:

    \b
        ream-stream inspect ./Qwen3-30B-A3B
        ream-stream inspect Qwen/Qwen3-30B-A3B
        ream-stream inspect ./Qwen3-23B --json
    """
    from ream_stream.evaluation.inspection import inspect as describe

    from .console import console, facts, print_json

    known = describe(path).facts()
    if as_json:
        print_json(known)
    else:
        console(stderr=False).print(facts(_rows(known, is_remote=isinstance(path, str))))


def _rows(known: dict[str, Any], *, is_remote: bool) -> list[tuple[str, str]]:
    from ream_stream.units import format_size

    from .plan_view import BITS_ROW, context, parameters, sizes_at

    total, mtp, size = known["bytes"] or 1, known["mtp_moe_layers"], known["parameters"]
    extra = f"; {mtp} for multi-token prediction" if mtp else ""
    cut, format_name = known["headers_only_files"], known["stored_as"] or "not read"
    told = f"headers only: {cut} of {known['files']} files end before their tensors do"
    if is_remote:
        told = "on the hub: headers and small files were read"
    return [
        *([("source", told)] if cut else []),
        ("model", f"{known['family']}{context(known['context_length'])}"),
        ("supported", "yes" if known["supported"] else f"no: {known['why_not']}"),
        ("parameters", parameters(size) if size else "not known"),
        ("layers", f"{known['layers']}, {known['moe_layers']} of them with experts" + extra),
        ("experts a layer", f"{known['experts']}, {known['experts_per_token'] or '?'} a token"),
        ("weights", f"{format_size(total)} in {known['files']} files, {format_name}"),
        *(
            (f"  {kind}", f"{format_size(part)} ({part / total:.1%})")
            for kind, part in known["bytes_by_kind"].items()
        ),
        (
            "  by dtype",
            ", ".join(f"{d} {part / total:.1%}" for d, part in known["bytes_by_dtype"].items()),
        ),
        *([(BITS_ROW, sizes_at(size))] if size else []),
        *(_made_rows(known) if known["made"] else []),
    ]


def _made_rows(known: dict[str, Any]) -> list[tuple[str, str]]:
    from ream_stream.units import format_size

    from .plan_view import BITS_ROW, parameters, sizes_at

    made, size = known["made"], known["parameters"]
    settings, before, weights = (
        made["settings"],
        made["parameters_before"],
        made["source_bytes"],
    )
    verb = "dropped" if settings.get("grouping") == "none" else "merged"
    slices, cut = settings.get("slices", 0), ""
    if slices:
        width = f" of width {made['width_before']}" if made["width_before"] else ""
        cut = f"{width} cut into {slices} slices of {settings['width'] or 'equal width'}"
    groups = ", ".join(f"{count} of {size}" for size, count in made["groups_by_size"].items())
    rows = [
        ("made by", f"ream-stream {made['versions'].get('ream-stream')}"),
        (
            "  experts",
            f"{made['experts_before']}{cut} -> {made['experts_after']}, the rest {verb}",
        ),
    ]
    if before:
        rows += [
            ("  parameters", f"{parameters(before)} -> {parameters(size)}"),
            (f"  {BITS_ROW}", f"{sizes_at(before)} -> {sizes_at(size)}"),
        ]
    if weights:
        rows.append(("  weights", f"{format_size(weights)} -> {format_size(known['bytes'])}"))
    return [
        *rows,
        ("  groups", f"{groups} (all layers)"),
        ("  settings", ", ".join(f"{name} {value}" for name, value in settings.items())),
    ]
