"""Hidden states between two layers, on disk: one zarr array, one chunk a batch.

zarr has no bfloat16, so bits are stored, in unsigned integers of the same width.
Chunks carry a CRC32C and are always written: by default zarr leaves out chunks
equal to the fill value and reads missing ones as if they were there. For the
same reason a store is complete only once its folder has its final name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from ream_stream import files
from ream_stream.errors import DamagedError
from ream_stream.file_access import check_folder, read_own_json, reading, regular_size

_BITS: Mapping[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.uint16, np.uint16),
    torch.float16: (torch.uint16, np.uint16),
    torch.float32: (torch.uint32, np.uint32),
}

_DESCRIPTION_BYTES = 1 << 16
_NOT_A_STORE = (
    FileNotFoundError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
)
"""Exceptions that zarr 3.1 raises for a missing or invalid description."""


def create_array(
    path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: torch.dtype
) -> Any:  # noqa: ANN401 - zarr's array, which is generic over its metadata
    """Create a zarr array in a new folder for the bits of tensors of one dtype."""
    kind = _BITS[dtype][1]
    return zarr.create_array(
        LocalStore(path),
        shape=shape,
        chunks=chunks,
        dtype=kind,
        compressors=[Crc32cCodec()],
        # a NaN in either width: what was never written cannot pass for data
        fill_value=np.iinfo(kind).max,
        attributes={"dtype": str(dtype).removeprefix("torch.")},
        config={"write_empty_chunks": True},
    )


def to_bits(tensor: Tensor) -> Any:  # noqa: ANN401 - an array of one of several dtypes
    """Return a tensor's bits as numpy has them: without a copy, if it lies in host memory."""
    return tensor.detach().cpu().contiguous().view(_BITS[tensor.dtype][0]).numpy()


def from_bits(bits: Any, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
    """Return the tensor that bits are of."""
    return torch.from_numpy(bits).view(dtype)


class HiddenWriter:
    """Writes the states (S, L, H) that enter one layer, batch after batch.

    Parameters
    ----------
    path
        Folder to write; it appears under this name when `publish` is called.
    shape
        Sequences, tokens of a sequence, hidden size.
    dtype
        What the states are; stored bit for bit.
    batch
        Sequences of a batch.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, batch: int
    ) -> None:
        self._path = path
        self._partial = path.with_name(path.name + files.PARTIAL)
        self._batch = batch
        files.remove(self._partial)
        chunks = (min(batch, shape[0]), *shape[1:])
        with files.space_for(path):
            self._array = create_array(self._partial, shape, chunks, dtype)

    def write(self, index: int, hidden_BLH: Tensor) -> None:
        """Store the states of batch `index`."""
        start = index * self._batch
        bits = to_bits(hidden_BLH)
        with files.space_for(self._path):
            self._array[start : start + len(bits)] = bits

    def publish(self) -> None:
        """Make the store durable and give it its name."""
        files.remove(self._path)
        with files.space_for(self._path):
            files.publish_directory(self._partial, self._path)


def _check_description(path: Path, dtype: torch.dtype) -> None:
    """Refuse a description by which zarr would read other bits than were written.

    Chunks have checksums, their description has none.
    """
    described = read_own_json(path, _DESCRIPTION_BYTES)
    first, *others = described["codecs"]
    told = (
        described["data_type"],
        first["name"],
        first["configuration"],
        [codec["name"] for codec in others],
        described["chunk_key_encoding"]["name"],
    )
    if told != (_BITS[dtype][1].__name__, "bytes", {"endian": "little"}, ["crc32c"], "default"):
        raise ValueError("its description is not as it was written")
    if not all(described["chunk_grid"]["configuration"]["chunk_shape"]):
        raise ValueError("its chunks are empty")


class HiddenStates:
    """Reads what a `HiddenWriter` published.

    Raises
    ------
    DamagedError
        The store is not there, incomplete, or of another shape.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, batch: int
    ) -> None:
        self._path, self._dtype, self._batch = path, dtype, batch
        try:
            check_folder(path)
            _check_description(path / "zarr.json", dtype)
            self._array = zarr.open_array(LocalStore(path, read_only=True), mode="r")
            stored = (self._array.shape, self._array.attrs["dtype"])
        except (DamagedError, *_NOT_A_STORE) as error:
            raise DamagedError(
                f"{path} is damaged ({error}); start over with --restart"
            ) from error
        if stored != (shape, str(dtype).removeprefix("torch.")):
            raise DamagedError(f"{path} holds {stored}, expected {shape} of {dtype}")
        self._check_is_there(0, shape[0])

    def read(self, index: int) -> Tensor:
        """Return the states of batch `index`, (B, L, H).

        Raises
        ------
        DamagedError
            The chunk is missing or its checksum is wrong.
        """
        start = index * self._batch
        self._check_is_there(start, min(start + self._batch, self._array.shape[0]))
        try:
            with reading(self._path):
                bits = np.asarray(self._array[start : start + self._batch])
        except (ValueError, TypeError, RuntimeError) as error:
            raise DamagedError(
                f"{self._path}: batch {index} is damaged ({error}); start over with --restart"
            ) from error
        return from_bits(bits, self._dtype)

    def _check_is_there(self, start: int, stop: int) -> None:
        """Look for the chunks of some sequences; a store may be of larger batches than ours."""
        size = self._array.chunks[0]
        for index in range(start // size, -(-stop // size)):
            if regular_size(self._path / "c" / str(index) / "0" / "0") is None:
                raise DamagedError(
                    f"{self._path} lacks hidden states of batch {index}; "
                    "start over with --restart"
                )
