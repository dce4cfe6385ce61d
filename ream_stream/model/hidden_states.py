"""Hidden states between two layers, on disk: one zarr array, one chunk a batch.

A store is complete only once its folder has its final name. Batches are read ahead of
their use and written behind it, each on a thread.
"""

from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ream_stream import files
from ream_stream.errors import DamagedError, space_for
from ream_stream.file_access import check_folder, reading, regular_size

from .background_io import WriteBehind, read_ahead
from .chunked_array import ChunkedArray
from .device import to_host
from .ranks.group import ALONE, Ranks


class HiddenWriter:
    """Writes the states (S, L, H) that enter one layer, batch after batch.

    As a context manager it ends its thread at the end of the block; without `publish`
    nothing has the store's name then.

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
    drop
        Whether what was written is dropped from the page cache.
    ranks
        Processes that write the store together, each its own batches.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        batch: int,
        *,
        drop: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._path, self._drop, self._ranks = path, drop, ranks
        self._partial = path.with_name(path.name + files.PARTIAL)
        self._behind = WriteBehind()
        self._array = ChunkedArray(
            path=self._partial, shape=shape, rows=min(batch, shape[0]), dtype=dtype
        )
        if ranks.is_first:
            files.remove(self._partial)
            with space_for(path):
                self._array.create()
        ranks.gather(None)  # nobody writes before the store of an earlier run is gone

    def __enter__(self) -> Self:
        """Enter the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread; raise what failed on it, unless the block itself failed."""
        self._behind.close()
        if error is None:
            self._behind.wait()

    def write(self, index: int, hidden_BLH: Tensor) -> None:
        """Store the states of batch `index`, which must not change until `publish` returns.

        Raises
        ------
        OverBudgetError
            The disk is full, for this batch or the one before.
        """
        # before memory is taken for the next
        self._behind.wait()
        host_BLH, wait = to_host(hidden_BLH)

        def store() -> None:
            wait()
            with space_for(self._path):
                self._array.write(index, host_BLH, flush=True)

        self._behind.submit(store)

    def publish(self) -> None:
        """Make the store durable and give it its name, once all ranks have written theirs."""
        self._behind.wait()
        self._behind.close()
        with space_for(self._path):
            if not self._ranks.is_first:
                # rank 0 cannot sync what another machine has not sent to the disk yet
                for number in self._ranks.own(-(-self._array.shape[0] // self._array.rows)):
                    files.sync_chunk(self._array.chunk_path(number), drop=self._drop)
            self._ranks.gather(None)
            if self._ranks.is_first:
                files.remove(self._path)
                files.publish_directory(self._partial, self._path, drop=self._drop)
        self._ranks.gather(None)


class HiddenStates:
    """Reads what a `HiddenWriter` published.

    Parameters
    ----------
    path, shape, dtype, batch
        As of the writer; a batch may be smaller than the writer's.
    device
        Where the states go: for a device they are read into page-locked memory.
    drop
        Whether what was read is dropped from the page cache.

    Raises
    ------
    DamagedError
        The store is not there, incomplete, or of another shape.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        batch: int,
        *,
        device: torch.device | None = None,
        drop: bool = False,
    ) -> None:
        self._path, self._batch, self._drop = path, batch, drop
        self._locked = device is not None and device.type == "cuda"
        try:
            check_folder(path)
            self._array = ChunkedArray.open(path, shape, dtype)
        except DamagedError as error:
            raise DamagedError(
                f"{path} is damaged ({error}); start over with --restart"
            ) from error
        for index in range(-(-shape[0] // self._array.rows)):
            if regular_size(self._array.chunk_path(index)) is None:
                raise self._lacks(index)

    def ahead(self, numbers: Sequence[int]) -> Generator[Tensor, None, None]:
        """Yield the states of batches by their numbers; each is read ahead of its use."""
        return read_ahead(partial(self.read, pool=[]), numbers)

    def read(self, index: int, *, pool: list[Tensor] | None = None) -> Tensor:
        """Return the states of batch `index`, (B, L, H); `pool` is that of `ChunkedArray.read`.

        Raises
        ------
        DamagedError
            The chunk is missing or its checksum is wrong.
        """
        rows, total = self._array.rows, self._array.shape[0]
        start, stop = index * self._batch, min((index + 1) * self._batch, total)
        # a store may be of larger batches than ours
        parts = [
            self._chunk(chunk, pool)[max(0, start - chunk * rows) : stop - chunk * rows]
            for chunk in range(start // rows, -(-stop // rows))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunk(self, index: int, pool: list[Tensor] | None) -> Tensor:
        try:
            with reading(self._path):
                return self._array.read(index, locked=self._locked, drop=self._drop, pool=pool)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._lacks(index) from error
        except ValueError as error:
            raise DamagedError(
                f"{self._path}: batch {index} is damaged ({error}); start over with --restart"
            ) from error

    def _lacks(self, index: int) -> DamagedError:
        return DamagedError(
            f"{self._path} lacks hidden states of batch {index}; start over with --restart"
        )
