"""What was measured, put into the model card of an output."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ream_stream import files
from ream_stream.checkpoint.source_card import CARD
from ream_stream.compression.model_card import with_quality
from ream_stream.errors import UsageError
from ream_stream.file_access import open_source

_MOST_BYTES = 10_000_000


def write_quality(output: Path, known: Mapping[str, Any] | None) -> None:
    """Write an evaluation into the card; all else in it stays.

    Raises
    ------
    UsageError
        There is no evaluation, no card, or no section for it.
    """
    if known is None:
        raise UsageError(
            "--card: nothing was measured; give what eval --json printed to --results"
        )
    path = output / CARD
    if not path.is_file():
        raise UsageError(f"--card: there is no {path}")
    with open_source(path) as file:
        text = file.read(_MOST_BYTES).decode(errors="surrogateescape")
    try:
        changed = with_quality(text, known)
    except ValueError as error:
        raise UsageError(f"--card: {path} was changed: {error}") from error
    files.write_bytes(path, changed.encode(errors="surrogateescape"))
