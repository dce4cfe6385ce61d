"""Tensors of batches, kept from one pass over the calibration set to another.

In host memory, or in a scratch store on disk. A store is one zarr array with a chunk a
batch, as hidden states are; it serves one layer and no journal names it, so it is never
synced, a kill leaves a stray, and strays are removed when the run is started again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ream_stream import files
from ream_stream.errors import DamagedError
from ream_stream.file_access import regular_size

from .hidden_states import create_array, from_bits, to_bits


class BatchStore(Protocol):
    """One tensor a batch, by the batch's number; all of them have one dtype."""

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep a tensor, in the place of one that was kept under the same number.

        It belongs to the store from then on: to add to it, get it, add, and put the sum.
        """

    def get(self, number: int) -> Tensor:
        """Return the stored tensor in host memory and in its shape.

        Raises
        ------
        DamagedError
            The disk gave back something else.
        """


@contextmanager
def open_batch_store(path: Path | None, batches: int) -> Iterator[BatchStore]:
    """Give a store for the length of the block.

    Parameters
    ----------
    path
        A folder to be made, `Workspace.scratch`, removed at the end; None for memory.
    batches
        Numbers go from 0 to one less than this. The first tensor put is the largest.
    """
    if path is None:
        store = _InMemory()
        try:
            yield store
        finally:
            # whoever still refers to the store, in a cycle perhaps, does not keep its tensors
            store.clear()
        return
    files.remove(path)
    try:
        yield _OnDisk(path, batches)
    finally:
        files.remove(path)


class _InMemory:
    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}

    def put(self, number: int, tensor: Tensor) -> None:
        self._tensors[number] = tensor.detach().cpu()

    def get(self, number: int) -> Tensor:
        return self._tensors[number]

    def clear(self) -> None:
        self._tensors.clear()


class _OnDisk:
    def __init__(self, path: Path, batches: int) -> None:
        self._path, self._batches = path, batches
        self._array: Any = None
        self._dtype = torch.float32
        self._shapes: dict[int, torch.Size] = {}

    def put(self, number: int, tensor: Tensor) -> None:
        bits = to_bits(tensor).reshape(-1)
        with files.space_for(self._path):
            if self._array is None:
                self._dtype = tensor.dtype
                shape = (self._batches, len(bits))
                self._array = create_array(self._path, shape, (1, len(bits)), tensor.dtype)
            if tensor.dtype != self._dtype or len(bits) > self._array.shape[1]:
                raise ValueError(
                    f"{tensor.dtype} {tuple(tensor.shape)} is kept among tensors of "
                    f"{self._dtype} of at most {self._array.shape[1]} numbers"
                )
            self._array[number, : len(bits)] = bits
        self._shapes[number] = tensor.shape

    def get(self, number: int) -> Tensor:
        shape = self._shapes[number]
        if regular_size(self._path / "c" / str(number) / "0") is None:
            raise DamagedError(
                f"{self._path} lost what was kept of batch {number}: start the run again"
            )
        try:
            bits = np.asarray(self._array[number, : shape.numel()])
        except ValueError as error:
            raise DamagedError(
                f"{self._path}: batch {number} is damaged ({error}); start the run again"
            ) from error
        return from_bits(bits, self._dtype).view(shape)
