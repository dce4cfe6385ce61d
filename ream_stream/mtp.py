"""Multi-token-prediction layers: extra layers that guess the token after the next.

They stand beside the decoder under names of their own, with experts and a router as a
decoder layer has, and read the same counts of config.json.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .families import text_config

_NAME = re.compile(r"(?:model\.|language_model\.)*(?:mtp[._].*|layers\.(?P<layer>\d+)\..*)")

COUNT_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""Keys of config.json for their number."""


def find_mtp(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Return the tensors of such layers: under ``mtp``, or layers after the last."""
    layers = text_config(config).get("num_hidden_layers")
    found = set()
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        number = match["layer"]
        if number is None or (isinstance(layers, int) and int(number) >= layers):
            found.add(name)
    return found


def without_mtp(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with no such layers."""
    patched = {key: 0 if key in COUNT_KEYS else value for key, value in config.items()}
    text = text_config(config)
    if text is not config:
        patched["text_config"] = without_mtp(text)
    return patched
