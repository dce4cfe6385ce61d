"""Tensors as bytes in host memory, for a transfer and back."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""Most bytes of one transfer."""

SMALL_BYTES = 1 << 20
"""Tensors up to this size go in one transfer together."""


def byte_pieces(
    tensors: Sequence[Tensor], *, fill: bool
) -> Iterator[tuple[Tensor, Callable[[], object]]]:
    """Yield bytes of contiguous tensors, each with a function that copies them back.

    Parameters
    ----------
    tensors
        On the host, where large ones are not copied, or on a device.
    fill
        Whether the bytes hold the tensors' values; else they are to be overwritten.
    """
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    small = [each for each in flat if each.numel() <= SMALL_BYTES]
    if small:
        yield _together(small, fill=fill)
    for each in flat:
        if each.numel() > SMALL_BYTES:
            for piece in torch.split(each, CHUNK_BYTES):
                yield (
                    (piece, _nothing)
                    if piece.device.type == "cpu"
                    else _staged(piece, fill=fill)
                )


def _together(small: Sequence[Tensor], *, fill: bool) -> tuple[Tensor, Callable[[], object]]:
    sizes = [each.numel() for each in small]
    joined = torch.empty(sum(sizes), dtype=torch.uint8)
    parts = torch.split(joined, sizes)
    if fill:
        for part, each in zip(parts, small, strict=True):
            part.copy_(each)

    def back() -> None:
        for part, each in zip(parts, small, strict=True):
            each.copy_(part)

    return joined, back


def _staged(piece: Tensor, *, fill: bool) -> tuple[Tensor, Callable[[], object]]:
    host = piece.cpu() if fill else torch.empty(len(piece), dtype=torch.uint8)
    return host, lambda: piece.copy_(host)


def _nothing() -> None:
    """Leave what is on the host where it is."""
