"""What the tensors of each scheme are called, and what their codec needs to know."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ream_stream.errors import UnsupportedModelError

from .codec import FLOATS, Codec, Plain
from .fp8 import Fp8Block, Fp8Scaled
from .int4 import Int4
from .mxfp4 import Mxfp4
from .nvfp4 import Nvfp4


class Described(Protocol):
    """Header entry of a tensor."""

    @property
    def dtype(self) -> str:
        """Dtype of the tensor in the format's spelling."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""


_E8M0 = "F8_E8M0"
"""Dtype of powers of two in the safetensors format's spelling."""

_Shapes = Mapping[str, tuple[int, ...]]
_Builder = Callable[[str, _Shapes, Mapping[str, str], Mapping[str, Any]], Codec]


def _plain(suffix: str) -> _Builder:
    def build(
        _prefix: str, _shapes: _Shapes, dtypes: Mapping[str, str], _: Mapping[str, Any]
    ) -> Codec:
        return Plain(dtype=dtypes[suffix], suffix=suffix)

    return build


def _fp8_block(
    prefix: str,
    _shapes: _Shapes,
    dtypes: Mapping[str, str],
    settings: Mapping[str, Any],
) -> Codec:
    suffix = next(suffix for suffix in dtypes if suffix != ".weight")
    block = settings.get("weight_block_size") or settings.get("block_structure")
    if not (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    ):
        raise UnsupportedModelError(
            f"{prefix}: has scales of blocks, but the quantization_config of config.json gives "
            f"{block!r} for their size; two whole numbers are needed in weight_block_size"
        )
    return Fp8Block(
        block=(block[0], block[1]),
        scale_dtype=dtypes[suffix],
        scale_suffix=suffix,
        power_of_two=settings.get("scale_fmt") == "ue8m0" or dtypes[suffix] == _E8M0,
    )


def _fp8_scaled(
    prefix: str,
    shapes: _Shapes,
    dtypes: Mapping[str, str],
    settings: Mapping[str, Any],
) -> Codec:
    if settings.get("strategy") == "block":
        return _fp8_block(prefix, shapes, dtypes, settings)
    shape = shapes[".weight_scale"]
    per_row = shape != (1,) * len(shape)
    return Fp8Scaled(
        per_row=per_row, scale_dtype=dtypes[".weight_scale"], scale_rank=min(len(shape), 2)
    )


def _int4(
    prefix: str,
    _shapes: _Shapes,
    dtypes: Mapping[str, str],
    settings: Mapping[str, Any],
) -> Codec:
    tested: dict[str, tuple[object, ...]] = {
        "num_bits": (4,),
        "type": ("int",),
        "symmetric": (True,),
        "strategy": ("group",),
        "actorder": (None, False, "weight", "static"),
    }
    for key, values in tested.items():
        if settings.get(key, values[0]) not in values:
            raise UnsupportedModelError(
                f"{prefix}: quantization_config says {key}={settings[key]!r} for packed "
                f"integer weights; only {values[0]!r} is supported"
            )
    group = settings.get("group_size")
    if type(group) is not int or group <= 0 or group % 2:
        raise UnsupportedModelError(
            f"{prefix}: quantization_config gives group_size={group!r}; packed integer weights "
            "are read in groups of an even number of columns"
        )
    return Int4(
        group=group,
        scale_dtype=dtypes[".weight_scale"],
        shape_dtype=dtypes[".weight_shape"],
    )


def _nvfp4(code_suffix: str, outer_suffix: str, *, divides: bool) -> _Builder:
    def build(
        _prefix: str, shapes: _Shapes, _dtypes: Mapping[str, str], _: Mapping[str, Any]
    ) -> Codec:
        shape = shapes[outer_suffix]
        return Nvfp4(
            code_suffix=code_suffix,
            outer_suffix=outer_suffix,
            outer_shape=(1,) * min(len(shape), 1),
            divides=divides,
        )

    return build


def _mxfp4(code_suffix: str, scale_suffix: str, *, grouped: bool) -> _Builder:
    def build(
        _prefix: str, _shapes: _Shapes, dtypes: Mapping[str, str], _: Mapping[str, Any]
    ) -> Codec:
        return Mxfp4(
            code_suffix=code_suffix,
            scale_suffix=scale_suffix,
            grouped=grouped,
            code_dtype=dtypes[code_suffix],
            scale_dtype=dtypes[scale_suffix],
        )

    return build


SIGNATURES: tuple[tuple[Mapping[str, tuple[str, ...]], _Builder], ...] = (
    ({".weight": FLOATS}, _plain(".weight")),
    ({"": FLOATS}, _plain("")),
    ({".weight": ("F8_E4M3",), ".weight_scale_inv": FLOATS}, _fp8_block),
    ({".weight": ("F8_E4M3",), ".weight_scale": FLOATS}, _fp8_scaled),
    ({".weight": ("F8_E4M3",), ".scale": (*FLOATS, _E8M0)}, _fp8_block),
    (
        {".weight_packed": ("I32",), ".weight_scale": FLOATS, ".weight_shape": ("I64", "I32")},
        _int4,
    ),
    (
        {"_blocks": ("U8",), "_scales": ("U8",)},
        _mxfp4("_blocks", "_scales", grouped=True),
    ),
    (
        {".weight_packed": ("U8",), ".weight_scale": ("U8",)},
        _mxfp4(".weight_packed", ".weight_scale", grouped=False),
    ),
    ({".weight": ("I8",), ".scale": (_E8M0,)}, _mxfp4(".weight", ".scale", grouped=False)),
    (
        {
            ".weight_packed": ("U8",),
            ".weight_scale": ("F8_E4M3",),
            ".weight_global_scale": ("F32",),
        },
        _nvfp4(".weight_packed", ".weight_global_scale", divides=True),
    ),
    (
        {".weight": ("U8",), ".weight_scale": ("F8_E4M3",), ".weight_scale_2": ("F32",)},
        _nvfp4(".weight", ".weight_scale_2", divides=False),
    ),
)
"""Complete sets of suffixes with their dtypes, the matrix's own first, and codec builders."""

SUFFIXES = tuple(dict.fromkeys(suffix for needs, _ in SIGNATURES for suffix in needs))
