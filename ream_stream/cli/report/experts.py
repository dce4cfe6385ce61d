"""The experts of an output in pictures: all layers at once, and layers one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .figures import bars
from .maps import Cells, heat_map, layer_map, merges

_MOST_CHARACTERS = 1_000_000
"""Characters that pictures of single layers may have together."""

_SPOKEN = 8


def overview(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return maps of all layers: what experts are worth, and the tokens routed to them."""
    if not layers:
        return []
    numbers = [layer["index"] + 1 for layer in layers]
    gone = np.ones((len(layers), len(layers[0]["saliency"])), dtype=bool)
    for row, layer in enumerate(layers):
        gone[row, layer["kept"]] = False
    said = [_said(layer) for layer in layers]
    saliency = _shares([layer["saliency"] for layer in layers])
    maps = [("Saliency", np.sqrt(saliency), gone, "of saliency; second color: does not stay")]
    if all(layer["routed"] for layer in layers):
        routed = _shares([layer["routed"] for layer in layers])
        after = np.where(gone, 0.0, routed)
        maps.append(("Routed tokens, before", np.sqrt(routed), gone, "of routed tokens"))
        maps.append(("Routed tokens, after", np.sqrt(after), gone, "of experts that stay"))
    return [
        {
            "title": title,
            "figure": layer_map(
                cells, f"layers x experts: {told}", layers=numbers, second=second, said=said
            ),
        }
        for title, cells, second, told in maps
    ]


def details(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return pictures of single layers, in order.

    Of those that lost most saliency first, as many as a page has room for.
    """
    chosen: dict[int, dict[str, Any]] = {}
    room = _MOST_CHARACTERS
    for place in sorted(range(len(layers)), key=lambda place: layers[place]["kept_share"]):
        found = _detail(layers[place])
        room -= sum(len(str(value)) for value in found.values())
        if chosen and room < 0:
            break
        chosen[place] = found
    return [chosen[place] for place in sorted(chosen)]


def _shares(rows: Sequence[Sequence[float]]) -> Cells:
    """Return each row as shares of its largest number."""
    cells: Cells = np.asarray(rows, dtype=np.float32)
    shares: Cells = cells / np.maximum(cells.max(axis=1, keepdims=True), np.float32(1e-30))
    return shares


def _said(layer: Mapping[str, Any]) -> str:
    """Return what a layer's row of a map says."""
    saliency, groups = layer["saliency"], layer["groups"]
    most = sorted(range(len(saliency)), key=lambda expert: -saliency[expert])[:_SPOKEN]
    return (
        f"layer {layer['index'] + 1}: {len(groups)} of {len(saliency)} stay, with "
        f"{layer['kept_share']:.1%} of the saliency; most salient: {', '.join(map(str, most))}"
    )


def _detail(layer: Mapping[str, Any]) -> dict[str, Any]:
    saliency, kept = layer["saliency"], set(layer["kept"])
    order = sorted(range(len(saliency)), key=lambda expert: -saliency[expert])
    merged = [group for group in layer["groups"] if len(group) > 1]
    into = {member: group[0] for group in merged for member in group[1:]}
    gone = {place for place, expert in enumerate(order) if expert not in kept}

    def drawn(values: Sequence[float]) -> str:
        said = [f"{e}: {values[e]:.4g}, {_fate(e, kept, into)}" for e in order]
        named = "experts, most salient first"
        return bars([values[e] for e in order], named, "saliency", marked=gone, said=said)

    return {
        "number": layer["index"] + 1,
        "title": f"{len(saliency)} to {len(kept)} experts, {len(merged)} merged",
        "saliency": drawn(saliency),
        "domains": [(name, drawn(values)) for name, values in layer["domains"].items()],
        "merges": merges(merged, layer["dropped"], len(saliency)) if len(gone) else "",
        "similarity": ""
        if layer["similarity"] is None
        else heat_map(layer["similarity"], "similarity of experts"),
        "groups": [f"{group[0]} took in {', '.join(map(str, group[1:]))}" for group in merged],
        "dropped": ", ".join(map(str, layer["dropped"])),
    }


def _fate(expert: int, kept: set[int], into: Mapping[int, int]) -> str:
    if expert in kept:
        return "stays"
    return f"merged into {into[expert]}" if expert in into else "dropped"
