"""MXFP4: FP4 e2m1, one power of two as scale for 32 columns (OCP Microscaling 1.0).

The scale is a byte, an exponent with bias 127; 255 means NaN. gpt-oss stores
``*_blocks`` (rows, groups, 16) and ``*_scales``; compressed-tensors stores
``weight_packed`` (rows, columns / 2) and ``weight_scale``; DeepSeek-V4 ``weight`` (rows,
columns / 2) and ``scale``, as int8 and float8. Same bytes, other shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ream_stream import deferred
from ream_stream.checkpoint.header import torch_dtype

from .codec import Part, require_finite
from .four_bit import (
    E2M1,
    decode_groups,
    e2m1_code,
    e2m1_nearest,
    encode_groups,
    largest,
    least_error,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

_GROUP = 32
_VALUES = (*E2M1, *(-value for value in E2M1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4:
    """See the module."""

    scheme: ClassVar[str] = "mxfp4"

    code_suffix: str = "_blocks"
    """Suffix of the codes' tensor name."""

    scale_suffix: str = "_scales"
    """Suffix of the exponents' tensor name."""

    grouped: bool = True
    """Whether codes have an axis of groups; otherwise the bytes of a row are one axis."""

    code_dtype: str = "U8"
    """Dtype of the stored codes."""

    scale_dtype: str = "U8"
    """Dtype of the stored exponents."""

    @property
    def multiple(self) -> int:
        """See `Codec.multiple`."""
        return _GROUP

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """See `Codec.parts`."""
        groups = cols // _GROUP
        shape = (rows, groups, _GROUP // 2) if self.grouped else (rows, cols // 2)
        return (
            Part(suffix=self.code_suffix, dtype=self.code_dtype, shape=shape),
            Part(suffix=self.scale_suffix, dtype=self.scale_dtype, shape=(rows, groups)),
        )

    def size(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """See `Codec.size`."""
        rows, groups = shapes[self.scale_suffix]
        return rows, groups * _GROUP

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """See `Codec.decode`.

        Exact in bfloat16: a power of two times two bits of mantissa.
        """
        byte_RB = parts[self.code_suffix].view(torch.uint8).reshape(rows, cols // 2)
        scale_RG = _power(parts[self.scale_suffix].view(torch.uint8))
        return decode_groups(byte_RB, _VALUES, scale_RG, cols, dtype)

    def encode(
        self, matrix_RC: Tensor, kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See `Codec.encode`.

        The scale of a group is the better, by squared error, of the one that puts
        its largest magnitude into [4, 8) and saturates at 6 (the rule of the
        standard) and of twice that. A group that was stored with a largest code
        under 4 gets a smaller scale and larger codes, with the same values.
        """
        rows, cols = matrix_RC.shape
        given = (kept or {}).get(self.scale_suffix)
        given = None if given is None else given.view(torch.uint8)
        exponent_RG = torch.empty(
            rows, cols // _GROUP, dtype=torch.uint8, device=matrix_RC.device
        )

        def choose(group_PGN: Tensor, start: int, stop: int) -> Tensor:
            exponent_RG[start:stop] = _choose(group_PGN) if given is None else given[start:stop]
            return _power(exponent_RG[start:stop])

        byte_RB = encode_groups(matrix_RC, _GROUP, choose, e2m1_code)
        shape = self.parts(rows, cols)[0].shape
        return {
            self.code_suffix: byte_RB.view(shape).view(torch_dtype(self.code_dtype)),
            self.scale_suffix: exponent_RG.view(torch_dtype(self.scale_dtype)),
        }


def _power(exponent: Tensor) -> Tensor:
    """Return 2 to the power of exponents with bias 127, float32; NaN for 255."""
    # the exponent field of a float32 is this byte, but 0 would be 0 and 255 infinite
    bits = exponent.to(torch.int32)
    field = (bits << 23) + (bits == 0) * 0x00400000 + (bits == 255) * 0x00400000
    return field.to(torch.int32).view(torch.float32)


def _choose(group_PGN: Tensor) -> Tensor:
    """Return the exponents, with bias, for groups; 127 for a group of zeros."""
    largest_PG = largest(group_PGN)
    require_finite(largest_PG)
    _, power = torch.frexp(largest_PG)
    low = torch.where(largest_PG > 0, power + (127 - 3), 127).clamp_(0, 254)
    high = (low + 1).clamp_(max=254)
    number = least_error(group_PGN.abs(), [_power(low), _power(high)], e2m1_nearest)
    return torch.where(number == 1, high, low).to(torch.uint8)
