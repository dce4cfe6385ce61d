"""A prepared run on a terminal: what is said before, while and after it runs."""

from rich.console import Console

from ream_stream.compression.config import RunOptions
from ream_stream.compression.finalize import is_complete
from ream_stream.compression.job import Job
from ream_stream.compression.run import CompressionResult
from ream_stream.compression.run import run as carry_out
from ream_stream.printable import shell_words
from ream_stream.units import format_seconds, format_size

from .console import facts, phases
from .plan_view import plan_table
from .progress import display
from .signals import stop_requests, stopping


def run(
    job: Job,
    console: Console,
    *,
    command: str,
    restart: bool = False,
    keep_work: bool = True,
) -> CompressionResult:
    """Carry out a job, show it on a console and let signals end it."""
    with stop_requests() as asked, display(console, job.layer_bytes) as shown:
        return carry_out(
            job,
            report=stopping(asked, shown.show),
            command=command,
            restart=restart,
            keep_work=keep_work,
        )


def say_start(
    job: Job, options: RunOptions, console: Console, *, restart: bool = False
) -> None:
    """Print the plan, and from where a run goes on."""
    console.print(plan_table(job, options))
    if restart and job.workspace is not None and job.workspace.has_journal():
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


def say_summary(job: Job, result: CompressionResult, console: Console) -> None:
    """Print what came out and what to do with it."""
    output = shell_words([str(result.output)])
    checkpoint = job.plan.source
    # of a streamed one only headers are on the disk
    against = "" if checkpoint.fetch else f" --against {shell_words([str(checkpoint.folder)])}"
    on_device = [
        (
            "peak of device memory",
            f"{format_size(result.peak_device_bytes)}, "
            f"planned {format_size(sum(job.plan.device_memory.values()))}",
        )
    ]
    if result.already_complete:
        console.print("nothing was left to do")
    else:
        console.print(
            facts(
                [
                    (
                        "weights",
                        f"{format_size(result.source_bytes)} -> "
                        f"{format_size(result.output_bytes)}",
                    ),
                    ("time", format_seconds(result.seconds)),
                    ("  by phase", phases(result.seconds_by_phase)),
                    (
                        "peak memory",
                        f"{format_size(result.peak_anonymous_bytes)}, "
                        f"planned {format_size(job.plan.memory_bytes)}",
                    ),
                    *(on_device if result.peak_device_bytes else []),
                ],
                title="Done",
            )
        )
    for line in (
        f"next: ream-stream verify {output}",
        f"      ream-stream eval {output}{against} --text FILE",
    ):
        console.print(line, soft_wrap=True)
