"""FP8 e4m3: 4 bits of exponent (bias 7), 3 of mantissa, up to 448, no infinity, two NaN codes.

A matrix is ``weight`` times its scales. Block scales (DeepSeek, Qwen, MiniMax:
``weight_scale_inv``; llm-compressor: ``weight_scale``; DeepSeek-V4: ``scale``, powers of
two in float8) cover blocks of the size that the config gives; blocks at the lower and
right edge are cut. The size must not be inferred from shapes: 192 rows with 2 rows of
scales are blocks of 128 and 64, not of 96. Despite its name ``weight_scale_inv`` multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from ream_stream import deferred
from ream_stream.checkpoint.header import torch_dtype

from .codec import Part, require_finite
from .lookup_tables import decode_pairs, pair_table, panels

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

E4M3_MAX = 448.0
_SMALLEST_NORMAL = 2.0**-126  # of float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Block:
    """One scale a block of rows and columns."""

    scheme: ClassVar[str] = "fp8-block"

    block: tuple[int, int] = (128, 128)
    """Rows and columns of a block."""

    scale_dtype: str = "F32"
    """Dtype of the stored scales."""

    scale_suffix: str = ".weight_scale_inv"
    """Suffix of the scales' tensor name."""

    power_of_two: bool = False
    """Whether scales are rounded up to powers of two (``scale_fmt: ue8m0``); e8m0 needs it."""

    @property
    def multiple(self) -> int:
        """See `Codec.multiple`."""
        return max(self.block)

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """See `Codec.parts`."""
        grid = (-(-rows // self.block[0]), -(-cols // self.block[1]))
        return (
            Part(suffix=".weight", dtype="F8_E4M3", shape=(rows, cols)),
            Part(suffix=self.scale_suffix, dtype=self.scale_dtype, shape=grid),
        )

    def size(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """See `Codec.size`."""
        rows, cols = shapes[".weight"]
        return rows, cols

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """See `Codec.decode`."""
        scale_BC = self._along_columns(parts[self.scale_suffix], cols)
        height = self.block[0]

        def rescale(panel_PC: Tensor, start: int, stop: int) -> None:
            for block in range(start // height, -(-stop // height)):
                first = max(start, block * height) - start
                panel_PC[first : (block + 1) * height - start].mul_(scale_BC[block])

        return _decode(parts[".weight"], rescale, rows, cols, dtype)

    def encode(
        self, matrix_RC: Tensor, kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See `Codec.encode`; the largest magnitude of a block gets the code of 448."""
        rows, cols = matrix_RC.shape
        grid = self.parts(rows, cols)[1].shape
        scale = (kept or {}).get(self.scale_suffix)
        given = scale is not None
        if scale is None:
            scale = torch.empty(
                grid, dtype=torch_dtype(self.scale_dtype), device=matrix_RC.device
            )
        code_RC = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=matrix_RC.device)
        for block in range(grid[0]):
            band = slice(block * self.block[0], (block + 1) * self.block[0])
            panel_PC = matrix_RC[band].to(torch.float32)
            if not given:
                largest = panel_PC.abs().amax(0)
                largest = torch.nn.functional.pad(largest, (0, -cols % self.block[1]))
                largest = largest.view(-1, self.block[1]).amax(1)
                scale[block] = _scale(largest, power_of_two=self.power_of_two)
            row_1C = self._along_columns(scale[block : block + 1], cols)
            code_RC[band] = _round(panel_PC, row_1C)
        return {".weight": code_RC, self.scale_suffix: scale}

    def _along_columns(self, scale_BG: Tensor, cols: int) -> Tensor:
        """Repeat scales for each column of their blocks."""
        wide = scale_BG.to(torch.float32).repeat_interleave(self.block[1], 1)
        return wide[:, :cols].contiguous()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Scaled:
    """One scale a row, or one for the matrix (compressed-tensors, modelopt)."""

    scheme: ClassVar[str] = "fp8-scaled"

    per_row: bool = True
    """Whether each row has a scale; otherwise the matrix has one scale."""

    scale_dtype: str = "F32"
    """Dtype of the stored scales."""

    scale_rank: int = 2
    """Number of axes of the stored scales; all but the row axis have size 1."""

    @property
    def multiple(self) -> int:
        """See `Codec.multiple`."""
        return 16

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """See `Codec.parts`."""
        ones = (1,) * self.scale_rank
        shape = (rows, *ones[1:]) if self.per_row else ones
        return (
            Part(suffix=".weight", dtype="F8_E4M3", shape=(rows, cols)),
            Part(suffix=".weight_scale", dtype=self.scale_dtype, shape=shape),
        )

    def size(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """See `Codec.size`."""
        rows, cols = shapes[".weight"]
        return rows, cols

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """See `Codec.decode`."""
        scale_R1 = _of_rows(parts[".weight_scale"], rows)

        def rescale(panel_PC: Tensor, start: int, stop: int) -> None:
            panel_PC.mul_(scale_R1[start:stop])

        return _decode(parts[".weight"], rescale, rows, cols, dtype)

    def encode(
        self, matrix_RC: Tensor, kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See `Codec.encode`; the largest magnitude under a scale gets the code of 448."""
        rows, cols = matrix_RC.shape
        scale = (kept or {}).get(".weight_scale")
        if scale is None:
            largest_R = torch.cat(
                [matrix_RC[a:b].float().abs().amax(1) for a, b in panels(rows, cols)]
            )
            largest = largest_R if self.per_row else largest_R.amax()
            part = self.parts(rows, cols)[1]
            scale = _scale(largest).to(torch_dtype(part.dtype)).reshape(part.shape)
        scale_R1 = _of_rows(scale, rows)
        code_RC = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=matrix_RC.device)
        for start, stop in panels(rows, cols):
            code_RC[start:stop] = _round(matrix_RC[start:stop].float(), scale_R1[start:stop])
        return {".weight": code_RC, ".weight_scale": scale}


def e4m3_scale(value: Tensor) -> Tensor:
    """Round positive values to e4m3, within its smallest and its largest number."""
    return value.clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)


def _decode(
    code_RC: Tensor,
    rescale: Callable[[Tensor, int, int], object],
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    byte_RC = code_RC.reshape(rows, cols).view(torch.uint8)
    return decode_pairs(byte_RC, _pairs(byte_RC.device), rescale, cols, dtype)


@cache
def _pairs(device: torch.device) -> Tensor:
    value = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    return pair_table(value.repeat(256), value.repeat_interleave(256)).to(device)


def _of_rows(scale: Tensor, rows: int) -> Tensor:
    """Return scales as a float32 column, one scale repeated for all rows."""
    return scale.to(torch.float32).reshape(-1, 1).expand(rows, 1)


def _scale(largest: Tensor, *, power_of_two: bool = False) -> Tensor:
    require_finite(largest)
    scale = torch.where(largest > 0, (largest / E4M3_MAX).clamp_min(_SMALLEST_NORMAL), 1.0)
    if not power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def _round(panel_PC: Tensor, scale: Tensor) -> Tensor:
    """Round to codes; what is over the largest code becomes the largest."""
    # a scale that was stored as 0 decoded to zeros, which any divisor gives back
    divisor = torch.where(scale == 0, 1.0, scale)
    return (panel_PC / divisor).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
