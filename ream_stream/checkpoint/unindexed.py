"""Multi-token-prediction layers in files that no index names: some are published so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ream_stream.errors import DamagedError

from .config_json import is_beside, lacks_mtp, mtp_layers
from .header import TensorEntry, read_header


def find_unindexed(
    folder: Path,
    config: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    *,
    with_data: bool,
) -> dict[str, TensorEntry]:
    """Return the tensors of such layers in files beside the shards; none if config.json says 0.

    Parameters
    ----------
    folder, config, entries
        Of the checkpoint, as its index tells.
    with_data
        See `read_header`.

    Raises
    ------
    DamagedError
        Two files have the same tensor, or one cannot be read and the layers are in no other.
    """
    found: dict[str, TensorEntry] = {}
    if mtp_layers(config) == 0:
        return found
    named, damaged = {entry.path for entry in entries.values()}, []
    for path in sorted(set(folder.glob("*.safetensors")) - named):
        if not path.is_file() or not path.name.isprintable():
            continue
        try:
            others = read_header(path, with_data=with_data)
        except DamagedError as error:
            damaged.append(error)
            continue
        if not is_beside(others.keys(), entries.keys(), config):
            continue
        if twice := sorted(others.keys() & found.keys()):
            other = found[twice[0]].path.name
            raise DamagedError(f"tensor {twice[0]!r} is in {other} and in {path.name}")
        found |= others
    if damaged and lacks_mtp([*entries, *found], config):
        raise damaged[0]
    return found
