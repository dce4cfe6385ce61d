"""Decoding by table, a panel of rows at a time.

Two neighboring codes index a table of pairs of float32. Reading pairs from a
table is exact for every code, and on a CPU several times faster than
converting element by element: torch's own float8 to float32 conversion reached
0.3 G parameters/s where this reached 1.3 with the scales applied (one thread
of an EPYC with AVX-512, torch 2.13). Panels keep the scratch in the cache and
the memory bounded: under 1 MiB, or 7 bytes times the columns of one row if that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ream_stream import deferred

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

PANEL_ELEMENTS = 1 << 17
"""Elements of the matrix that are decoded or encoded at once."""


def panels(rows: int, cols: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of about `PANEL_ELEMENTS`, each a multiple of `multiple` rows.

    The last one has what is left.
    """
    step = max(1, PANEL_ELEMENTS // max(1, cols) // multiple) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def pair_table(low: Tensor, high: Tensor) -> Tensor:
    """Return a table of float32 pairs, each pair as one int64 so that it is read at once."""
    pair = torch.stack([low, high], dim=-1).to(torch.float32)
    return pair.contiguous().view(torch.int64).flatten()


def decode_pairs(
    code_RB: Tensor,
    table: Tensor,
    rescale: Callable[[Tensor, int, int], object],
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a matrix of codes.

    Parameters
    ----------
    code_RB
        Bytes, in rows.
    table
        From `pair_table`: 256 pairs indexed by one byte, or 65536 indexed by
        two, the first of which is the lower half of the index.
    rescale
        Multiplies rows start to stop, which it is given as a float32 matrix, in place.
    cols
        Elements in a row.
    dtype
        Of the result.
    """
    index_dtype = torch.uint8 if len(table) == 256 else torch.uint16
    width = index_dtype.itemsize
    rows, row_bytes = code_RB.shape
    out_RC = torch.empty(rows, cols, dtype=dtype, device=code_RB.device)
    scratch_rows = next((stop for _, stop in panels(rows, cols)), 0)
    # one byte more than an odd number of codes: the last pair's second half is not used.
    # The copy also aligns what a mapped file may hold at any address.
    size = -(-scratch_rows * row_bytes // width)
    byte = torch.zeros(size * width, dtype=torch.uint8, device=code_RB.device)
    index = torch.empty(size, dtype=torch.int32, device=code_RB.device)
    pair = torch.empty(size, dtype=torch.int64, device=code_RB.device)
    for start, stop in panels(rows, cols):
        used = (stop - start) * row_bytes
        pairs = -(-used // width)
        byte[:used].view(stop - start, row_bytes).copy_(code_RB[start:stop])
        index[:pairs].copy_(byte[: pairs * width].view(index_dtype))
        torch.index_select(table, 0, index[:pairs], out=pair[:pairs])
        elements = pair[:pairs].view(torch.float32)[: (stop - start) * cols]
        panel_PC = elements.view(stop - start, cols)
        rescale(panel_PC, start, stop)
        out_RC[start:stop] = panel_PC
    return out_RC
