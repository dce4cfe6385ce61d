"""A run as it happens: live on a terminal, a line a layer elsewhere."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ream_stream.compression.event_log import Pace
from ream_stream.events import (
    BatchHalved,
    Event,
    LayerDone,
    Started,
    Step,
    TakenOver,
)
from ream_stream.host_memory import anonymous_bytes
from ream_stream.units import format_seconds, format_size


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
        if isinstance(event, BatchHalved | TakenOver):
            self._console.print(line_of(event), soft_wrap=True)


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
        elif isinstance(event, BatchHalved | TakenOver):
            self._progress.console.print(line_of(event), soft_wrap=True)

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
        experts = f"{event.experts_before} -> {event.experts_after} experts"
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


def display(console: Console, layer_bytes: Sequence[int]) -> Lines | Live:
    """Return what suits the console."""
    return (Live if console.is_terminal else Lines)(console, layer_bytes)
