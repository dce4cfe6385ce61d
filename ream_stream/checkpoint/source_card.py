"""What an output's model card inherits from that of its source: metadata of the hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ream_stream.file_access import open_source
from ream_stream.untrusted import MAX_YAML_CHARACTERS, parse_yaml

CARD = "README.md"

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys of the source's model card that the output's card takes over."""

_FRONT = re.compile(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def hub_name(folder: Path) -> str | None:
    """Return ``ORG/NAME`` of a folder in the hub's cache, or in ours for headers; else None."""
    parts = folder.resolve().parts
    for part in reversed(parts):
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    if parts[-4:-3] == ("ream-stream",) and re.fullmatch(r"[0-9a-f]{40}", parts[-2]):
        return f"{parts[-3]}/{parts[-1]}"
    return None


def source_name(folder: Path) -> str:
    """Return what people call a source: its name on the hub, or that of its folder."""
    return hub_name(folder) or folder.resolve().name


def source_metadata(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Return the inherited entries, and a note if the card's head cannot be read."""
    path = folder / CARD
    if not path.is_file():
        return {}, None
    with open_source(path) as file:
        text = file.read(MAX_YAML_CHARACTERS).decode(errors="replace")
    match = _FRONT.search(text)
    if match is None:
        return {}, None
    try:
        values = parse_yaml(match[1])
    except ValueError as error:
        return {}, (
            f"the head of {CARD} in the source cannot be read ({error}): its license and "
            "language are not carried over"
        )
    if not isinstance(values, Mapping):
        return {}, None
    return {name: values[name] for name in _INHERITED if _is_plain(values.get(name))}, None


def _is_plain(value: object) -> bool:
    """Tell whether a value is text or a list of texts, as these fields are."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(t, str) and t and _is_text(t) for t in texts)


def _is_text(value: str) -> bool:
    return len(value) < 1000 and value.isprintable()
