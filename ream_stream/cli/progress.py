"""A run as it happens: live on a terminal, a line a layer elsewhere, and the log."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ream_stream import files
from ream_stream.errors import OverBudgetError, ReamStreamError
from ream_stream.events import Event, Finished, Halved, LayerDone, Started, Step
from ream_stream.host_memory import anonymous_bytes
from ream_stream.units import format_size

from .console import format_seconds

BEAT_SECONDS = 30.0
"""A log is silent no longer than this, unless a single batch takes longer."""


class Display(Protocol):
    """Something that shows events."""

    def show(self, event: Event) -> None:
        """Show one event."""


class Pace:
    """Time that is left, from the bytes and times of the layers finished in this run.

    Parameters
    ----------
    layer_bytes
        Bytes of every layer, committed ones included.
    """

    def __init__(self, layer_bytes: Sequence[int]) -> None:
        self._layer_bytes = layer_bytes
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

    def left(self, since_last: float = 0.0) -> float | None:
        """Return the seconds left, `since_last` after a layer; None before the first."""
        if not self._bytes:
            return None
        rest = self.total_bytes - self.done_bytes
        return max(0.0, rest * self._seconds / self._bytes - since_last)


class Lines(AbstractContextManager["Lines"]):
    """One plain line a layer, for logs and pipes."""

    def __init__(self, console: Console, layer_bytes: Sequence[int]) -> None:
        self._console, self._pace = console, Pace(layer_bytes)
        self._count = len(layer_bytes)
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def show(self, event: Event) -> None:
        """Print a line if a layer is done."""
        if isinstance(event, Started):
            self._pace.skip(event.committed)
            self._begun = time.monotonic()
        if isinstance(event, LayerDone):
            self._pace.finish(time.monotonic() - self._begun)
            self._begun = time.monotonic()
            self._console.print(layer_line(event, self._count, self._pace), soft_wrap=True)
        if isinstance(event, Halved):
            self._console.print(halved_line(event), soft_wrap=True)


class Live(AbstractContextManager["Live"]):
    """A bar that moves with every batch and expert."""

    def __init__(self, console: Console, layer_bytes: Sequence[int]) -> None:
        self._pace, self._bytes = Pace(layer_bytes), layer_bytes
        self._begun, self._peak = time.monotonic(), 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=self._pace.total_bytes, state="")

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away, so that what is printed next stands alone."""
        self._progress.stop()

    def show(self, event: Event) -> None:
        """Move the bar; a line stays for each finished layer."""
        if isinstance(event, Started):
            self._pace.skip(event.committed)
            self._begun = time.monotonic()
        elif isinstance(event, Step):
            self._show_step(event)
        elif isinstance(event, LayerDone):
            self._pace.finish(time.monotonic() - self._begun)
            self._begun = time.monotonic()
            line = layer_line(event, len(self._bytes), self._pace)
            self._progress.console.print(line, soft_wrap=True)
        elif isinstance(event, Halved):
            self._progress.console.print(halved_line(event), soft_wrap=True)

    def _show_step(self, step: Step) -> None:
        memory = anonymous_bytes()
        self._peak = max(self._peak, memory)
        done = self._pace.done_bytes
        left = self._pace.left(time.monotonic() - self._begun)
        self._progress.update(
            self._task,
            completed=done,
            description=f"layer {step.layer + 1}/{len(self._bytes)}  "
            f"{step.phase} {step.done}/{step.total}",
            state=f"{format_size(done)} of {format_size(self._pace.total_bytes)}"
            f"  memory {format_size(memory)}, peak {format_size(self._peak)}"
            + (f"  {format_seconds(left)} left" if left is not None else ""),
        )


class Log:
    """Events as JSON lines; of the steps within a phase, one now and then.

    Each tells the time that is left and the memory in use, for who looks from elsewhere.
    """

    def __init__(self, file: TextIO, path: Path, layer_bytes: Sequence[int] = ()) -> None:
        self._file, self._path, self._pace = file, path, Pace(layer_bytes)
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
        with files.space_for(self._path):
            self._file.write(json.dumps(line) + "\n")

    def end(self, error: ReamStreamError) -> None:
        """Append why the run ends; where the log itself cannot be written, that is known."""
        with suppress(OSError, OverBudgetError):
            self.write("failed", {"status": error.exit_status, "message": str(error)})


NAMES: Mapping[type[Event], str] = {
    Started: "started",
    Step: "phase done",
    LayerDone: "layer done",
    Halved: "device memory was short",
    Finished: "finished",
}
"""What the log calls an event."""


def halved_line(event: Halved) -> str:
    """Return the line of a layer that begins again with less at once."""
    return (
        f"layer {event.layer + 1}  device memory was short: begins again with "
        f"{event.batch_sequences} sequences a batch and {event.resident_experts} experts kept "
        "on the device, and so do the layers after it"
    )


def layer_line(event: LayerDone, count: int, pace: Pace) -> str:
    """Return the line of a finished layer."""
    experts = "dense"
    if event.experts_before:
        experts = f"{event.experts_before} -> {event.experts_after} experts"
        if event.changed:
            experts += f", {event.changed} merged"
        if event.refitted is not None:
            experts += (
                f", refit leaves {event.refitted.left:.0%} of the error"
                if event.refitted.penalty is not None
                else ", refit did not help"
            )
    if event.excluded:
        experts += f", {event.excluded} sequences left out"
    left = pace.left()
    words = [
        f"layer {event.layer + 1}/{count}",
        experts,
        f"{format_size(event.read_bytes)} -> {format_size(event.written_bytes)}",
        format_seconds(sum(event.seconds.values())),
        f"peak {format_size(event.peak_anonymous_bytes)}",
    ]
    if event.peak_device_bytes:
        words.append(f"device {format_size(event.peak_device_bytes)}")
    if left and event.layer + 1 < count:
        words.append(f"{format_seconds(left)} left")
    return "  ".join(words)


def display(console: Console, layer_bytes: Sequence[int]) -> Lines | Live:
    """Return what suits the console."""
    return (Live if console.is_terminal else Lines)(console, layer_bytes)
