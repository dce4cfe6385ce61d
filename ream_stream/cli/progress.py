"""A run as it happens: a bar on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from ream_stream.compression.event_log import Pace
from ream_stream.events import (
    BatchHalved,
    Event,
    LayerDone,
    Report,
    Started,
    Step,
    TakenOver,
)
from ream_stream.host_memory import anonymous_bytes
from ream_stream.units import format_seconds, format_size

from .heartbeat import Heartbeat


class Position:
    """Where a run is: its layer, the phase in it, and the time that is left.

    Parameters
    ----------
    layer_bytes
        Bytes of every layer.
    planned_seconds
        Forecast of what is left of the run, which counts until a layer was measured.
    """

    def __init__(
        self, layer_bytes: Sequence[int], planned_seconds: float | None = None
    ) -> None:
        self.pace, self._count = Pace(layer_bytes, planned_seconds), len(layer_bytes)
        self._step: Step | None = None
        self._begun, self._peak = time.monotonic(), 0

    def show(self, event: Event) -> str | None:
        """Take an event; return the line that stays of it."""
        if isinstance(event, Step):
            self._step = event
        elif isinstance(event, Started):
            self.pace.skip(event.committed)
            self._begun = time.monotonic()
            if event.committed < event.layers:
                return f"layer {event.committed + 1}/{event.layers} begins{self.left()}"
        elif isinstance(event, LayerDone):
            self.pace.finish(time.monotonic() - self._begun)
            self._begun, self._step = time.monotonic(), None
            return layer_line(event, self._count, self.pace)
        elif isinstance(event, BatchHalved | TakenOver):
            return line_of(event)
        return None

    def words(self) -> str:
        """Return layer, phase, memory and the time left in one line; empty before the first."""
        return f"{self.place()}  {self.memory()}{self.left()}" if self._step else ""

    def place(self) -> str:
        """Return layer and phase."""
        if (step := self._step) is None:
            return ""
        return f"layer {step.layer + 1}/{self._count}  {step.phase} {step.done}/{step.total}"

    def memory(self) -> str:
        """Return the memory in use, and the highest that was seen here."""
        memory = anonymous_bytes()
        self._peak = max(self._peak, memory)
        return f"memory {format_size(memory)}, peak {format_size(self._peak)}"

    def left(self) -> str:
        """Return the time left as the end of a line; empty if it is not known."""
        left = self.pace.left(time.monotonic() - self._begun)
        if left is None:
            return ""
        return f"  {format_seconds(left)} left" + (
            "" if self.pace.is_measured else " (planned)"
        )


class _State(ProgressColumn):
    """Bytes, memory and the time left, which move between two events too."""

    def __init__(self, position: Position) -> None:
        super().__init__()
        self._position = position

    def render(self, task: Task) -> Text:
        """Return what stands behind the bar."""
        pace = self._position.pace
        size = f"{format_size(pace.done_bytes)} of {format_size(pace.total_bytes)}"
        return Text(f"{size}  {self._position.memory()}{self._position.left()}")


@contextmanager
def running(
    console: Console, layer_bytes: Sequence[int], planned_seconds: float | None = None
) -> Iterator[Report]:
    """Give what shows a run on a console; the parameters are those of `Position`."""
    position = Position(layer_bytes, planned_seconds)
    if not console.is_terminal:
        with Heartbeat(console, position.words) as lines:

            def say(event: Event) -> None:
                if line := position.show(event):
                    lines.say(line)

            yield say
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), _State(position)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=position.pace.total_bytes)

        def move(event: Event) -> None:
            line = position.show(event)
            if line and not isinstance(event, Started):
                bar.console.print(line, soft_wrap=True)
            bar.update(task, completed=position.pace.done_bytes, description=position.place())

        yield move


def line_of(event: BatchHalved | TakenOver) -> str:
    """Return the line of an event that is seldom."""
    if isinstance(event, TakenOver):
        return f"taking over from {event.previous}, which ended without a word"
    return (
        f"layer {event.layer + 1}  device memory was short: begins again with "
        f"{event.batch_sequences} sequences a batch and {event.resident_experts} experts kept "
        "on the device, and so do the layers after it"
    )


def layer_line(event: LayerDone, count: int, pace: Pace) -> str:
    """Return the line of a finished layer."""
    experts = "dense"
    if event.experts_before:
        kept = (
            f" -> {event.experts_after} experts" if event.experts_after else " experts observed"
        )
        experts = f"{event.experts_before}{kept}"
        if event.changed:
            experts += f", {event.changed} merged"
        if event.refitted is not None:
            experts += (
                f", refit leaves {event.refitted.remaining_error:.0%} of the error"
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
