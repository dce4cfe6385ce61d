"""What the 4-bit formats share: two codes a byte, groups of columns, the choice of scales.

The first code of a byte is its lower half, in all formats here. A word of eight
codes is four such bytes on a little-endian machine, which safetensors prescribes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ream_stream import deferred

from .lookup_tables import decode_pairs, pair_table, panels

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of FP4 e2m1 by code; the fourth bit is the sign."""


@cache
def _pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    value, byte = torch.tensor(values), torch.arange(256)
    return pair_table(value[byte & 15], value[byte >> 4]).to(device)


def decode_groups(
    byte_RB: Tensor, values: tuple[float, ...], scale_RG: Tensor, cols: int, dtype: torch.dtype
) -> Tensor:
    """Decode bytes of two codes each, under one float32 scale a group of columns."""

    def rescale(panel_PC: Tensor, start: int, stop: int) -> None:
        group_PGN = panel_PC.view(stop - start, scale_RG.shape[1], -1)
        group_PGN.mul_(scale_RG[start:stop].unsqueeze(-1))

    return decode_pairs(byte_RB, _pairs(values, byte_RB.device), rescale, cols, dtype)


def encode_groups(
    matrix_RC: Tensor,
    group: int,
    choose: Callable[[Tensor, int, int], Tensor],
    to_code: Callable[[Tensor], Tensor],
) -> Tensor:
    """Encode a matrix into bytes of two codes each.

    Parameters
    ----------
    matrix_RC
        The matrix.
    group
        Columns under one scale.
    choose
        Gives the float32 scales of rows start to stop, for their groups of columns.
    to_code
        Rounds what is divided by its scale to uint8 codes.
    """
    rows, cols = matrix_RC.shape
    byte_RB = torch.empty(rows, cols // 2, dtype=torch.uint8, device=matrix_RC.device)
    for start, stop in panels(rows, cols):
        panel_PC = matrix_RC[start:stop].to(torch.float32).contiguous()
        group_PGN = panel_PC.view(stop - start, -1, group)
        scale_PG1 = choose(group_PGN, start, stop).unsqueeze(-1)
        # a scale that was stored as 0 decoded to zeros, which any divisor gives back
        divisor = torch.where(scale_PG1 == 0, 1.0, scale_PG1)
        code = to_code(group_PGN / divisor).view(stop - start, cols)
        pair = code.view(torch.int16)
        byte_RB[start:stop] = (pair | (pair >> 4)).bitwise_and_(255).to(torch.uint8)
    return byte_RB


def largest(group_PGN: Tensor) -> Tensor:
    """Return the largest magnitude of each group; NaN where there is one."""
    # torch.aminmax needs no copy, but took six times as long
    return group_PGN.abs().amax(-1)


def least_error(
    group_PGN: Tensor, candidates: Sequence[Tensor], nearest: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return for each group the number of the scale with the least squared error.

    Ties go to the earlier one. `nearest` rounds values divided by their scale to
    the values that codes have.
    """
    reference = candidates[0]
    for number, scale in enumerate(candidates):
        scaled = group_PGN / scale.unsqueeze(-1)
        # in units of the first scale: squares of the weights themselves could underflow
        error = nearest(scaled).sub_(scaled).square_().sum(-1) * (scale / reference).square()
        if number == 0:
            best, least = torch.zeros_like(error, dtype=torch.int64), error
        else:
            best = torch.where(error < least, number, best)
            least = torch.minimum(error, least)
    return best


def pick(candidates: Sequence[Tensor], number_PG: Tensor) -> Tensor:
    """Return the numbered candidate of each group."""
    stacked = torch.stack(list(candidates))
    return stacked.gather(0, number_PG.unsqueeze(0)).squeeze(0)


def e2m1_nearest(magnitude: Tensor) -> Tensor:
    """Round magnitudes to the nearest of `E2M1`, ties to the even code; saturate at 6."""
    magnitude = magnitude.clamp(max=6.0)
    # adding 1.5 * 2**23 steps leaves no bits under a step: the processor rounds. A step is
    # half the power of two at or under the number, and at least 1/2
    power = magnitude.clamp(min=1.0).view(torch.int32).bitwise_and_(0x7F800000)
    large = power.add_((22 << 23) + 0x400000).view(torch.float32)
    return magnitude.add_(large).sub_(large)


def e2m1_code(scaled: Tensor) -> Tensor:
    """Round to the nearest e2m1 value, saturating; return its code. The sign of 0 is kept."""
    value = e2m1_nearest(scaled.abs())
    # codes up to 4 are steps of 1/2, up to 6 of 1, then of 2
    code = value.clamp(max=2.0).mul_(2.0)
    code.add_(value.clamp(2.0, 4.0)).add_(value.clamp_(min=4.0), alpha=0.5).sub_(4.0)
    return code.to(torch.uint8) | torch.signbit(scaled).to(torch.uint8).mul_(8)
