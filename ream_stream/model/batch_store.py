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

    def drop(self, number: int) -> None:
        """Let go of a tensor that is not asked for again; on disk it keeps its place."""

    def get(self, number: int) -> Tensor:
        """Return the stored tensor in host memory and in its shape.

        Raises
        ------
        DamagedError
            The disk gave back something else.
        """


@contextmanager
def open_batch_store(
    path: Path | None,
    batches: int | None,
    *,
    device: torch.device | None = None,
    beside: bool = False,
    in_memory: int = 0,
) -> Iterator[BatchStore]:
    """Give a store for the length of the block.

    Parameters
    ----------
    path
        A folder to be made, `Workspace.scratch`, removed at the end; None for memory.
    batches
        Numbers go from 0 to one less than this, and the first tensor put is the largest; None
        for any numbers and sizes, each tensor in an array of its own.
    device
        Where tensors go: for a device they are read into page-locked memory.
    beside
        Whether tensors are read ahead, in the order of their numbers, and written behind:
        then three of them are in memory, else one.
    in_memory
        Numbers below this are kept in memory though there is a folder.
    """
    store = _InMemory()
    try:
        if path is None:
            yield store
            return
        with _on_disk(path, batches, device, beside=beside) as rest:
            yield _Split(store, rest, in_memory) if in_memory else rest
    finally:
        # whoever still refers to the store, in a cycle perhaps, does not keep its tensors
        store.clear()


@contextmanager
def _on_disk(
    path: Path, batches: int | None, device: torch.device | None, *, beside: bool
) -> Iterator[BatchStore]:
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

    def drop(self, number: int) -> None:
        del self._tensors[number]

    def get(self, number: int) -> Tensor:
        return self._tensors[number]

    def clear(self) -> None:
        self._tensors.clear()


class _Split:
    """The first tensors in memory, the others on disk."""

    def __init__(self, memory: BatchStore, disk: BatchStore, first: int) -> None:
        self._memory, self._disk, self._first = memory, disk, first

    def _of(self, number: int) -> BatchStore:
        return self._memory if number < self._first else self._disk

    def put(self, number: int, tensor: Tensor) -> None:
        self._of(number).put(number, tensor)

    def drop(self, number: int) -> None:
        self._of(number).drop(number)

    def get(self, number: int) -> Tensor:
        return self._of(number).get(number)


class _OnDisk:
    def __init__(self, path: Path, batches: int | None, *, locked: bool) -> None:
        self._path, self._batches, self._locked = path, batches, locked
        self._array: ChunkedArray | None = None
        self._put: dict[int, tuple[ChunkedArray, int, torch.Size]] = {}

    def _at(self, number: int, size: int, dtype: torch.dtype) -> tuple[ChunkedArray, int]:
        """Return the array that a tensor of so many numbers goes to, and its chunk there."""
        if self._batches is None:
            own = self._path / str(number)
            files.remove(own)  # it may be larger
            return ChunkedArray(path=own, shape=(1, size), rows=1, dtype=dtype), 0
        if self._array is None:
            shape = (self._batches, size)
            self._array = ChunkedArray(path=self._path, shape=shape, rows=1, dtype=dtype)
            with space_for(self._path):
                self._array.create()
        return self._array, number

    def put(self, number: int, tensor: Tensor) -> None:
        array, chunk = self._at(number, tensor.numel(), tensor.dtype)
        dtype, most = array.dtype, array.shape[1]
        if tensor.dtype != dtype or tensor.numel() > most:
            raise ValueError(
                f"{tensor.dtype} {tuple(tensor.shape)} is kept among tensors of "
                f"{dtype} of at most {most} numbers"
            )
        with space_for(self._path):
            array.write(chunk, tensor.cpu())
        self._put[number] = array, chunk, tensor.shape

    def drop(self, number: int) -> None:
        """Keep its place: the scratch store is removed with its layer."""

    def get(self, number: int) -> Tensor:
        array, chunk, shape = self._put[number]
        try:
            with reading(self._path):
                row = array.read(chunk, locked=self._locked)
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

    def drop(self, number: int) -> None:
        """Keep its place, as the store does."""

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
