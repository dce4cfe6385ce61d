"""A prepared run, carried out: lock, tokens, log, display, signals."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ream_stream import files
from ream_stream.calibration.token_cache import store
from ream_stream.compression.job import Job
from ream_stream.compression.journal import Workspace
from ream_stream.compression.pipeline import compress
from ream_stream.errors import InterruptedRunError, OtherRunError, ReamStreamError, sentence
from ream_stream.events import Event, Finished

from .console import plan_facts
from .progress import Log, display
from .signals import stop_requests, stopping


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A run that came to its end."""

    finished: Finished
    """Its last event."""

    seconds: float
    """Wall time of this run."""


def run(
    job: Job,
    workspace: Workspace,
    console: Console,
    *,
    command: str,
    restart: bool = False,
    keep_work: bool = True,
) -> Outcome:
    """Carry out a job.

    Parameters
    ----------
    job
        With tokens.
    workspace
        Where it writes.
    console
        Where progress is shown.
    command
        What goes on with it; kept in the log and told when it is interrupted.
    restart
        Discard the run that is there.
    keep_work
        Whether journal, statistics, tokens and log stay when it is done.

    Raises
    ------
    InterruptedRunError
        A signal asked it to stop.
    """
    if job.tokens is None:
        raise ValueError("a run needs calibration tokens")
    start = time.monotonic()
    with ExitStack() as stack:
        left_by = stack.enter_context(workspace.locked())
        if job.journal is None and not restart and workspace.journal.is_file():
            raise OtherRunError(
                f"another run began in {workspace.output} meanwhile; run the command again"
            )
        if restart and workspace.journal.is_file():
            workspace.discard()
        if job.request is not None and job.journal is None:
            store(workspace.tokens, job.tokens, job.request)
        file = stack.enter_context(files.open_log(workspace.log, workspace.older_log))
        log = Log(file, workspace.log, _layer_bytes(job))
        log.write("command", {"command": command, "directory": str(Path.cwd())})
        log.write("plan", plan_facts(job))
        if left_by is not None:
            console.print(f"taking over from {left_by}, which ended without a word")
            log.write("taken over", {"from": left_by})
        asked = stack.enter_context(stop_requests())
        try:
            finished = _follow(job, workspace, console, log, asked)
        except InterruptedRunError as error:
            log.end(error)
            number = error.exit_status - 128
            message = f"{error}\nresume with: {command}"
            raise InterruptedRunError(message, signal_number=number) from error
        except ReamStreamError as error:
            log.end(error)
            raise
        except OSError as error:
            failed = ReamStreamError(
                f"{sentence(error)}\nonce it is mended, go on with: {command}"
            )
            log.end(failed)
            raise failed from error
        if not keep_work:
            workspace.clean()
    return Outcome(finished=finished, seconds=time.monotonic() - start)


def _follow(
    job: Job,
    workspace: Workspace,
    console: Console,
    log: Log,
    asked: Callable[[], int | None],
) -> Finished:
    plan, tokens = job.plan, job.tokens
    assert tokens is not None
    with display(console, _layer_bytes(job)) as shown:

        def report(event: Event) -> None:
            log.show(event)
            shown.show(event)

        return compress(
            plan,
            tokens,
            workspace,
            device=job.device,
            report=stopping(asked, report),
        )


def _layer_bytes(job: Job) -> list[int]:
    entries = job.plan.source.entries
    return [sum(entries[name].nbytes for name in layer.keys.names) for layer in job.plan.layers]
