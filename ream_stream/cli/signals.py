"""Signals that ask a run to stop: the first at the next safe point, the second at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import click

from ream_stream.errors import InterruptedRunError
from ream_stream.events import Event, Finished, LayerDone, Report, Started
from ream_stream.model.ranks.group import is_other_rank

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
        if is_other_rank():
            return
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


def stopping(asked: Callable[[], int | None], report: Report) -> Report:
    """Return a report that ends the work once a signal was caught, after telling the event."""
    layers = committed = 0

    def tell(event: Event) -> None:
        nonlocal layers, committed
        report(event)
        if isinstance(event, Started):
            layers, committed = event.layers, event.committed
        committed += isinstance(event, LayerDone)
        number = asked()
        if number is None or isinstance(event, Started | Finished):
            return
        raise InterruptedRunError(
            f"stopped after {committed} of {layers} layers; run the same command again to go on"
            if layers
            else "stopped; the same command with the same --work-dir goes on",
            signal_number=number,
        )

    return tell
