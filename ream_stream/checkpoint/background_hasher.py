"""What goes on beside copying a large file: its digest, and its way to the disk.

Hashing takes as long as copying, and the disk longer than either. Done one after another,
a copy reaches half of the disk's rate.
"""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Self

FLUSH_BYTES = 64 << 20
"""Bytes copied between two flushes; a smaller file is synced once, at its end."""


class BackgroundHasher:
    """The digest of a file that is being written; one block a file.

    Parameters
    ----------
    file
        It is open for the length of the block.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        # threads are started when there is work for them
        self._threads = ThreadPoolExecutor(2, "write")
        self._hashing: Future[None] | None = None
        self._flushing: Future[None] | None = None
        self._copied = 0

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what is going on; in a failure of its own the file is not whole."""
        self._threads.shutdown()
        if error is None and self._flushing is not None:
            self._flushing.result()

    def hash(self, piece: bytes | memoryview, *, lasting: bool) -> None:
        """Add a piece to the digest; at once, unless its bytes are `lasting`."""
        self._wait()
        if lasting:
            self._hashing = self._threads.submit(self._digest.update, piece)
        else:
            self._digest.update(piece)

    def flush(self, size: int) -> None:
        """Let the disk begin with what was copied, `size` bytes more, if that is much.

        Nothing relies on it: the file is synced at its end. But an error is told once only,
        so it must not be lost.

        Raises
        ------
        OSError
            The disk failed.
        """
        self._copied += size
        if self._copied >= FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._flushing = self._threads.submit(os.fsync, self._file.fileno())
            self._copied = 0

    def hexdigest(self) -> str:
        """Return the digest of all pieces."""
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None
