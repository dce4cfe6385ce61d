"""Lines where nothing else is printed for a while: a log tells that its run lives."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.console import Console

from ream_stream.compression.event_log import BEAT_SECONDS


class Heartbeat(AbstractContextManager["Heartbeat"]):
    """Prints lines, and one with the time of day after each silence.

    Parameters
    ----------
    console
        Console that gets the lines.
    words
        Returns what a line after a silence says; nothing is printed while it is empty.
    seconds
        Longest silence.
    """

    def __init__(
        self, console: Console, words: Callable[[], str], seconds: float = BEAT_SECONDS
    ) -> None:
        self._console, self._words, self._seconds = console, words, seconds
        self._last = time.monotonic()
        self._ended = threading.Event()
        # a batch may take minutes, so no event of the run can be waited for
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        """Begin to listen to the silence."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the lines."""
        self._ended.set()
        self._thread.join()

    def say(self, line: str) -> None:
        """Print a line, which ends the silence."""
        self._last = time.monotonic()
        self._console.print(line, soft_wrap=True)

    def _beat(self) -> None:
        while not self._ended.wait(max(0.0, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last < self._seconds:
                continue
            self._last = time.monotonic()
            if words := self._words():
                self._console.print(f"{time.strftime('%H:%M:%S')}  {words}", soft_wrap=True)
