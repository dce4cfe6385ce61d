"""An evaluation as it happens: a bar on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ream_stream.events import Evaluating, Event, Report, Step
from ream_stream.units import format_seconds

from .heartbeat import Heartbeat


class Pass:
    """Position of one checkpoint's pass over the tokens."""

    def __init__(self) -> None:
        self._told = Evaluating(name="", layers=0)
        self._step: Step | None = None
        self._begun = time.monotonic()

    def show(self, event: Event) -> str | None:
        """Take an event; return the line of a part that begins."""
        if isinstance(event, Evaluating):
            self._told, self._step, self._begun = event, None, time.monotonic()
            if event.skipped == event.layers:
                return f"{event.name} was run before"
            goes_on = f", from layer {event.skipped + 1} on" if event.skipped else ""
            return f"running {event.name}, {event.layers} layers{goes_on}"
        if isinstance(event, Step):
            before, self._step = self._step, event
            if event.phase == "score" and (before is None or before.phase != "score"):
                self._begun = time.monotonic()
                return f"scoring {event.total} sequences"
        return None

    @property
    def done(self) -> float:
        """Share of the pass, or of the scoring, that is done."""
        step, told = self._step, self._told
        if step is None:
            return 0.0
        part = step.done / step.total
        if step.phase == "score":
            return part
        return (step.layer - told.skipped + part) / max(1, told.layers - told.skipped)

    def words(self) -> str:
        """Return the checkpoint, its layer and the time left in a line."""
        step, done = self._step, self.done
        if step is None:
            return self._told.name
        at = f"layer {step.layer + 1}/{self._told.layers}  " if step.phase != "score" else ""
        left = (time.monotonic() - self._begun) * (1 - done) / done if done else None
        told = "" if left is None else f"  {format_seconds(left)} left"
        return f"{self._told.name}  {at}{step.phase} {step.done}/{step.total}{told}"


@contextmanager
def evaluating(console: Console) -> Iterator[Report]:
    """Give what shows checkpoints while they are evaluated."""
    now = Pass()
    if not console.is_terminal:
        with Heartbeat(console, now.words) as lines:

            def say(event: Event) -> None:
                if line := now.show(event):
                    lines.say(line)

            yield say
        return
    columns = TextColumn("{task.description}"), BarColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading headers and text", total=1.0)

        def move(event: Event) -> None:
            now.show(event)
            bar.update(task, description=now.words(), completed=now.done)

        yield move
