"""What a run says before and after."""

import shlex
from typing import Any

from rich.console import Console

from ream_stream.compression.config import RunOptions
from ream_stream.compression.job import Job, is_complete
from ream_stream.units import format_size

from .console import facts, format_seconds, phases, plan_table
from .run import Outcome


def say_start(
    job: Job, options: RunOptions, console: Console, *, restart: bool = False
) -> None:
    """Print the plan, and from where a run goes on."""
    console.print(plan_table(job, options))
    if restart and job.workspace is not None and job.workspace.journal.is_file():
        console.print("discarding the run that was begun here, because of --restart")
    if job.journal is None or job.workspace is None:
        return
    done, count = len(job.journal.layers), len(job.plan.layers)
    if is_complete(job.workspace):
        console.print(f"{job.workspace.output} is complete", soft_wrap=True)
    elif done < count:
        console.print(f"resuming at layer {done + 1} of {count}: {done} are committed")
    else:
        console.print(f"resuming after all {count} layers: what is outside them is left")


def outcome_facts(outcome: Outcome) -> dict[str, Any]:
    """Return what came out, for ``--json``."""
    finished = outcome.finished
    return {
        "already_complete": finished.already_complete,
        "output_bytes": finished.output_bytes,
        "seconds": outcome.seconds,
        "seconds_by_phase": dict(finished.seconds),
        "peak_anonymous_bytes": finished.peak_anonymous_bytes,
        "peak_device_bytes": finished.peak_device_bytes,
    }


def say_summary(job: Job, outcome: Outcome, console: Console) -> None:
    """Print what came out and what to do with it."""
    finished = outcome.finished
    output = shlex.quote(str(job.workspace.output if job.workspace else ""))
    checkpoint = job.plan.source
    # of a streamed one only headers are on the disk
    against = "" if checkpoint.fetch else f" --against {shlex.quote(str(checkpoint.folder))}"
    on_device = [
        (
            "peak of device memory",
            f"{format_size(finished.peak_device_bytes)}, "
            f"planned {format_size(sum(job.plan.device_memory.values()))}",
        )
    ]
    if finished.already_complete:
        console.print("nothing was left to do")
    else:
        console.print(
            facts(
                [
                    (
                        "weights",
                        f"{format_size(finished.source_bytes)} -> "
                        f"{format_size(finished.output_bytes)}",
                    ),
                    ("time", format_seconds(outcome.seconds)),
                    ("  by phase", phases(finished.seconds)),
                    (
                        "peak memory",
                        f"{format_size(finished.peak_anonymous_bytes)}, "
                        f"planned {format_size(job.plan.memory_bytes)}",
                    ),
                    *(on_device if finished.peak_device_bytes else []),
                ],
                title="Done",
            )
        )
    for line in (
        f"next: ream-stream verify {output}",
        f"      ream-stream eval {output}{against} --text FILE",
    ):
        console.print(line, soft_wrap=True)
