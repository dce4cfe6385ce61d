"""What config.json says of the layers, which decides whose a tensor is."""

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""Keys of config.json for the number of multi-token-prediction layers."""

_MTP = re.compile(
    r"(?P<path>(?:model\.|language_model\.)*)(?:mtp[._].*|layers\.(?P<layer>[0-9]{1,9})\..*)"
)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes the text decoder: all, but in wrappers."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def mtp_layers(config: Mapping[str, Any]) -> int | None:
    """Return how many multi-token-prediction layers there should be; None if it is not told."""
    told = [
        part[key]
        for part in (config, text_config(config))
        for key in MTP_KEYS
        if isinstance(part.get(key), int)
    ]
    return max(told, default=None)


def find_mtp(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Return the tensors of such layers: under ``mtp``, or layers after the last."""
    layers = text_config(config).get("num_hidden_layers")
    found = set()
    for name in names:
        match = _MTP.fullmatch(name)
        if match is None:
            continue
        number = match["layer"]
        if number is None or (isinstance(layers, int) and int(number) >= layers):
            found.add(name)
    return found


def lacks_mtp(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Tell whether config.json speaks of such layers, and no tensor is of one."""
    return bool(mtp_layers(config)) and not find_mtp(names, config)


def is_beside(names: Set[str], known: Set[str], config: Mapping[str, Any]) -> bool:
    """Tell whether the tensors of another file are such layers of a checkpoint, and no more.

    Parameters
    ----------
    names
        Of the file's tensors; those of another format have other names.
    known
        Of the checkpoint's.
    config
        config.json.
    """
    if not names or names & known or find_mtp(names, config) != names:
        return False
    decoders = {match["path"] for match in map(_MTP.fullmatch, known) if match}
    behind = [match for match in map(_MTP.fullmatch, names) if match and match["layer"]]
    return all(match["path"] in decoders for match in behind)
