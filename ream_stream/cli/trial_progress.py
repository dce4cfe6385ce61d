"""A comparison as it happens: which of its trials runs, and where it is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ream_stream.events import Comparing, Evaluating, Event, Report, Started
from ream_stream.units import format_seconds

from .evaluation_progress import Pass
from .heartbeat import Heartbeat
from .progress import Position


class Trials:
    """Position of a comparison."""

    def __init__(self) -> None:
        self._now: Comparing | None = None
        self._begun, self._made = time.monotonic(), 0
        self._inner: Position | Pass = Pass()

    def show(self, event: Event) -> str | None:
        """Take an event; return the line of a trial that begins."""
        if isinstance(event, Comparing):
            if self._now is None:
                self._begun = time.monotonic()
            else:
                self._made += 1
            self._now, self._inner = event, Pass()
            return self._named(event) + self._left(event)
        if isinstance(event, Started):
            # layers of one model are alike: bytes are not needed for the time of a trial
            self._inner = Position([1] * event.layers)
        elif isinstance(event, Evaluating):
            self._inner = Pass()
        self._inner.show(event)
        return None

    @property
    def done(self) -> int:
        """Number of trials before this one."""
        return self._now.number - 1 if self._now else 0

    def words(self) -> str:
        """Return the trial, and where its run or evaluation is; empty before the first."""
        if self._now is None:
            return ""
        return "  ".join(filter(None, (self._named(self._now), self._inner.words())))

    def _named(self, trial: Comparing) -> str:
        mix = f", mix {trial.mix}" if trial.mix else ""
        seed = "" if trial.seed is None else f", seed {trial.seed}"
        return f"trial {trial.number} of {trial.trials}: {trial.name}{mix}{seed}"

    def _left(self, trial: Comparing) -> str:
        if not self._made:
            return ""
        each = (time.monotonic() - self._begun) / self._made
        return f"  about {format_seconds(each * trial.to_do)} left"


@contextmanager
def comparing(console: Console) -> Iterator[Report]:
    """Give what shows the trials of a comparison on a console."""
    trials = Trials()
    if not console.is_terminal:
        with Heartbeat(console, trials.words) as lines:

            def say(event: Event) -> None:
                if line := trials.show(event):
                    lines.say(line)

            yield say
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("")

        def move(event: Event) -> None:
            if line := trials.show(event):
                bar.console.print(line, soft_wrap=True)
            total = event.trials if isinstance(event, Comparing) else None
            bar.update(task, description=trials.words(), completed=trials.done, total=total)

        yield move
