"""The log of a run: events as JSON lines, written while it runs and read by who looks later."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from ream_stream import files
from ream_stream.errors import OverBudgetError, ReamStreamError
from ream_stream.events import (
    BatchHalved,
    Event,
    Finished,
    LayerDone,
    Started,
    Step,
    TakenOver,
)
from ream_stream.file_access import last_lines
from ream_stream.host_memory import anonymous_bytes
from ream_stream.untrusted import parse_json

BEAT_SECONDS = 30.0
"""Longest silence of a log, unless a single batch takes longer."""


class Pace:
    """Time that is left, from the bytes and times of the layers finished in this run.

    Parameters
    ----------
    layer_bytes
        Bytes of every layer, committed ones included.
    planned_seconds
        Forecast of all that is left, which counts until a layer is finished; None without.
    """

    def __init__(
        self, layer_bytes: Sequence[int], planned_seconds: float | None = None
    ) -> None:
        self._layer_bytes, self._planned = layer_bytes, planned_seconds
        self._next = 0
        self._bytes, self._seconds = 0, 0.0

    def skip(self, layers: int) -> None:
        """Leave out layers that earlier runs have finished."""
        self._next = layers

    def finish(self, seconds: float) -> None:
        """Note that the next layer took so long."""
        self._bytes += self._layer_bytes[self._next]
        self._seconds += seconds
        self._next += 1

    @property
    def done_bytes(self) -> int:
        """Bytes of all finished layers."""
        return sum(self._layer_bytes[: self._next])

    @property
    def total_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(self._layer_bytes)

    @property
    def is_measured(self) -> bool:
        """Whether a layer was finished in this run."""
        return bool(self._bytes)

    def left(self, since_last: float = 0.0) -> float | None:
        """Return the seconds left, `since_last` after a layer; None if nothing tells them."""
        if not self._bytes:
            over = self._planned is None or since_last >= self._planned
            return None if over or self._planned is None else self._planned - since_last
        rest = self.total_bytes - self.done_bytes
        return max(0.0, rest * self._seconds / self._bytes - since_last)


class Log:
    """Events as JSON lines; of the steps within a phase, one now and then.

    Each tells the time that is left and the memory in use, for who looks from elsewhere.
    """

    def __init__(
        self,
        file: FileIO,
        layer_bytes: Sequence[int] = (),
        planned_seconds: float | None = None,
    ) -> None:
        self._file, self._pace = file, Pace(layer_bytes, planned_seconds)
        self._begun = self._told = time.monotonic()

    def show(self, event: Event) -> None:
        """Append the event."""
        now = time.monotonic()
        within = isinstance(event, Step) and event.done < event.total
        if within and now - self._told < BEAT_SECONDS:
            return
        if isinstance(event, Started):
            self._pace.skip(event.committed)
        elif isinstance(event, LayerDone):
            self._pace.finish(now - self._begun)
        if isinstance(event, Started | LayerDone):
            self._begun = now
        self._told = now
        known = {
            "left_seconds": self._pace.left(now - self._begun),
            "anonymous_bytes": anonymous_bytes(),
        }
        self.write("step" if within else NAMES[type(event)], asdict(event) | known)

    def write(self, name: str, fields: Mapping[str, object]) -> None:
        """Append a line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": name, **fields}
        files.append(self._file, json.dumps(line) + "\n")

    def end(self, error: ReamStreamError) -> None:
        """Append why the run ends; where the log itself cannot be written, that is known."""
        with suppress(OSError, OverBudgetError):
            self.write("failed", {"status": error.exit_status, "message": str(error)})


NAMES: Mapping[type[Event], str] = {
    Started: "started",
    TakenOver: "taken over",
    Step: "phase done",
    LayerDone: "layer done",
    BatchHalved: "device memory was short",
    Finished: "finished",
}
"""Names of events in the log."""


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log that are as `Log` writes them.

    Those that a kill cut are passed over, and so are those of others' making.
    """
    for line in last_lines(path):
        try:
            event = parse_json(line, text=False)
        except ValueError:
            continue
        if isinstance(event, dict) and _is_written_so(event):
            yield event


def _is_written_so(event: Mapping[str, Any]) -> bool:
    """Tell whether an event has the fields that are read, and they are of their kinds."""
    needed = {
        "event": _is_text,
        "time": _is_text,
        **_FIELDS_OF.get(str(event.get("event")), {}),
    }
    return needed.keys() <= event.keys() and all(
        fits(event[name]) for name, fits in {**_FIELDS, **needed}.items() if name in event
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and 0 <= value < 1e18  # type: ignore[operator]


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


_FIELDS: Mapping[str, Callable[[object], bool]] = {
    "message": _is_text,
    "phase": _is_text,
    "layer": _is_number,
    "layers": _is_number,
    "left_seconds": lambda value: value is None or _is_number(value),
    "anonymous_bytes": _is_number,
}
"""Checks of fields that any event may have."""

_FIELDS_OF: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    "command": {
        "command": lambda value: value is None or _is_text(value),
        "directory": _is_text,
    },
    "layer done": {
        "layer": _is_number,
        "seconds": _are_numbers,
        "peak_anonymous_bytes": _is_number,
        "read_bytes": _is_number,
        "written_bytes": _is_number,
    },
    "finished": {"seconds": _are_numbers, "peak_anonymous_bytes": _is_number},
}
"""Checks of fields that events of one kind must have."""


def newest(events: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the newest event of each kind, and the newest of all as ``last``."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        found[str(event["event"])] = found["last"] = event
    return found
