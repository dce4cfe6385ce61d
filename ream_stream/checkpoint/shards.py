"""Shards of the output: named and laid out before the first byte is written.

The order of tensors, every offset and the file's size follow from names, dtypes
and shapes alone. So a shard is written as a stream, tensor after tensor, in the
memory of one tensor, under the name that the finished index will give.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ream_stream.file_access import FileRange
from ream_stream.files import Written, write_stream

from .header import ITEM_BYTES, TensorEntry, torch_dtype

Content = Tensor | TensorEntry | Iterable[Tensor | FileRange]
"""Content of a tensor to write: its value, a source tensor, or pieces of both kinds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    """One tensor to write."""

    name: str
    """Name of the tensor in the output."""

    dtype: str
    """Dtype of the tensor: a key of `ITEM_BYTES`."""

    shape: tuple[int, ...]
    """Shape of the tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of the output, laid out."""

    name: str
    """File name of the shard."""

    tensors: tuple[PlannedTensor, ...]
    """Tensors of the shard in the order of their bytes."""

    def header(self) -> bytes:
        """Return length and JSON header, padded so that the data starts aligned to 8."""
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in self.tensors:
            offsets = [position, position + tensor.nbytes]
            described[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            position = offsets[1]
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header()) + sum(tensor.nbytes for tensor in self.tensors)


def cut(tensors: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    """Cut a list of tensors, in order, into shards of at most `max_bytes`.

    A tensor larger than that has a shard of its own.
    """
    shards: list[list[PlannedTensor]] = []
    filled = 0
    for tensor in tensors:
        if not shards or filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def name_shards(groups: Sequence[Sequence[Sequence[PlannedTensor]]]) -> list[list[Shard]]:
    """Give names to the shards of each group (a layer, or what is outside the layers).

    Within a shard tensors are ordered by element size, widest first, then by
    name: each is then aligned to its element, as the format's own writer does.
    """
    count = sum(len(shards) for shards in groups)
    number = 0
    named: list[list[Shard]] = []
    for shards in groups:
        named.append([])
        for tensors in shards:
            number += 1
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            ordered = sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.name))
            named[-1].append(Shard(name=name, tensors=tuple(ordered)))
    return named


def write_shard(folder: Path, shard: Shard, content: Callable[[str], Content]) -> Written:
    """Write one shard.

    Parameters
    ----------
    folder
        Where to.
    shard
        Its layout.
    content
        Gives, for a tensor's name, its value, or the entry of a source tensor whose
        bytes are copied from file to file, or one after another the slices along its
        first axis, or their bytes in a file.
    """

    def parts() -> Iterator[bytes | memoryview | FileRange]:
        yield shard.header()
        for tensor in shard.tensors:
            value = content(tensor.name)
            if isinstance(value, TensorEntry):
                if (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
                    raise ValueError(
                        f"{tensor.name} is planned as {tensor}, its source is {value}"
                    )
                yield FileRange(path=value.path, start=value.start, stop=value.stop)
            elif isinstance(value, Tensor):
                if tuple(value.shape) != tensor.shape:
                    raise ValueError(
                        f"{tensor.name} is {tuple(value.shape)}, planned was {tensor}"
                    )
                yield _bytes(value, tensor)
            else:
                yield from _pieces(value, tensor)

    return write_stream(folder / shard.name, parts())


def _pieces(
    pieces: Iterable[Tensor | FileRange], planned: PlannedTensor
) -> Iterator[memoryview | FileRange]:
    """Yield the pieces of a tensor, which together must have its size."""
    nbytes = 0
    for piece in pieces:
        if isinstance(piece, FileRange):
            nbytes += piece.stop - piece.start
            yield piece
        else:
            data = _bytes(piece, planned)
            nbytes += len(data)
            yield data
    if nbytes != planned.nbytes:
        raise ValueError(f"{planned.name} got {nbytes} bytes, planned was {planned}")


def _bytes(value: Tensor, planned: PlannedTensor) -> memoryview:
    """Return the bytes of a tensor of the planned dtype."""
    if value.dtype != torch_dtype(planned.dtype):
        raise ValueError(f"{planned.name} is {value.dtype}, planned was {planned}")
    flat = value.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)
