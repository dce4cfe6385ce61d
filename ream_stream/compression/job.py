"""From parsed options to a run that may begin: all that can be refused is refused here.

Nothing is written. The order is from cheap to dear: what the options say, the
source's headers, the output folder, the plan, and the calibration text last.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from ream_stream.calibration.packing import Calibration, read_tokens
from ream_stream.calibration.token_cache import Request, calibration_of, changed, stored
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.config_json import text_config
from ream_stream.checkpoint.hub import streamed
from ream_stream.checkpoint.reader import Checkpoint, check_path, open_checkpoint, vocab_size_of
from ream_stream.errors import OtherRunError, UnsupportedModelError, UsageError
from ream_stream.events import Preparing, Report, no_report
from ream_stream.file_access import why_not_writable
from ream_stream.host_memory import trim
from ream_stream.model import device as devices
from ream_stream.model.dtypes import compute_dtype
from ream_stream.model.families import TOP_K_KEYS, family_of
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.planning.disk import check_disk
from ream_stream.planning.gpus import Gpu
from ream_stream.planning.plan import Plan
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Begun, Budgets
from ream_stream.planning.serving_limits import check_served
from ream_stream.planning.slice_shape import ExpertLayer
from ream_stream.planning.throughput import Forecast, forecast
from ream_stream.settings import Settings

from .config import RunOptions, candidates, check_usage, settings_for
from .finalize import check_names, output_files
from .journal import Journal, check_fingerprint
from .pipeline import fingerprint
from .refit_activations import held_back
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
    """Text that the tokens were made from; None for a token file."""
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
    checkpoint = open_checkpoint(options.source, with_data=with_data and options.remote is None)
    device, budgets = _machine(options, gpu, ranks.local_size, plans_only=not with_data)
    workspace = _workspace(options)
    if options.remote is not None and workspace is not None:
        checkpoint = streamed(checkpoint, options.remote, workspace.streamed)
    journal = None if workspace is None else _journal(workspace, restart=restart)
    wanted = calibration_of(options)
    tokens = _token_file(wanted, checkpoint)
    begun, of_run = journal.begun() if journal else None, tokens
    if tokens is None and journal is not None and workspace is not None:
        of_run = stored(workspace.tokens, journal.fingerprint["calibration"])
    inputs = _Inputs(options, checkpoint, budgets, workspace, begun)
    plan, asked, reason = _first_that_works(inputs, device, of_run)
    torch.set_num_threads(plan.schedule.threads)
    _check_output(plan, options, workspace, begun)
    job = Job(
        plan=plan,
        workspace=workspace,
        journal=journal,
        tokens=tokens,
        device=device,
        method=asked.method if isinstance(asked.method, str) else "",
        reason=reason,
        gpu=gpu,
        ranks=(ranks.size, ranks.local_size),
        unused_gpu=_unused_gpu(options, device),
    )
    job = _with_tokens(job, wanted, report)
    if job.tokens is not None and job.tokens.num_sequences != plan.sequences:
        # there was not as much text as was planned with, or more
        job = replace(job, plan=inputs.plan(plan.settings, job.tokens))
        _check_output(job.plan, options, workspace, begun)
    return _with_forecast(job, report)


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


@dataclass(frozen=True, slots=True)
class _Inputs:
    """All that a plan is made of but settings and tokens."""

    options: RunOptions
    checkpoint: Checkpoint
    budgets: Budgets
    workspace: Workspace | None
    begun: Begun | None

    def plan(self, settings: Settings, tokens: Tokens | None) -> Plan:
        """Return the plan of a run; without tokens, of as many as are asked for."""
        options, workspace = self.options, self.workspace
        return make_plan(
            self.checkpoint,
            settings,
            options.planned_sequences if tokens is None else tokens.num_sequences,
            options.sequence_length if tokens is None else tokens.sequence_length,
            budgets=self.budgets,
            threads=options.threads,
            padded=tokens is None or tokens.attention_mask_SL is not None,
            output=workspace.output if workspace else None,
            work=workspace.work if workspace else None,
            begun=self.begun,
        )


def _first_that_works(
    inputs: _Inputs, device: torch.device, tokens: Tokens | None
) -> tuple[Plan, RunOptions, str]:
    """Return the plan of the first candidate that works, its options, and the reason."""
    *tried, (last, last_reason) = candidates(inputs.options)
    why_not: list[str] = []
    for asked, reason in tried:
        try:
            plan = inputs.plan(_settings(asked, inputs.checkpoint, device), tokens)
        except UsageError as error:
            why_not.append(str(error))
        else:
            return plan, asked, reason
    plan = inputs.plan(_settings(last, inputs.checkpoint, device), tokens)
    return plan, last, f"{last_reason}: {why_not[0]}" if why_not else last_reason


def num_experts(checkpoint: Checkpoint) -> int:
    """Return the routed experts of a layer.

    Raises
    ------
    UnsupportedModelError
        The model is of no known family, or dense.
    """
    family_of(checkpoint.config)
    stacks = checkpoint.experts.values()
    if not stacks:
        raise UnsupportedModelError(f"{checkpoint.folder} is a dense model: it has no experts")
    return max(stack.count for stack in stacks)


def _settings(options: RunOptions, checkpoint: Checkpoint, device: torch.device) -> Settings:
    dtype = compute_dtype(options.compute_dtype, checkpoint, device)
    return settings_for(
        options,
        expert_layer(checkpoint, decodes=options.changes.get("dtype") == "bf16"),
        compute_dtype=str(dtype).removeprefix("torch."),
        device_kind=device.type,
    )


def expert_layer(checkpoint: Checkpoint, *, decodes: bool = False) -> ExpertLayer:
    """Return the experts of a layer as headers and config.json tell; the plan checks them.

    Parameters
    ----------
    checkpoint
        The source.
    decodes
        Whether quantized tensors are written as floats.

    Raises
    ------
    UnsupportedModelError
        The model is of no known family, or dense.
    """
    family, count = family_of(checkpoint.config), num_experts(checkpoint)
    stack = next(iter(checkpoint.experts.values()))
    text = text_config(checkpoint.config)
    numbers = {key: value for key, value in text.items() if type(value) is int}
    told = SimpleNamespace(**{**numbers, "topk_method": text.get("topk_method")})
    return ExpertLayer(
        count=count,
        inner=stack.inner,
        top_k=max((numbers[key] for key in TOP_K_KEYS if key in numbers), default=1),
        multiple=1 if decodes else max(m.stored.codec.multiple for m in stack.matrices),
        shared=max((numbers.get(key, 0) for key in family.shared_counts), default=0)
        * stack.inner,
        routing_groups=max(1, family.groups(told)),
    )


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
    if calibration is None:
        return job
    tokens, request, differs = job.tokens, None, None
    journal, workspace = job.journal, job.workspace
    if tokens is None:
        request = Request.of(calibration)
        if journal is not None and workspace is not None:
            tokens = stored(workspace.tokens, journal.fingerprint["calibration"])
            differs = changed(request, workspace.tokens)
    if tokens is None:
        report(Preparing(part="reading calibration text and making tokens"))
        source = job.plan.source
        tokens = read_tokens(
            calibration, source.folder, vocab_size=vocab_size_of(source.config)
        )
        trim()  # a tokenizer takes hundreds of megabytes, which no plan counts
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
    found = forecast(job.plan, device, committed=committed, gpu=job.gpu)
    return replace(job, forecast=replace(found, ranks=job.ranks[0]))
