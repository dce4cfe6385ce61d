"""Signs of life of ranks: who is silent is taken for dead."""

from __future__ import annotations

import threading
import time
from typing import Any

BEAT_SECONDS = 1.0
"""Seconds between two signs of life of a rank."""

SILENT_SECONDS = 20.0
"""Seconds without a sign of life after which a rank is taken for dead."""


class Heartbeat(threading.Thread):
    """Gives signs of life of this rank, and reads those of the others."""

    def __init__(self, store: Any, rank: int, size: int) -> None:  # noqa: ANN401
        super().__init__(name="rank", daemon=True)
        # a connection of its own: one that waits is not to be used beside
        self._store = store
        self._rank, self._size = rank, size
        self._ended = threading.Event()
        self._using = threading.Lock()

    def run(self) -> None:
        """Give a sign of life each `BEAT_SECONDS`."""
        while not self._ended.wait(BEAT_SECONDS):
            try:
                with self._using:
                    self._store.add(f"beat/{self._rank}", 1)
            except RuntimeError:
                return  # who waits for a rank finds that the store is lost

    def stop(self) -> None:
        """End the signs."""
        self._ended.set()
        self.join()

    def beats(self) -> list[int]:
        """Return the number of signs of each rank."""
        with self._using:
            return [self._store.add(f"beat/{rank}", 0) for rank in range(self._size)]

    def watch(self) -> SilenceWatch:
        """Begin to watch for silence."""
        return SilenceWatch(self)


class SilenceWatch:
    """Which ranks give no sign of life, since it began to watch."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._seen: list[int] | None = None
        self._since: list[float] = []

    def silent(self) -> list[int]:
        """Return the ranks that have been silent for `SILENT_SECONDS`."""
        now, beats = time.monotonic(), self._heartbeat.beats()
        if self._seen is None:
            self._seen, self._since = beats, [now] * len(beats)
        self._since = [
            then if beat == before else now
            for then, beat, before in zip(self._since, beats, self._seen, strict=True)
        ]
        self._seen = beats
        return [rank for rank, then in enumerate(self._since) if now - then > SILENT_SECONDS]
