"""From parsed options to a run that may begin: all that can be refused is refused here.

Nothing is written. The order is from cheap to dear: what the options say, the
source's headers, the output folder, the plan, and the calibration text last.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ream_stream.calibration.packing import Calibration, read_tokens
from ream_stream.calibration.token_cache import Request, calibration_of, changed, stored
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.hub import streamed
from ream_stream.checkpoint.reader import Checkpoint, check_path, open_checkpoint, vocab_size_of
from ream_stream.errors import OtherRunError, UsageError
from ream_stream.events import Preparing, Report, no_report
from ream_stream.file_access import resolved, why_not_writable
from ream_stream.host_memory import trim
from ream_stream.model import device as devices
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.planning.disk import check_disk
from ream_stream.planning.gpus import Gpu
from ream_stream.planning.plan import Plan
from ream_stream.planning.schedule import Begun, Budgets
from ream_stream.planning.serving_limits import check_served
from ream_stream.planning.size_target import SizeTarget
from ream_stream.planning.throughput import Forecast, forecast

from .candidate_plans import PlanInputs, first_that_works
from .config import RunOptions, check_usage
from .finalize import check_names, output_files
from .held_back import held_back
from .journal import Journal, check_fingerprint
from .pipeline import fingerprint
from .size_search import target_of
from .statistics import Statistics, open_statistics
from .workspace import Workspace, workspace_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run that may begin."""

    plan: Plan
    """Plan of the run."""

    workspace: Workspace | None
    """Folders that the run writes to; None if no output was named."""

    journal: Journal | None
    """Journal of the run to resume; None for a new run."""

    tokens: Tokens | None
    """Calibration set; None if none was named."""

    device: torch.device
    """Device that layers run on."""

    request: Request | None = None
    """Text that the tokens were made from; None for a token file, and with statistics."""

    statistics: Statistics | None = None
    """Statistics that experts are chosen by; None if the run takes its own."""

    gpu: Gpu | None = None
    """GPU that is planned for by its data sheet."""

    ranks: tuple[int, int] = (1, 1)
    """Processes of the run, and those of them on this machine."""

    unused_gpu: str | None = None
    """Note on a GPU of this machine that ``--device auto`` could not choose."""

    forecast: Forecast | None = None
    """Remaining work and its estimated duration; None if nothing remains."""

    method: str = ""
    """Name of the method, of `PRESETS`; empty if all its parts were given."""

    reason: str = ""
    """Reason for the method, if ``--method auto`` chose it."""

    target: SizeTarget | None = None
    """Size that the experts are kept for; None if their number or share was given."""

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of each layer in the source."""
        entries, layers = self.plan.source.entries, self.plan.layers
        return tuple(sum(entries[name].nbytes for name in each.keys.names) for each in layers)

    @property
    def planned_seconds(self) -> float | None:
        """Estimated seconds of the remaining work; None if nothing remains."""
        return sum(self.forecast.seconds.values()) if self.forecast else None


def prepare(
    options: RunOptions,
    *,
    restart: bool = False,
    with_data: bool = True,
    report: Report = no_report,
    gpu: Gpu | None = None,
    ranks: Ranks = ALONE,
) -> Job:
    """Work out what the options come to.

    Parameters
    ----------
    options, gpu, ranks
        As parsed; the GPU that is planned for, whatever there is here; the run's processes.
    restart, with_data, report
        Whether a run in the output folder is to be discarded; False if the source's shards may
        end after their headers; told each part as `Preparing`.

    Raises
    ------
    ReamStreamError
        The run cannot begin; the class says why.
    """
    check_usage(options)
    report(Preparing(part="reading headers"))
    device, budgets = _machine(options, gpu, ranks.local_size, plans_only=not with_data)
    workspace = _workspace(options)
    checkpoint = _checkpoint(options, workspace, with_data=with_data)
    journal = None if workspace is None else _journal(workspace, restart=restart)
    wanted = calibration_of(options)
    statistics = _statistics(options, checkpoint)
    tokens = statistics.tokens if statistics else _token_file(wanted, checkpoint)
    begun = journal.begun() if journal else None
    inputs = PlanInputs(options, checkpoint, budgets, workspace, begun, statistics)
    known = tokens or _tokens_begun_with(journal, workspace)
    plan, asked, reason = first_that_works(inputs, device, known)
    torch.set_num_threads(plan.schedule.threads)
    _check_output(plan, options, workspace, begun)
    job = Job(
        plan=plan,
        workspace=workspace,
        journal=journal,
        tokens=tokens,
        statistics=statistics,
        device=device,
        method=asked.method if isinstance(asked.method, str) else "",
        reason=reason,
        target=target_of(options),
        gpu=gpu,
        ranks=(ranks.size, ranks.local_size),
        unused_gpu=_unused_gpu(options, device),
    )
    job = _with_tokens(job, wanted, report)
    if job.tokens is not None and not _is_of(plan, job.tokens):
        # there was not as much text as was planned with, or more
        job = replace(job, plan=inputs.plan(plan.settings, job.tokens))
        _check_output(job.plan, options, workspace, begun)
    return _with_forecast(job, report)


def _checkpoint(
    options: RunOptions, workspace: Workspace | None, *, with_data: bool
) -> Checkpoint:
    """Open the source; with streaming, its shards are fetched to the work folder."""
    found = open_checkpoint(options.source, with_data=with_data and options.remote is None)
    if options.remote is None or workspace is None:
        return found
    return streamed(found, options.remote, workspace.streamed)


def _is_of(plan: Plan, tokens: Tokens) -> bool:
    """Tell whether a plan is of so many sequences and domains."""
    found = (tokens.num_sequences, len(tokens.domains))
    return found == (plan.sequences, plan.domains)


def _tokens_begun_with(journal: Journal | None, workspace: Workspace | None) -> Tokens | None:
    """Return the tokens that a run began with, if they are in its work folder."""
    if journal is None or workspace is None:
        return None
    return stored(workspace.tokens, journal.fingerprint["calibration"])


def _statistics(options: RunOptions, checkpoint: Checkpoint) -> Statistics | None:
    """Return the statistics that were named, if they are of the source."""
    if options.statistics is None:
        return None
    found = open_statistics(resolved(options.statistics))
    found.check_source(checkpoint)
    return found


def _workspace(options: RunOptions) -> Workspace | None:
    if options.output is None:
        return None
    return workspace_of(options.output, options.work_dir, options.source)


def _check_output(
    plan: Plan, options: RunOptions, workspace: Workspace | None, begun: Begun | None
) -> None:
    """Refuse an output that servers do not take, or that its folder or disk does not."""
    if not options.any_count:
        check_served(
            plan.settings.experts, plan.num_experts, plan.routing_groups, plan.output_top_k
        )
    check_names(workspace.output if workspace else Path(), output_files(plan))
    if workspace is not None:
        check_disk(plan, workspace.output, workspace.work, begun)


def _machine(
    options: RunOptions, gpu: Gpu | None, processes: int, *, plans_only: bool
) -> tuple[torch.device, Budgets]:
    """Return device and budgets: of this machine, or of one with a named GPU."""
    if gpu is None:
        device, vram = _device(options, plans_only=plans_only)
    else:
        device, vram = _planned_device(options, gpu)
    elsewhere = gpu is not None
    if vram is not None and options.vram is None and str(device) != device.type:
        vram //= processes  # which all use the GPU that was named
    return device, Budgets.of(
        options.ram, disk=options.disk, vram=vram, elsewhere=elsewhere, processes=processes
    )


def _device(options: RunOptions, *, plans_only: bool) -> tuple[torch.device, int | None]:
    """Return the device of the layers, and its memory budget; None for the processor.

    Raises
    ------
    UsageError
        There is no such device; only a plan can do without, if it is told the budget.
    """
    if plans_only and options.vram is not None and not devices.is_here(torch.device("cuda")):
        if options.device not in {"auto", "cpu"}:
            return torch.device(options.device), options.vram
        if options.device == "auto":
            return torch.device("cuda"), options.vram
    device = devices.choose_device(options.device)
    if device.type == "cpu":
        if options.vram is not None:
            raise UsageError(
                f"--vram is for layers that run on a GPU, --device {options.device} is the "
                "processor here; leave it out"
            )
        return device, None
    return device, options.vram or devices.free_bytes(device)


def _unused_gpu(options: RunOptions, device: torch.device) -> str | None:
    """Return a note if ``auto`` took the processor though the machine has a GPU."""
    return devices.unused_gpu() if (options.device, device.type) == ("auto", "cpu") else None


def _planned_device(options: RunOptions, gpu: Gpu) -> tuple[torch.device, int]:
    """Return the device of a plan for a named GPU, and its memory budget.

    Raises
    ------
    UsageError
        Layers would run on the processor.
    """
    if options.device == "cpu":
        raise UsageError(f"--gpu {gpu.name} and --device cpu exclude each other; leave one out")
    device = "cuda" if options.device == "auto" else options.device
    return torch.device(device), options.vram or gpu.budget_bytes


def _journal(workspace: Workspace, *, restart: bool) -> Journal | None:
    """Return the journal of a run to go on with; refuse a folder that is not ours or in use."""
    for folder in (workspace.output, workspace.work):
        check_path(folder)
        if (reason := why_not_writable(folder)) is not None:
            raise UsageError(f"{folder} cannot be written to: {reason}")
    journal, holder = workspace.begun(), workspace.holder()
    if holder is not None:
        raise OtherRunError(f"{workspace.work} is in use by {holder}; wait for it or stop it")
    return None if restart else journal


def _token_file(wanted: Calibration | None, checkpoint: Checkpoint) -> Tokens | None:
    """Return the tokens of a single token file, which has its own numbers."""
    if wanted is None or len(wanted.parts) > 1 or not wanted.parts[0].is_tokens:
        return None
    return read_tokens(wanted, checkpoint.folder, vocab_size=vocab_size_of(checkpoint.config))


def _with_tokens(job: Job, calibration: Calibration | None, report: Report) -> Job:
    """Return the job with its tokens; of a begun run, with the ones it began with.

    Raises
    ------
    OtherRunError
        The run was begun differently. This is told before any text is read,
        since making tokens of a large one takes minutes.
    """
    tokens, request, differs = job.tokens, None, None
    journal, workspace = job.journal, job.workspace
    if calibration is None and tokens is None:
        return job
    if calibration is not None and tokens is None:
        request = Request.of(calibration)
        if journal is not None and workspace is not None:
            tokens = _tokens_begun_with(journal, workspace)
            differs = changed(request, workspace.tokens)
    if calibration is not None and tokens is None:
        report(Preparing(part="reading calibration text and making tokens"))
        source = job.plan.source
        tokens = read_tokens(
            calibration, source.folder, vocab_size=vocab_size_of(source.config)
        )
        trim()  # a tokenizer takes hundreds of megabytes, which no plan counts
    assert tokens is not None
    if job.plan.refits:
        held_back(tokens, job.plan.settings.seed)  # refuses too few sequences
    if journal is not None and workspace is not None:
        wanted = fingerprint(job.plan, tokens)
        if differs is not None:
            wanted["calibration"] = differs
        check_fingerprint(journal, wanted, workspace.output)
    return replace(job, tokens=tokens, request=request)


def _with_forecast(job: Job, report: Report) -> Job:
    """Return the job with the time it takes, which is measured last: it may be refused."""
    if job.workspace is not None and job.journal is not None and job.workspace.is_complete():
        return job
    report(Preparing(part="measuring how fast this machine is"))
    committed = len(job.journal.layers) if job.journal else 0
    # for a device that is only planned for, the processor stands in
    here = job.gpu is None and devices.is_here(job.device)
    device = job.device if here else torch.device("cpu")
    size = job.ranks[0]
    found = forecast(job.plan, device, committed=committed, gpu=job.gpu, ranks=size)
    return replace(job, forecast=found)
