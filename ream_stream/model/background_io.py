"""Reads and writes of batches on threads, beside the products of other batches.

An error on a thread is raised where its result is taken or at the next write, as it would
be raised without threads. Each thread ends with the block or the iterator that it serves.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(read: Callable[[int], T], numbers: Sequence[int]) -> Generator[T, None, None]:
    """Yield ``read(number)`` of each number; each is read while the one before is used."""
    with ThreadPoolExecutor(1, "read ahead") as thread:
        coming = thread.submit(read, numbers[0])
        for place in range(1, len(numbers) + 1):
            current = coming.result()
            if place < len(numbers):
                coming = thread.submit(read, numbers[place])
            else:
                del coming  # it holds what it gave
            yield current


class WriteBehind:
    """Writes one piece of work at a time on a thread, in order.

    Whoever writes holds at most two: what is being written, and what is being made.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "write behind")
        self._pending: Future[None] | None = None

    def wait(self) -> None:
        """Wait until all work is done; raise what failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def submit(self, work: Callable[[], None]) -> None:
        """Wait for the work before, raise what failed, and begin this."""
        self.wait()
        self._pending = self._thread.submit(work)

    def close(self) -> None:
        """End the thread once its work is done; what failed is raised by `wait`."""
        self._thread.shutdown()
