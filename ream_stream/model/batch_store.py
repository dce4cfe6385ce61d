"""Tensors of batches, kept from one pass over the calibration set to another.

In host memory, or in a scratch store on disk. A store is one zarr array with a chunk a
batch, as hidden states are; it serves one layer and no journal names it, so it is never
synced, a kill leaves a stray, and strays are removed when the run is started again.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ream_stream import files
from ream_stream.errors import DamagedError, space_for
from ream_stream.file_access import reading

from .chunked_array import ChunkedArray
from .device import to_host


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
def open_batch_store(
    path: Path | None, batches: int, *, device: torch.device | None = None, beside: bool = False
) -> Iterator[BatchStore]:
    """Give a store for the length of the block.

    Parameters
    ----------
    path
        A folder to be made, `Workspace.scratch`, removed at the end; None for memory.
    batches
        Numbers go from 0 to one less than this. The first tensor put is the largest.
    device
        Where tensors go: for a device they are read into page-locked memory.
    beside
        Whether tensors are read ahead, in the order of their numbers, and written behind:
        then three of them are in memory, else one.
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
    on_disk = _OnDisk(path, batches, locked=device is not None and device.type == "cuda")
    try:
        if not beside:
            yield on_disk
            return
        threaded = _Beside(on_disk)
        try:
            yield threaded
        finally:
            threaded.close()
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
    def __init__(self, path: Path, batches: int, *, locked: bool) -> None:
        self._path, self._batches, self._locked = path, batches, locked
        self._array: ChunkedArray | None = None
        self._shapes: dict[int, torch.Size] = {}

    def put(self, number: int, tensor: Tensor) -> None:
        if self._array is None:
            self._array = ChunkedArray(
                path=self._path,
                shape=(self._batches, tensor.numel()),
                rows=1,
                dtype=tensor.dtype,
            )
            with space_for(self._path):
                self._array.create()
        dtype, most = self._array.dtype, self._array.shape[1]
        if tensor.dtype != dtype or tensor.numel() > most:
            raise ValueError(
                f"{tensor.dtype} {tuple(tensor.shape)} is kept among tensors of "
                f"{dtype} of at most {most} numbers"
            )
        with space_for(self._path):
            self._array.write(number, tensor.cpu())
        self._shapes[number] = tensor.shape

    def get(self, number: int) -> Tensor:
        shape = self._shapes[number]
        assert self._array is not None
        try:
            with reading(self._path):
                row = self._array.read(number, locked=self._locked)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(
                f"{self._path} lost what was kept of batch {number}: start the run again"
            ) from error
        except ValueError as error:
            raise DamagedError(
                f"{self._path}: batch {number} is damaged ({error}); start the run again"
            ) from error
        return row.view(-1)[: shape.numel()].view(shape)


class _Beside:
    """Reads and writes of a store on a thread: one tensor ahead, and one behind."""

    def __init__(self, store: _OnDisk) -> None:
        self._store = store
        # reads and writes are done in the order in which they are asked for
        self._thread = ThreadPoolExecutor(1, "scratch")
        self._put = set[int]()
        self._writing: Future[None] | None = None
        self._coming: tuple[int, Future[Tensor]] | None = None

    def put(self, number: int, tensor: Tensor) -> None:
        self._settle()
        if self._coming is not None and self._coming[0] == number:
            self._coming = None
        host, wait = to_host(tensor)

        def store() -> None:
            wait()
            self._store.put(number, host)

        self._put.add(number)
        self._writing = self._thread.submit(store)

    def get(self, number: int) -> Tensor:
        if self._coming is None or self._coming[0] != number:
            self._settle()
            self._coming = number, self._thread.submit(self._store.get, number)
        found, self._coming = self._coming[1].result(), None
        if number + 1 in self._put:
            self._coming = number + 1, self._thread.submit(self._store.get, number + 1)
        return found

    def close(self) -> None:
        self._thread.shutdown()

    def _settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
