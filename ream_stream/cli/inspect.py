"""The verb `inspect`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .params import FOLDER, Verb, exit_statuses, json_option

if TYPE_CHECKING:
    from ream_stream.checkpoint.reader import Checkpoint


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
    from ream_stream.checkpoint.reader import open_checkpoint

    from .console import console, facts, print_json

    known = describe(open_checkpoint(path)) | {"made": manifest_facts(path)}
    if as_json:
        print_json(known)
    else:
        console(stderr=False).print(facts(_rows(known)))


def describe(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Return what the headers tell."""
    from ream_stream.errors import UnsupportedModelError
    from ream_stream.model.families import family_of, text_config
    from ream_stream.model.mtp import find_mtp

    stacks, reason = {}, None
    text = text_config(checkpoint.config)
    try:
        stacks = checkpoint.experts()
        family_of(checkpoint.config)
        if not stacks:
            reason = "it has no experts"
    except UnsupportedModelError as error:
        reason = str(error)
    in_stack = {name for stack in stacks.values() for name in stack.slots()}
    kinds, dtypes = Counter[str](), Counter[str]()
    for name, entry in checkpoint.entries.items():
        kinds[_kind(name, in_stack)] += entry.nbytes
        dtypes[entry.dtype] += entry.nbytes
    counts = sorted({stack.count for stack in stacks.values()})
    mtp = find_mtp(stacks, checkpoint.config)
    return {
        "path": str(checkpoint.folder),
        "family": checkpoint.config.get("model_type"),
        "supported": reason is None,
        "why_not": reason,
        "layers": text.get("num_hidden_layers"),
        "moe_layers": len(stacks) - len(mtp),
        "mtp_moe_layers": len(mtp),
        "experts": counts[0] if len(counts) == 1 else counts or None,
        "experts_per_token": text.get("num_experts_per_tok"),
        "tensors": len(checkpoint.entries),
        "files": len(checkpoint.files()),
        "bytes": sum(dtypes.values()),
        "bytes_by_kind": dict(kinds.most_common()),
        "bytes_by_dtype": dict(dtypes.most_common()),
    }


def manifest_facts(path: Path) -> dict[str, Any] | None:
    """Return how an output was made; None for other checkpoints.

    Raises
    ------
    DamagedError
        Its manifest is not one.
    """
    from ream_stream.compression.finalize import MANIFEST
    from ream_stream.compression.manifest import read_manifest

    if not (path / MANIFEST).is_file():
        return None
    manifest = read_manifest(path / MANIFEST)
    sizes = Counter(len(group) for layer in manifest.layers for group in layer.groups)
    return {
        "experts_before": manifest.before,
        "experts_after": manifest.after,
        "settings": dict(manifest.fingerprint),
        "versions": dict(manifest.versions),
        "groups_by_size": {str(size): sizes[size] for size in sorted(sizes)},
    }


def _kind(name: str, in_stack: set[str]) -> str:
    if name in in_stack or ".experts." in name:
        return "routed experts"
    return "other parts of layers" if ".layers." in name else "outside the layers"


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
