"""A run on a terminal: what is said before, while and after it runs."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console

from ream_stream.compression.run import CompressionResult
from ream_stream.events import Event, Fetching, Planned, Preparing, Report, no_report
from ream_stream.units import format_seconds, format_size
from ream_stream.untrusted import shell_words

from .console import facts, phases
from .next_view import say_next
from .plan_view import plan_table, size_target
from .progress import running
from .signals import stop_requests, stopping
from .startup import starting


@contextmanager
def following(console: Console, asked: Mapping[str, Any] | None = None) -> Iterator[Report]:
    """Give a report that shows a run, with its plan if there is what was `asked`.

    Once the run may begin, a signal ends it at the next safe point.
    """
    tell: Report = no_report
    with ExitStack() as before, ExitStack() as stack:
        say = before.enter_context(starting(console))

        def report(event: Event) -> None:
            nonlocal tell
            if isinstance(event, Fetching):
                before.close()  # the hub has bars of its own
                size = format_size(event.num_bytes)
                console.print(f"fetching {event.repo} at {event.commit[:12]}, {size} at most")
            elif isinstance(event, Preparing):
                say(event.part)
            elif isinstance(event, Planned):
                before.close()
                if asked is not None:
                    say_start(event.facts, asked, console)
                planned = (event.facts["forecast"] or {}).get("seconds")
                shown = stack.enter_context(running(console, event.layer_bytes, planned))
                tell = stopping(stack.enter_context(stop_requests()), shown)
            else:
                tell(event)

        yield report


def say_start(known: Mapping[str, Any], asked: Mapping[str, Any], console: Console) -> None:
    """Print the plan, and from where a run goes on."""
    console.print(plan_table(known, asked, verbose=asked.get("verbose", False)))
    done, count = known["committed_layers"], known["layers"]
    if not known["begun"]:
        return
    if asked.get("restart"):
        console.print("discarding the run that was begun here, because of --restart")
    elif known["complete"]:
        console.print(f"{known['output']} is complete", soft_wrap=True)
    elif done < count:
        console.print(f"resuming at layer {done + 1} of {count}: {done} are committed")
    else:
        console.print(f"resuming after all {count} layers: what is outside them is left")


def say_observed(result: CompressionResult, console: Console) -> None:
    """Print what was kept and what to do with it."""
    source, folder = result.plan["source"], result.output
    if result.already_complete:
        console.print("nothing was left to do")
    else:
        console.print(facts(_measured(result, "statistics"), title="Done"))
    words = ["ream-stream", "compress", source, "OUTPUT", "--statistics", str(folder)]
    say_next([shell_words([*words, "--keep", "75%"])], console)


def _measured(result: CompressionResult, made: str) -> list[tuple[str, str]]:
    """Return rows on what was made, time and memory."""
    planned = result.plan
    before = "" if planned["observes"] else f"{format_size(result.source_bytes)} -> "
    on_device = [
        (
            "peak of device memory",
            f"{format_size(result.peak_device_bytes)}, "
            f"planned {format_size(planned['device_memory_bytes'])}",
        )
    ]
    return [
        (made, before + format_size(result.output_bytes)),
        *size_target(planned),
        ("time", format_seconds(result.seconds)),
        ("  by phase", phases(result.seconds_by_phase)),
        (
            "peak memory",
            f"{format_size(result.peak_anonymous_bytes)}, "
            f"planned {format_size(planned['memory_bytes'])}",
        ),
        *(on_device if result.peak_device_bytes else []),
    ]


def say_summary(result: CompressionResult, asked: Mapping[str, Any], console: Console) -> None:
    """Print what came out and what to do with it."""
    output, planned = shell_words([str(result.output)]), result.plan
    # of a streamed one only headers are on the disk
    against = "" if asked.get("stream") else f" --against {shell_words([planned['source']])}"
    if result.already_complete:
        console.print("nothing was left to do")
    else:
        console.print(facts(_measured(result, "weights"), title="Done"))
    say_next(
        (
            f"ream-stream verify {output}",
            f"ream-stream eval {output}{against} --text FILE",
        ),
        console,
    )
