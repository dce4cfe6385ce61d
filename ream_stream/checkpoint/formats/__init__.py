"""Storage schemes of weights: stored tensors to floats and back, one matrix at a time.

`detect` tells from headers how the matrix at a prefix is stored and gives the
codec that decodes and encodes it. Only merged experts pass through a codec on
their way to the output; all else is copied byte for byte.
"""

from collections.abc import Mapping

from .codec import FLOATS, Codec, Part, Plain
from .detection import ACTIVATION_SUFFIXES, REFUSED_SUFFIXES, Stored, detect, weight_settings
from .fp8 import Fp8Block, Fp8Scaled
from .ignored_modules import Modules, named_modules, without_gone
from .int4 import Int4
from .mxfp4 import Mxfp4
from .nvfp4 import Nvfp4

SCHEMES: Mapping[str, type[Codec]] = {
    codec.scheme: codec for codec in (Plain, Fp8Block, Fp8Scaled, Int4, Mxfp4, Nvfp4)
}
"""Codec classes by scheme; an instance holds the parameters of a checkpoint."""

__all__ = [
    "ACTIVATION_SUFFIXES",
    "FLOATS",
    "REFUSED_SUFFIXES",
    "SCHEMES",
    "Codec",
    "Fp8Block",
    "Fp8Scaled",
    "Int4",
    "Modules",
    "Mxfp4",
    "Nvfp4",
    "Part",
    "Plain",
    "Stored",
    "detect",
    "named_modules",
    "weight_settings",
    "without_gone",
]
