"""Which scheme a matrix is stored in: from the headers at its prefix, never from the family.

The tensors' suffixes and dtypes decide; ``quantization_config`` adds only what
headers cannot say, such as the size of blocks. The same family is published in
many schemes, and one checkpoint may mix several.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ream_stream.errors import DamagedError, UnsupportedModelError

from .codec import Codec, Part
from .schemes import SIGNATURES, SUFFIXES, Described

ACTIVATION_SUFFIXES = (".input_scale", ".input_global_scale")
"""Suffixes of activation scales of a weight: not part of the matrix. Among merged experts
the largest ``input_scale`` and the smallest ``input_global_scale`` (its inverse) hold."""

REFUSED_SUFFIXES: Mapping[str, str] = {
    ".qweight": "AWQ or GPTQ",
    ".weight_g_idx": "compressed-tensors with reordered columns",
    ".weight_zero_point": "compressed-tensors with zero points",
    ".absmax": "bitsandbytes",
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".scales": "a scheme with .scales",
    ".weight_bitmask": "compressed-tensors, sparse",
}
"""Suffixes of schemes that are not supported, with the schemes' names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Storage format of the matrix, or the stack of matrices, at a prefix."""

    prefix: str
    """Common prefix of the tensor names; a suffix follows it."""

    codec: Codec
    """Codec that decodes and encodes one matrix."""

    rows: int
    """Rows of one matrix."""

    cols: int
    """Columns of one matrix."""

    count: int | None
    """Number of matrices in the stack; None for a single matrix without that axis."""

    activation: tuple[str, ...]
    """Suffixes of `ACTIVATION_SUFFIXES` that the checkpoint has for this matrix."""

    def names(self) -> dict[str, str]:
        """Return the tensors' names by suffix."""
        parts = self.codec.parts(self.rows, self.cols)
        return {part.suffix: self.prefix + part.suffix for part in parts}


def detect(
    prefix: str, entries: Mapping[str, Described], quantization: Mapping[str, Any] | None
) -> Stored:
    """Find out how the matrix at a prefix is stored.

    Parameters
    ----------
    prefix
        A module for most schemes (``...experts.3.up_proj``), a parameter for
        fused experts and gpt-oss (``...experts.gate_up_proj``).
    entries
        What the headers say, by full name.
    quantization
        ``quantization_config`` of config.json as it stands.

    Raises
    ------
    UnsupportedModelError
        Nothing known is stored there; the message says why.
    DamagedError
        Shapes of the parts contradict each other or the config.
    """
    present = {
        suffix: entries[prefix + suffix] for suffix in SUFFIXES if prefix + suffix in entries
    }
    for suffix, scheme in REFUSED_SUFFIXES.items():
        if prefix + suffix in entries:
            raise UnsupportedModelError(f"{prefix + suffix}: {scheme} is not supported")
    activation = tuple(suffix for suffix in ACTIVATION_SUFFIXES if prefix + suffix in entries)
    for needs, build in SIGNATURES:
        if set(needs) == set(present) and all(
            present[suffix].dtype in dtypes for suffix, dtypes in needs.items()
        ):
            main = present[next(iter(needs))]
            stacked = len(main.shape) == (4 if "_blocks" in needs else 3)
            one = {s: e.shape[1:] if stacked else e.shape for s, e in present.items()}
            dtype = {suffix: entry.dtype for suffix, entry in present.items()}
            codec = build(prefix, one, dtype, weight_settings(quantization or {}, prefix))
            count = main.shape[0] if stacked else None
            rows, cols = _size(prefix, codec, one)
            _check(prefix, codec.parts(rows, cols), present, count)
            return Stored(
                prefix=prefix,
                codec=codec,
                rows=rows,
                cols=cols,
                count=count,
                activation=activation,
            )
    found = ", ".join(f"{suffix or '(no suffix)'} {e.dtype}" for suffix, e in present.items())
    raise UnsupportedModelError(
        f"{prefix}: not stored in a scheme that is supported; found there: {found or 'nothing'}"
    )


def weight_settings(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Return the settings in a quantization_config for a module's weights.

    That is the config itself, overlaid by ``weights`` of the entry of
    ``config_groups`` that targets the module: by name or expression first, else
    by a class of modules, which a checkpoint's headers do not tell apart.
    """
    groups = [
        group
        for group in (quantization.get("config_groups") or {}).values()
        if isinstance(group, Mapping)
    ]
    named = [
        group for group in groups if any(_names(t, module) for t in group.get("targets") or [])
    ]
    chosen = (named or groups or [{}])[0]
    return {**quantization, **(chosen.get("weights") or {})}


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module


def _size(prefix: str, codec: Codec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    try:
        return codec.size(shapes)
    except ValueError as error:
        raise DamagedError(f"{prefix}: a matrix was expected, shapes are {shapes}") from error


def _check(
    prefix: str, parts: Sequence[Part], present: Mapping[str, Described], count: int | None
) -> None:
    """Refuse parts whose shapes do not belong together."""
    for part in parts:
        shape = part.shape if count is None else (count, *part.shape)
        if present[part.suffix].shape != shape:
            raise DamagedError(
                f"{prefix + part.suffix} has shape {present[part.suffix].shape}; {shape} was "
                "expected from the other tensors of the matrix and quantization_config"
            )
