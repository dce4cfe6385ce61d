"""NVFP4: FP4 e2m1, an e4m3 scale for 16 columns, a float32 scale for the matrix.

The two ways to store it differ in names, and the outer scale goes opposite ways:
compressed-tensors divides by ``weight_global_scale`` (448 * 6 / largest),
modelopt multiplies by ``weight_scale_2`` (largest / (448 * 6)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ream_stream import deferred

from .codec import Part, require_finite
from .four_bit import (
    E2M1,
    decode_groups,
    e2m1_code,
    e2m1_nearest,
    encode_groups,
    largest,
    least_error,
    pick,
)
from .fp8 import E4M3_MAX, e4m3_scale

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

_GROUP = 16
_VALUES = (*E2M1, *(-value for value in E2M1))
_LARGEST = 6.0
_SCALE = ".weight_scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Nvfp4:
    """See the module."""

    scheme: ClassVar[str] = "nvfp4"

    code_suffix: str = ".weight_packed"
    """Suffix of the codes' tensor name."""

    outer_suffix: str = ".weight_global_scale"
    """Suffix of the tensor name of the matrix's global scale."""

    outer_shape: tuple[int, ...] = (1,)
    """Shape of the stored global scale: one number, with or without an axis."""

    divides: bool = True
    """Whether values are divided by the global scale; otherwise they are multiplied by it."""

    @property
    def multiple(self) -> int:
        """See `Codec.multiple`."""
        return _GROUP

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """See `Codec.parts`."""
        return (
            Part(suffix=self.code_suffix, dtype="U8", shape=(rows, cols // 2)),
            Part(suffix=_SCALE, dtype="F8_E4M3", shape=(rows, cols // _GROUP)),
            Part(suffix=self.outer_suffix, dtype="F32", shape=self.outer_shape),
        )

    def size(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """See `Codec.size`."""
        rows, groups = shapes[_SCALE]
        return rows, groups * _GROUP

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """See `Codec.decode`; the two scales are combined first, in float32."""
        byte_RB = parts[self.code_suffix].reshape(rows, cols // 2)
        scale_RG = self._combined(parts[_SCALE], parts[self.outer_suffix])
        return decode_groups(byte_RB, _VALUES, scale_RG, cols, dtype)

    def encode(
        self, matrix_RC: Tensor, kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See `Codec.encode`.

        Engines that run gate and up projection as one matrix want one outer scale
        for both: give it in `kept`, from `outer_scale`. The scale of a group is the
        better, by squared error, of those that give its largest magnitude the code
        of 6 and the code of 4.
        """
        rows, cols = matrix_RC.shape
        given, outer = (kept or {}).get(_SCALE), (kept or {}).get(self.outer_suffix)
        if outer is None:
            outer = self.outer_scale([matrix_RC])
        scale_RG = torch.empty(
            rows, cols // _GROUP, dtype=torch.float8_e4m3fn, device=matrix_RC.device
        )

        def choose(group_PGN: Tensor, start: int, stop: int) -> Tensor:
            scale_RG[start:stop] = (
                self._choose(group_PGN, outer) if given is None else given[start:stop]
            )
            return self._combined(scale_RG[start:stop], outer)

        byte_RB = encode_groups(matrix_RC, _GROUP, choose, e2m1_code)
        return {self.code_suffix: byte_RB, _SCALE: scale_RG, self.outer_suffix: outer}

    def outer_scale(self, matrices: Sequence[Tensor]) -> Tensor:
        """Return the scale that serves all of some matrices, as it is stored."""
        most = torch.stack([matrix.abs().amax().to(torch.float32) for matrix in matrices])
        require_finite(most)
        largest_value = most.amax()
        if self.divides:
            outer = E4M3_MAX * _LARGEST / largest_value
        else:
            outer = largest_value / (E4M3_MAX * _LARGEST)
        # 1 for a matrix of zeros, or of numbers so small that the scale is no float32
        usable = torch.isfinite(outer) & (outer > 0)
        return torch.where(usable, outer, 1.0).reshape(self.outer_shape)

    def _combined(self, scale_RG: Tensor, outer: Tensor) -> Tensor:
        scale_RG, outer = scale_RG.to(torch.float32), outer.to(torch.float32).reshape(())
        return scale_RG / outer if self.divides else scale_RG * outer

    def _choose(self, group_PGN: Tensor, outer: Tensor) -> Tensor:
        largest_PG = largest(group_PGN)
        require_finite(largest_PG)
        unit = self._combined(torch.ones((), device=outer.device), outer)
        stored = [e4m3_scale(largest_PG / code / unit) for code in (_LARGEST, 4.0)]
        wide = [self._combined(scale_PG, outer) for scale_PG in stored]
        number_PG = least_error(group_PGN.abs(), wide, e2m1_nearest)
        return pick([scale.to(torch.float32) for scale in stored], number_PG).to(
            stored[0].dtype
        )
