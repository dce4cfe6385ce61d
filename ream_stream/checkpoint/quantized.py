"""The quantized matrices of a checkpoint, under the names a model has for their floats."""

import re
from collections.abc import Mapping
from typing import Any

from .formats import REFUSED_SUFFIXES, Stored, detect
from .header import TensorEntry

_CODES = {
    ".weight": ("F8_E4M3", "U8", "I8"),
    ".weight_packed": ("I32", "U8"),
    "_blocks": ("U8",),
}
"""Suffixes and dtypes of the tensors that hold the codes of a matrix."""

_CACHE_SCALE = re.compile(
    r"\.(?:[qkv]_(?:scale|zero_point)|kv_scale|prob(?:_output)?_scale|[qkv]_proj\.output_scale)$"
)


def is_cache_scale(name: str) -> bool:
    """Tell whether a tensor is a scale of cached keys and values, or of attention's inputs.

    Servers read them beside quantized weights; transformers' classes have no place for them.
    """
    return _CACHE_SCALE.search(name) is not None


def find_quantized(
    entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
) -> dict[str, Stored]:
    """Find all matrices, or stacks of them, that are not stored as floats.

    Returns
    -------
    dict
        By the name that the floats would have: ``...q_proj.weight`` for what is in
        ``...q_proj.weight_packed`` and ``...q_proj.weight_scale``.

    Raises
    ------
    UnsupportedModelError
        One is stored in a scheme that is not read.
    DamagedError
        Its tensors do not belong together.
    """
    found = {}
    for name, entry in entries.items():
        for suffix, dtypes in _CODES.items():
            if name.endswith(suffix) and entry.dtype in dtypes:
                prefix = name.removesuffix(suffix)
                found[float_name(prefix, suffix)] = detect(prefix, entries, quantization)
        for suffix in REFUSED_SUFFIXES:
            if name.endswith(suffix):
                detect(name.removesuffix(suffix), entries, quantization)  # says what it is
    return found


def float_name(prefix: str, suffix: str) -> str:
    """Return the name of a matrix's float tensor, from a suffix of its codes."""
    return prefix + (".weight" if suffix.startswith(".") else "")


def tensors_of(stored: Stored) -> list[str]:
    """Return the names of all tensors of a matrix, scales of activations among them."""
    return [*stored.names().values(), *(stored.prefix + s for s in stored.activation)]
