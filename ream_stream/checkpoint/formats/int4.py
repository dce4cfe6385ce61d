"""INT4 of compressed-tensors, ``pack-quantized``: symmetric, one scale for a group of columns.

Codes are integers from -8 to 7 plus 8, eight to an int32, the first in the lowest
bits; ``weight_shape`` holds rows and columns. Kimi-K2-Thinking stores its experts
so, in groups of 32, and uses the codes -7 to 7 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ream_stream import deferred
from ream_stream.checkpoint.header import torch_dtype

from .codec import Part, require_finite
from .four_bit import decode_groups, encode_groups, largest, least_error, pick

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

_VALUES = tuple(float(code - 8) for code in range(16))
_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_DIVISORS = (7.0, 7.5, 8.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4:
    """See the module."""

    scheme: ClassVar[str] = "int4"

    group: int = 32
    """Number of columns that share a scale; even, and a divisor of the number of columns."""

    scale_dtype: str = "BF16"
    """Dtype of the stored scales."""

    shape_dtype: str = "I64"
    """Dtype of the stored ``weight_shape``."""

    @property
    def multiple(self) -> int:
        """See `Codec.multiple`."""
        return self.group

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """See `Codec.parts`."""
        return (
            Part(suffix=_PACKED, dtype="I32", shape=(rows, -(-cols // 8))),
            Part(suffix=_SCALE, dtype=self.scale_dtype, shape=(rows, cols // self.group)),
            Part(suffix=_SHAPE, dtype=self.shape_dtype, shape=(2,)),
        )

    def size(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """See `Codec.size`."""
        rows, groups = shapes[_SCALE]
        return rows, groups * self.group

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """See `Codec.decode`."""
        word_RW = parts[_PACKED].reshape(rows, -1).contiguous()
        byte_RB = word_RW.view(torch.uint8)[:, : cols // 2]
        scale_RG = parts[_SCALE].to(torch.float32)
        return decode_groups(byte_RB, _VALUES, scale_RG, cols, dtype)

    def encode(
        self, matrix_RC: Tensor, kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See `Codec.encode`.

        The scale of a group is the best, by squared error, of its largest magnitude
        divided by 7 (Kimi's rule), 7.5 (compressed-tensors' rule) and 8.
        """
        rows, cols = matrix_RC.shape
        given = (kept or {}).get(_SCALE)
        scale_RG = torch.empty(
            rows,
            cols // self.group,
            dtype=torch_dtype(self.scale_dtype),
            device=matrix_RC.device,
        )

        def choose(group_PGN: Tensor, start: int, stop: int) -> Tensor:
            scale_RG[start:stop] = (
                self._choose(group_PGN) if given is None else given[start:stop]
            )
            return scale_RG[start:stop].to(torch.float32)

        byte_RB = encode_groups(matrix_RC, self.group, choose, _code)
        byte_RB = torch.nn.functional.pad(byte_RB, (0, -(cols // 2) % 4))
        shape = torch.tensor([rows, cols], dtype=torch_dtype(self.shape_dtype))
        return {
            _PACKED: byte_RB.view(torch.int32),
            _SCALE: scale_RG,
            _SHAPE: shape.to(matrix_RC.device),
        }

    def _choose(self, group_PGN: Tensor) -> Tensor:
        largest_PG = largest(group_PGN)
        require_finite(largest_PG)
        dtype = torch_dtype(self.scale_dtype)
        smallest = torch.finfo(dtype).tiny
        candidates = [
            torch.where(largest_PG > 0, (largest_PG / divisor).clamp_min(smallest), 1.0)
            .to(dtype)
            .to(torch.float32)
            for divisor in _DIVISORS
        ]
        return pick(candidates, least_error(group_PGN, candidates, _nearest))


def _nearest(scaled: Tensor) -> Tensor:
    return scaled.round().clamp_(-8.0, 7.0)


def _code(scaled: Tensor) -> Tensor:
    return _nearest(scaled).add_(8.0).to(torch.uint8)
