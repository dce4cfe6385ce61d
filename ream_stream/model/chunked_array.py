"""Arrays of tensor bits on disk, in the format of zarr v3, read and written chunk by chunk.

zarr has no bfloat16, so bits are stored, in unsigned integers of the same width. A chunk
is some rows of the first axis, whole, and its CRC32C. Chunks are always written: by default
zarr leaves out chunks equal to the fill value and reads missing ones as if they were there.
zarr's own store does each chunk on an event loop, with four copies; here there are none.
"""

import json
import math
import os
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import Tensor

from ream_stream import files
from ream_stream.errors import DamagedError
from ream_stream.file_access import drop_cached, open_regular, read_own_json

from .device import host_empty

_BITS: Mapping[torch.dtype, str] = {
    torch.bfloat16: "uint16",
    torch.float16: "uint16",
    torch.float32: "uint32",
}
_CHECKSUM_BYTES = 4
_DESCRIPTION = "zarr.json"
_DESCRIPTION_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkedArray:
    """A folder that holds one array."""

    path: Path
    """Folder of the array."""

    shape: tuple[int, ...]
    """Shape of the array."""

    rows: int
    """Rows of a chunk: indices of the first axis."""

    dtype: torch.dtype
    """Dtype of the tensors."""

    def create(self) -> None:
        """Write the description; chunks are written by `write`."""
        described = json.dumps(self._description(), indent=2)
        files.write_chunk(
            self.path / _DESCRIPTION, [memoryview(described.encode())], flush=False
        )

    @classmethod
    def open(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> "ChunkedArray":
        """Open an array of a shape and dtype, with chunks of any number of rows.

        Raises
        ------
        DamagedError
            The description, which has no checksum, is not that of such an array.
        """
        told = read_own_json(path / _DESCRIPTION, _DESCRIPTION_BYTES)
        try:
            rows = told["chunk_grid"]["configuration"]["chunk_shape"][0]
        except (KeyError, IndexError, TypeError):
            rows = None
        if type(rows) is int and 1 <= rows <= shape[0]:
            array = cls(path=path, shape=shape, rows=rows, dtype=dtype)
            wanted = array._description()
            if {key: told.get(key) for key in wanted} == wanted:
                return array
        raise DamagedError(
            f"it is not described as an array of {shape} of {dtype}, as expected"
        )

    def chunk_path(self, index: int) -> Path:
        """Return the path of a chunk."""
        return self.path.joinpath("c", str(index), *["0"] * (len(self.shape) - 1))

    def write(self, index: int, rows: Tensor, *, flush: bool = False) -> None:
        """Write a chunk; rows or numbers that are missing in it are filled up.

        Parameters
        ----------
        index
            Position of the chunk.
        rows
            The first rows of the chunk, or the first numbers of its only row, on the host.
        flush
            Whether the kernel is to begin writing it to the disk at once.
        """
        data = rows.detach().contiguous().view(-1).view(torch.uint8).numpy()
        # a NaN in either width: what was never written cannot pass for data
        missing = bytes([255]) * (self._chunk_bytes - data.nbytes)
        checksum = google_crc32c.extend(google_crc32c.value(data), missing)
        rest = missing + checksum.to_bytes(_CHECKSUM_BYTES, sys.byteorder)
        files.write_chunk(self.chunk_path(index), [data.data, memoryview(rest)], flush=flush)

    def read(
        self,
        index: int,
        *,
        locked: bool = False,
        drop: bool = False,
        pool: list[Tensor] | None = None,
    ) -> Tensor:
        """Return a chunk, in host memory of its own.

        Parameters
        ----------
        index
            Position of the chunk.
        locked
            Whether it goes to a device: then the memory is page-locked.
        drop
            Whether the chunk is not to stay in the page cache.
        pool
            Memory of earlier chunks that no tensor refers to any more, which is used again;
            None for new memory, which the kernel takes longer to clear than to fill.

        Raises
        ------
        ValueError
            The checksum or the size is wrong.
        FileNotFoundError
            The chunk is missing.
        """
        # page-locked memory is used again by torch, once copies from it are done
        own = pool if not locked else None
        chunk = own.pop() if own else host_empty(self._chunk_shape, self.dtype, locked=locked)
        data = chunk.view(-1).view(torch.uint8).numpy()
        with open_regular(self.chunk_path(index)) as file:
            size = os.fstat(file.fileno()).st_size
            if size != data.nbytes + _CHECKSUM_BYTES:
                raise ValueError(f"it has {size} bytes, not {data.nbytes + _CHECKSUM_BYTES}")
            left = data.data
            while left and (done := file.readinto(left)):
                left = left[done:]
            checksum = file.read(_CHECKSUM_BYTES)
            if drop:
                drop_cached(file)
        if (
            left
            or google_crc32c.value(data).to_bytes(_CHECKSUM_BYTES, sys.byteorder) != checksum
        ):
            raise ValueError("its checksum is wrong")
        return chunk if own is None else _returning(chunk, data, own)

    @property
    def _chunk_shape(self) -> tuple[int, ...]:
        return (self.rows, *self.shape[1:])

    @property
    def _chunk_bytes(self) -> int:
        return math.prod(self._chunk_shape) * self.dtype.itemsize

    def _description(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "data_type": _BITS[self.dtype],
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.rows, *self.shape[1:]]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 256**self.dtype.itemsize - 1,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": sys.byteorder}},
                {"name": "crc32c"},
            ],
            "attributes": {"dtype": str(self.dtype).removeprefix("torch.")},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def _returning(chunk: Tensor, data: Any, pool: list[Tensor]) -> Tensor:  # noqa: ANN401
    """Return a tensor of a chunk's memory, which goes to the pool when nothing refers to it."""
    view = data[:]
    # torch holds this view until the last tensor on it is gone, whoever has it
    weakref.finalize(view, pool.append, chunk).atexit = False
    return torch.from_numpy(view).view(chunk.dtype).view(chunk.shape)
