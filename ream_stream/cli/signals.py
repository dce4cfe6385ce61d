"""Signals that ask a run to stop: the first at the next safe point, the second at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import click

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Catch signals for the length of the block; give a function that tells the first one."""
    caught: list[int] = []

    def catch(number: int, _frame: FrameType | None) -> None:
        if caught:
            # every commit is durable: leaving here loses no more than the layer in flight
            os._exit(128 + number)
        caught.append(number)
        with suppress(OSError):  # whoever read this may be gone
            click.echo("stopping at the next safe point; once more to stop at once", err=True)

    # what nohup ignores stays ignored
    asking = [number for number in _ASKING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, catch) for number in asking}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
