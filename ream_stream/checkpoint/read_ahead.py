"""Asks the kernel for the bytes of the next expert while the current one is run.

Hints take no memory of ours: what is read goes into the page cache. They are given in a
thread, because a hint itself takes about as long as the reading that it starts.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from queue import Full, Queue
from threading import Thread

from ream_stream.errors import DamagedError
from ream_stream.file_access import FileRange, open_source

_PIECE = 1 << 20
"""Bytes of one read-ahead hint; kernels read at most one device request for a hint."""

LEAST_BYTES = 4 << 20
"""Smallest read that is given to the thread; a smaller one ends before the thread wakes."""


class ReadAhead:
    """One expert ahead at most: what is asked for while the thread is busy is left out."""

    def __init__(self) -> None:
        self._asked: Queue[Sequence[FileRange] | None] = Queue(maxsize=1)
        self._thread: Thread | None = None

    def ask(self, ranges: Sequence[FileRange]) -> None:
        """Ask for bytes of files; returns at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        if sum(each.stop - each.start for each in ranges) < LEAST_BYTES:
            return
        if self._thread is None:
            self._thread = Thread(target=self._read, name="read ahead", daemon=True)
            self._thread.start()
        try:
            self._asked.put_nowait(ranges)
        except Full:
            return

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()
            self._thread = None

    def _read(self) -> None:
        while (ranges := self._asked.get()) is not None:
            for each in ranges:
                with suppress(OSError, DamagedError):  # told where the bytes are read
                    self._hint(each)

    def _hint(self, each: FileRange) -> None:
        with open_source(each.path, buffering=0) as file:
            for start in range(each.start, each.stop, _PIECE):
                size = min(_PIECE, each.stop - start)
                os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
