"""The Python API: a checkpoint planned, compressed and measured, one function each.

Options are those of the command line, by the names of their fields in `RunOptions`, `Method`
and `Settings`, or in `ScoreOptions`; None leaves one at its default. `verify` and `inspect`
have modules of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ream_stream.checkpoint import hub
from ream_stream.compression.config import RunOptions
from ream_stream.compression.job import Job, prepare
from ream_stream.compression.observation import ObserveOptions
from ream_stream.compression.plan_facts import plan_facts
from ream_stream.compression.run import CompressionResult, run
from ream_stream.compression.shared_job import check_ranks, shared_job
from ream_stream.errors import UsageError
from ream_stream.events import Fetching, Planned, Report, no_report
from ream_stream.model.ranks.group import Ranks
from ream_stream.model.ranks.launch import expected, joined
from ream_stream.planning.gpus import gpu_named
from ream_stream.settings import Method, Settings, given_options

from .config import ScoreOptions
from .session import Scores, measure

Texts = str | Path | Sequence[str | Path]
"""One source of text, or several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanResult:
    """Work, memory and output of a planned compression."""

    settings: Settings
    """Settings that decide the bytes of the output."""

    experts_before: int
    """Experts of a source layer."""

    source_bytes: int
    """Bytes of the source's tensors."""

    output_bytes: int
    """Bytes of the output's shards."""

    memory_bytes: int
    """Peak of anonymous host memory in bytes."""

    device_memory_bytes: int
    """Peak of GPU memory in bytes; 0 if layers run on the processor."""

    disk_bytes: int
    """Peak disk usage of output and work folder together."""

    seconds: float | None
    """Estimated duration of the remaining work; None if nothing remains."""

    details: Mapping[str, Any]
    """All facts of the plan, as ``plan --json`` prints them."""


def plan(
    source: str | Path,
    output: str | Path | None = None,
    *,
    keep: float | str | Fraction | None = None,
    experts: int | None = None,
    method: str | Method | None = None,
    calibration: Texts | None = None,
    restart: bool = False,
    with_data: bool = False,
    report: Report = no_report,
    gpu: str | None = None,
    **options: Any,  # noqa: ANN401
) -> PlanResult:
    """Tell what `compress` would do with the same arguments; write nothing.

    Parameters
    ----------
    source, output, keep, experts, method, calibration, restart, options
        As in `compress`; without `calibration` only its size counts.
    with_data
        Whether shards that end after their headers are refused.
    report
        Called with what is done, as `events.Preparing`.
    gpu
        Key of `planning.gpus.GPUS`: the GPU that is planned for, by its data sheet.

    Raises
    ------
    ReamStreamError
        As `compress` before it begins.
    """
    given = {"keep": keep, "experts": experts, "method": method, "calibration": calibration}
    card = None if gpu is None else gpu_named(gpu)
    asked, remote = _found(
        RunOptions.of(source=Path(source), output=output, **{**given, **options})
    )
    ranks = expected()
    with _threads_kept():
        job = prepare(
            asked,
            restart=restart,
            with_data=with_data and remote is None,
            report=report,
            gpu=card,
            ranks=ranks,
        )
        check_ranks(job.plan, ranks)
    found = job.plan
    return PlanResult(
        settings=found.settings,
        experts_before=found.num_experts,
        source_bytes=found.source_bytes,
        output_bytes=found.output_bytes,
        memory_bytes=found.memory_bytes,
        device_memory_bytes=sum(found.device_memory.values()),
        disk_bytes=found.disk_bytes,
        seconds=job.planned_seconds,
        details=plan_facts(job) | {"is_remote": remote is not None},
    )


def compress(
    source: str | Path,
    output: str | Path,
    *,
    keep: float | str | Fraction | None = None,
    experts: int | None = None,
    method: str | Method | None = None,
    calibration: Texts | None = None,
    text: Texts | None = None,
    restart: bool = False,
    keep_work: bool = True,
    command: str | None = None,
    report: Report = no_report,
    **options: Any,  # noqa: ANN401
) -> CompressionResult:
    """Compress a checkpoint, or go on with what an earlier call left.

    Parameters
    ----------
    source, output
        Checkpoint folder, or ``ORG/NAME[@REVISION]`` on the hub; a new folder, or that of the
        run to go on with.
    keep, experts
        Experts to keep in each layer, a share (0.75, "75%") or their number; None for a size.
    method
        Key of `compression.config.PRESETS`, or all parts of a method.
    calibration
        What the model is run on, as ``--calibration`` takes it.
    text
        What the output is measured on beside the source, as ``--text`` of ``eval`` takes it.
    restart, keep_work
        Whether to discard the run that is in `output`; whether its work files stay.
    command
        What a person would type to go on; told by ``status`` and when the run ends early.
    report, options
        Called with each of `ream_stream.events`; more of the command line's options.

    Raises
    ------
    ReamStreamError
        The class says why; what was committed stays, and the same call goes on.
    """
    given = {"keep": keep, "experts": experts, "method": method, "calibration": calibration}
    asked = RunOptions.of(source=Path(source), output=output, **{**given, **options})
    how = _How(restart=restart, keep_work=keep_work, command=command)
    return _carried_out(asked, report, how, text)


def observe(
    source: str | Path,
    statistics: str | Path,
    *,
    calibration: Texts | None = None,
    restart: bool = False,
    keep_work: bool = True,
    command: str | None = None,
    report: Report = no_report,
    **options: Any,  # noqa: ANN401
) -> CompressionResult:
    """Run a checkpoint over text once, and keep what `compress` chooses experts by.

    Parameters
    ----------
    source, calibration, restart, keep_work, command, report
        As in `compress`.
    statistics
        New folder of the statistics, or that of the run to go on with; `compress` takes it as
        ``statistics``.
    options
        More of the options of ``observe``.

    Raises
    ------
    ReamStreamError
        The class says why; what was committed stays, and the same call goes on.
    """
    given = {"calibration": calibration, **options}
    asked = ObserveOptions.of(source=Path(source), output=statistics, **given)
    how = _How(restart=restart, keep_work=keep_work, command=command)
    return _carried_out(asked, report, how)


class _How(NamedTuple):
    """How a run is carried out; see `compress`."""

    restart: bool
    keep_work: bool
    command: str | None


def _carried_out(
    asked: RunOptions, report: Report, how: _How, text: Texts | None = None
) -> CompressionResult:
    """Run what was asked for, and measure the output if there is text."""
    with _threads_kept(), joined() as ranks:
        prepared = None
        if ranks.is_first:
            prepared = _prepared(asked, ranks, restart=how.restart, report=report)
        job = shared_job(prepared, ranks)
        report(Planned(facts=plan_facts(job), layer_bytes=job.layer_bytes))
        result = run(job, report=report, ranks=ranks, **how._asdict())
        if text is not None:
            result = replace(result, quality=_quality(result, job, asked, text, report, ranks))
    return result


def _quality(
    result: CompressionResult,
    job: Job,
    asked: RunOptions,
    text: Texts,
    report: Report,
    ranks: Ranks,
) -> dict[str, Any]:
    """Return the scores of an output beside its source."""
    against = None if asked.stream else job.plan.source.folder
    alike = {name: getattr(asked, name) for name in _MEASURED_ALIKE}
    wanted = ScoreOptions(
        **given_options({"text": text, "against": against, **alike}, ScoreOptions)
    )
    return measure(result.output, wanted, report=report, ranks=ranks).facts()


def _prepared(asked: RunOptions, ranks: Ranks, *, restart: bool, report: Report) -> Job:
    """Return a job that may begin, with its source on this machine unless that is streamed."""
    asked, remote = _found(asked)
    if not asked.calibration and asked.statistics is None:
        raise UsageError("say what to run the model on: --calibration")
    if remote is not None and not asked.stream:
        # what cannot be done is refused before anything large is fetched
        prepare(replace(asked, calibration=()), restart=restart, with_data=False)
        asked = replace(asked, source=_fetched(remote, report))
    job = prepare(asked, restart=restart, report=report, ranks=ranks)
    check_ranks(job.plan, ranks)
    if ranks.size > 1 and asked.statistics is not None:
        raise UsageError(
            "a run by --statistics has no batches that ranks could divide: start one process"
        )
    return job


def plan_observation(
    source: str | Path,
    statistics: str | Path | None = None,
    *,
    restart: bool = False,
    report: Report = no_report,
    **options: Any,  # noqa: ANN401
) -> Mapping[str, Any]:
    """Return what `observe` would do with the same arguments, as facts; write nothing.

    Shards may end after their headers; without calibration only its size counts.
    """
    asked, remote = _found(ObserveOptions.of(source=Path(source), output=statistics, **options))
    with _threads_kept():
        job = prepare(asked, restart=restart, with_data=False, report=report)
    return plan_facts(job) | {"is_remote": remote is not None}


_MEASURED_ALIKE = ("text_field", "sequence_length", "device", "compute_dtype", "ram")
"""Options of a compression that its evaluation uses too."""


def evaluate(
    checkpoint: str | Path,
    *,
    text: Texts | None = None,
    against: str | Path | None = None,
    keep_original: bool = False,
    report: Report = no_report,
    **options: Any,  # noqa: ANN401
) -> Scores:
    """Measure how well a checkpoint predicts a text, without ever loading it.

    Parameters
    ----------
    checkpoint
        Its folder.
    text
        What is predicted, as ``--text`` takes it.
    against
        The checkpoint it is compared with.
    keep_original
        Whether what `against` makes of the text stays in ``work_dir``, for the next call.
    report
        Is told what happens; it may raise `InterruptedRunError`.
    options
        More of the options of ``eval``.

    Raises
    ------
    UsageError, DamagedError, UnsupportedModelError, OverBudgetError
        It cannot be measured.
    """
    asked = ScoreOptions(
        **given_options({"text": text, "against": against, **options}, ScoreOptions)
    )
    with joined() as ranks:
        return measure(
            Path(checkpoint), asked, report=report, keep_original=keep_original, ranks=ranks
        )


def _found(asked: RunOptions) -> "tuple[RunOptions, hub.Remote | None]":
    """Return options with the folder of the source, and where it is if that is the hub.

    The folder of a source on the hub has its headers, not yet its data.
    """
    source = asked.source
    if source.is_dir():
        if asked.stream:
            raise UsageError(f"--stream is for a SOURCE on the hub, {source} is a folder")
        return asked, None
    remote = hub.find(str(source))
    streamed = remote if asked.stream else None
    return replace(asked, source=hub.fetch_headers(remote), remote=streamed), remote


def _fetched(remote: hub.Remote, report: Report) -> Path:
    """Fetch all of a checkpoint, and return its folder."""
    size = sum(file.size for file in remote.files.values())
    report(Fetching(repo=remote.repo, commit=remote.commit, num_bytes=size))
    return hub.download(remote)


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Give torch the caller's number of threads back."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
