"""Work on several threads, with results in the order of what it was given."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], *, threads: int) -> Iterator[R]:
    """Yield ``work(item)`` of each item, in order, on `threads` threads.

    At most ``threads + 1`` items are alive: those that are worked on, and the next, which is
    made meanwhile.
    """
    with ThreadPoolExecutor(max_workers=threads) as pool:
        running: deque[Future[R]] = deque()
        for item in items:
            if len(running) == threads:
                yield running.popleft().result()
            running.append(pool.submit(work, item))
        while running:
            yield running.popleft().result()
