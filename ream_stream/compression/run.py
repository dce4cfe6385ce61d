"""A prepared run, carried out: lock, tokens, log."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ream_stream import files
from ream_stream.calibration.token_cache import store
from ream_stream.calibration.tokens import Tokens
from ream_stream.errors import InterruptedRunError, OtherRunError, ReamStreamError, of_system
from ream_stream.events import Event, Finished, Report, TakenOver, no_report
from ream_stream.model.ranks.group import ALONE, Ranks

from .event_log import Log
from .job import Job
from .pipeline import compress
from .plan_facts import plan_facts
from .shared_job import check_shared
from .workspace import Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionResult:
    """A run that came to its end."""

    output: Path
    """Folder of the compressed checkpoint."""

    source_bytes: int
    """Bytes of the source's tensors."""

    output_bytes: int
    """Bytes of the output's shards."""

    seconds: float
    """Wall time of this run."""

    seconds_by_phase: Mapping[str, float]
    """Seconds of this run in each phase."""

    peak_anonymous_bytes: int
    """Highest anonymous memory of this run."""

    peak_device_bytes: int
    """Highest memory of the GPU in this run; 0 if layers ran on the processor."""

    already_complete: bool
    """Whether the output was complete before this run."""

    plan: Mapping[str, Any]
    """Facts of the plan as `plan_facts` gives them."""

    sent_bytes: int = 0
    """Bytes of tensors that all ranks sent each other; 0 in a single process."""

    quality: Mapping[str, Any] | None = None
    """Scores of the output; None if no evaluation was asked for."""

    def facts(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        names = ("already_complete", "output_bytes", "seconds", "seconds_by_phase")
        peaks = ("peak_anonymous_bytes", "peak_device_bytes", "sent_bytes")
        return {**self.plan, **{name: getattr(self, name) for name in (*names, *peaks)}}


def run(
    job: Job,
    *,
    report: Report = no_report,
    command: str | None = None,
    restart: bool = False,
    keep_work: bool = True,
    ranks: Ranks = ALONE,
) -> CompressionResult:
    """Carry out a job.

    Parameters
    ----------
    job
        With an output and tokens.
    report
        Is told what happens; it may raise `InterruptedRunError`.
    command, restart, keep_work, ranks
        As in `evaluation.api.compress`; processes that each have their own job.

    Raises
    ------
    InterruptedRunError
        `report` asked for it; what was committed stays.
    """
    workspace, start = job.workspace, time.monotonic()
    if workspace is None or job.tokens is None:
        raise ValueError("a run needs an output and calibration tokens")
    if not ranks.is_first:
        check_shared(workspace.data, ranks)
        finished = _compressed(job, job.tokens, workspace, report, ranks)
        return _result(workspace, finished, plan_facts(job), start, ranks)
    with ExitStack() as stack:
        left_by = stack.enter_context(workspace.locked())
        _make_ready(job, workspace, job.tokens, restart=restart)
        file = stack.enter_context(files.open_log(workspace.log, workspace.older_log))
        log = Log(file, job.layer_bytes, job.planned_seconds)
        known = plan_facts(job)
        if command is not None:
            log.write("command", {"command": command, "directory": str(Path.cwd())})
        log.write("plan", known)

        def tell(event: Event) -> None:
            log.show(event)
            report(event)

        with _logged_end(log, command or "the same call"):
            if left_by is not None:
                tell(TakenOver(previous=left_by))
            check_shared(workspace.data, ranks)
            finished = _compressed(job, job.tokens, workspace, tell, ranks)
        if not keep_work:
            workspace.clean()
    return _result(workspace, finished, known, start, ranks)


def _result(
    workspace: Workspace,
    finished: Finished,
    known: Mapping[str, Any],
    start: float,
    ranks: Ranks,
) -> CompressionResult:
    return CompressionResult(
        output=workspace.output,
        source_bytes=finished.source_bytes,
        output_bytes=finished.output_bytes,
        seconds=time.monotonic() - start,
        seconds_by_phase=finished.seconds,
        peak_anonymous_bytes=finished.peak_anonymous_bytes,
        peak_device_bytes=finished.peak_device_bytes,
        already_complete=finished.already_complete,
        plan=known,
        sent_bytes=sum(ranks.gather(ranks.sent_bytes)),
    )


def _compressed(
    job: Job, tokens: Tokens, workspace: Workspace, report: Report, ranks: Ranks
) -> Finished:
    return compress(
        job.plan,
        tokens,
        workspace,
        device=job.device,
        statistics=job.statistics,
        report=report,
        ranks=ranks,
    )


def _make_ready(job: Job, workspace: Workspace, tokens: Tokens, *, restart: bool) -> None:
    """Discard what is to go, and keep the tokens of a run that begins."""
    if job.journal is None and not restart and workspace.has_journal():
        raise OtherRunError(
            f"another run began in {workspace.output} meanwhile; run the command again"
        )
    if restart:
        workspace.discard()
    if job.request is not None and job.journal is None:
        store(workspace.tokens, tokens, job.request)


@contextmanager
def _logged_end(log: Log, again: str) -> Iterator[None]:
    """Write into the log why a run ends early, and say what goes on with it."""
    try:
        yield
    except Exception as error:
        failed = _failure(error, again)
        if failed is None:
            raise
        log.end(failed)
        raise failed from error


def _failure(error: Exception, again: str) -> ReamStreamError | None:
    """Return why a run ends, with what goes on with it; None for a mistake of ours."""
    if isinstance(error, InterruptedRunError):
        number, then = error.exit_status - 128, f"resume with: {again}"
        return InterruptedRunError(str(error), then=then, signal_number=number)
    if isinstance(error, ReamStreamError):
        return error
    failed = of_system(error)
    if failed is not None:
        failed.then = f"once it is mended, go on with: {again}"
    return failed
