"""Hashing and flushing of a large file on threads while it is copied.

Hashing takes as long as copying, and the disk longer than either. Without threads a copy
reaches half of the disk's rate.
"""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Self

FLUSH_BYTES = 64 << 20
"""Bytes copied between two flushes; a smaller file is synced once, at its end."""


class BackgroundHasher:
    """Computes the digest of a file while it is written; one context block for each file.

    Parameters
    ----------
    file
        Open file; it stays open during the block.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        # the executor starts its threads with the first work
        self._threads = ThreadPoolExecutor(2, "write")
        self._hashing: Future[None] | None = None
        self._flushing: Future[None] | None = None
        self._copied = 0

    def __enter__(self) -> Self:
        """Enter the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the threads; raise a failed flush, unless the block itself failed."""
        self._threads.shutdown()
        if error is None and self._flushing is not None:
            self._flushing.result()

    def hash(self, piece: bytes | memoryview, *, lasting: bool) -> None:
        """Add a piece to the digest; on a thread if the piece is `lasting`, else at once."""
        self._wait()
        if lasting:
            self._hashing = self._threads.submit(self._digest.update, piece)
        else:
            self._digest.update(piece)

    def flush(self, size: int) -> None:
        """Count `size` copied bytes, and start writing to disk after `FLUSH_BYTES` of them.

        An optimisation only: the file is synced at its end. The kernel reports a write error
        to a single fsync, so the result of this one is checked too.

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
