"""What the verbs print for people, and the same facts for machines."""

import errno
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

import click
from rich.console import Console
from rich.table import Table

from ream_stream.compression.config import RunOptions
from ream_stream.compression.job import Job
from ream_stream.device import is_here
from ream_stream.files import free_bytes
from ream_stream.planning.cost import Work
from ream_stream.planning.plan import Plan
from ream_stream.planning.serving_limits import serving_notes
from ream_stream.planning.throughput import Forecast
from ream_stream.units import format_size


def console(*, stderr: bool) -> Console:
    """Return a console that prints text as it is: paths may hold brackets and colons."""
    # what is asked for goes to stdout and ends with its reader; a run goes on without one
    file: Any = _Lasting(sys.stderr) if stderr else None
    return Console(file=file, stderr=stderr, markup=False, emoji=False, highlight=False)


class _Lasting:
    """A stream that goes silent once its reader is gone: a run outlives its terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._gone = stream, False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, if anyone reads."""
        self._lasting(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if anyone reads."""
        self._lasting(self._stream.flush)

    def _lasting(self, act: Callable[[], object]) -> None:
        try:
            if not self._gone:
                act()
        except OSError as error:
            if error.errno not in {errno.EPIPE, errno.EIO}:
                raise
            self._gone = True


def print_json(value: object) -> None:
    """Print one JSON object to stdout."""
    click.echo(json.dumps(value, indent=2))


def facts(rows: Iterable[tuple[str, str]], *, title: str | None = None) -> Table:
    """Return a table of names and values, one a line."""
    table = Table(
        show_header=False, box=None, title=title, title_justify="left", pad_edge=False
    )
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def columns(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def format_seconds(seconds: float) -> str:
    """Return a duration in the units that matter: ``41 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plan_facts(job: Job) -> dict[str, Any]:
    """Return all that is known before the run."""
    plan = job.plan
    output = job.workspace.output if job.workspace else None
    return {
        "source": str(plan.source.folder),
        "headers_only_files": len(plan.source.cut_files()),
        "output": str(output) if output else None,
        "family": plan.config["model_type"],
        "layers": len(plan.layers),
        "moe_layers": len(plan.moe_layers),
        "experts_before": plan.num_experts,
        "experts_after": plan.settings.experts,
        "experts_per_token": plan.top_k,
        "notes": notes_of(plan),
        "settings": plan.settings.fields(),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "calibration_sequences": plan.sequences,
        "calibration_sequence_length": plan.sequence_length,
        "batch_sequences": plan.schedule.batch_sequences,
        "memory_bytes": plan.memory_bytes,
        "memory_parts": dict(plan.memory),
        "memory_budget_bytes": plan.budgets.ram,
        "expert_blocks": plan.schedule.expert_blocks,
        "resident_experts": plan.schedule.resident_experts,
        "device_memory_bytes": sum(plan.device_memory.values()),
        "device_memory_parts": dict(plan.device_memory),
        "device_memory_budget_bytes": plan.budgets.vram,
        "disk_bytes": plan.disk_bytes,
        "disk_parts": plan.disk,
        "disk_free_bytes": free_bytes(output) if output else None,
        "device": str(job.device),
        "threads": plan.schedule.threads,
        "committed_layers": len(job.journal.layers) if job.journal else 0,
        "forecast": None if job.forecast is None else forecast_facts(job.forecast),
    }


def notes_of(plan: Plan) -> list[str]:
    """Return what a server may make of the new number of experts, if it is a new one."""
    experts = plan.settings.experts
    return [] if experts == plan.num_experts else serving_notes(experts)


def forecast_facts(forecast: Forecast) -> dict[str, Any]:
    """Return what is left to do, by phase and in all, and the rates behind the times."""
    seconds = forecast.seconds

    def described(work: Work, time: float) -> dict[str, Any]:
        return {
            "read_bytes": work.read_bytes,
            "cached_bytes": work.cached_bytes,
            "written_bytes": work.written_bytes,
            "flop": work.flop,
            "decoded_numbers": work.decoded_numbers,
            "encoded_numbers": work.encoded_numbers,
            "seconds": time,
        }

    return {
        **described(forecast.total, sum(seconds.values())),
        "phases": {name: described(w, seconds[name]) for name, w in forecast.work.items()},
        "rates": asdict(forecast.rates),
    }


def plan_table(job: Job, options: RunOptions) -> Table:
    """Return the plan as a table."""
    plan, known = job.plan, plan_facts(job)
    dense = len(plan.layers) - len(plan.moe_layers)
    mtp = sum(layer.keys.is_mtp for layer in plan.layers)
    budget = f"{format_size(plan.memory_bytes)} of {format_size(plan.budgets.ram)} allowed"
    free = known["disk_free_bytes"]
    return facts(
        [
            *_headers_only(job),
            ("family", known["family"]),
            (
                "layers",
                f"{len(plan.layers)}"
                + (f", {dense} of them dense" if dense else "")
                + (f", {mtp} for multi-token prediction" if mtp else ""),
            ),
            ("experts a layer", _experts(job, options)),
            *(("  note", note) for note in known["notes"]),
            ("experts a token", str(plan.top_k)),
            ("method", _method(job, options)),
            (
                "weights",
                f"{format_size(plan.source_bytes)} -> {format_size(plan.output_bytes)} "
                f"({plan.output_bytes / plan.source_bytes:.1%})",
            ),
            (
                "calibration",
                f"{plan.sequences} sequences of {plan.sequence_length} tokens, "
                f"{plan.schedule.batch_sequences} at a time",
            ),
            *_blocks(plan),
            (
                "run in",
                f"{plan.settings.compute_dtype} on {job.device}, "
                f"{plan.schedule.threads} threads",
            ),
            ("memory", budget),
            *_parts(plan.memory),
            *_device_memory(job),
            (
                "disk",
                f"{format_size(plan.disk_bytes)} at most"
                + (f", {format_size(free)} free" if free is not None else ""),
            ),
            *_parts(plan.disk),
            *_forecast(job.forecast),
        ],
        title="Plan",
    )


def _parts(sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(f"  {name}", format_size(size)) for name, size in sizes.items() if size]


def _blocks(plan: Plan) -> list[tuple[str, str]]:
    """Return a row if a layer's experts are run in blocks."""
    blocks, resident = plan.schedule.expert_blocks, plan.schedule.resident_experts
    if blocks == 1:
        return []
    size = -(-plan.num_experts // blocks)
    kept = f", {resident} kept on the device" if resident else ""
    text = f"{blocks} of up to {size}, each run on all batches before the next"
    return [("blocks of experts", text + kept)]


def _device_memory(job: Job) -> list[tuple[str, str]]:
    """Return rows of a device's memory, if layers run on one."""
    parts, budget = job.plan.device_memory, job.plan.budgets.vram
    if budget is None:
        return []
    told = f"{format_size(sum(parts.values()))} of {format_size(budget)} allowed"
    here = "" if is_here(job.device) else ", which is not here: times are the processor's"
    return [("device memory", told + here), *_parts(parts)]


def _forecast(forecast: Forecast | None) -> list[tuple[str, str]]:
    """Return rows of what is left to do, and about how long it takes."""
    if forecast is None:
        return []
    work, rates, seconds = forecast.total, forecast.rates, forecast.seconds
    long = {name: time for name, time in seconds.items() if time > 0.01 * sum(seconds.values())}
    measured = "measured" if rates.read_measured else "assumed, not measured"
    return [
        (
            "reads",
            f"{format_size(work.read_bytes)}, of which {format_size(work.cached_bytes)} should "
            "still be in memory",
        ),
        ("writes", format_size(work.written_bytes)),
        ("products", f"{work.flop:.2g} operations"),
        *_coded(forecast),
        ("time", f"about {format_seconds(sum(seconds.values()))} ({phases(long)})"),
        (
            "  from",
            f"{rates.expert / 1e9:.0f} GFLOP/s of experts, {rates.product / 1e9:.0f} of other "
            f"products, {format_size(rates.read)}/s of reads ({measured}; writes are assumed "
            "to be as fast)",
        ),
    ]


def _coded(forecast: Forecast) -> list[tuple[str, str]]:
    """Return a row if quantized matrices are decoded."""
    work, rates = forecast.total, forecast.rates
    if not rates.decode:
        return []
    text = f"{work.decoded_numbers:.2g} numbers at {rates.decode / 1e9:.2f} G/s"
    if rates.encode:
        text += f"; encodes {work.encoded_numbers:.2g} at {rates.encode / 1e9:.2f} G/s"
    return [("decodes", text)]


def _headers_only(job: Job) -> list[tuple[str, str]]:
    """Return a row if there is less of the source than a run needs."""
    source = job.plan.source
    cut = len(source.cut_files())
    if not cut:
        return []
    return [
        (
            "source",
            f"headers only: {cut} of {len(source.files())} files end before their tensors do, "
            "which compress needs",
        )
    ]


def _experts(job: Job, options: RunOptions) -> str:
    before, after = job.plan.num_experts, job.plan.settings.experts
    text = f"{before} -> {after}"
    if options.keep is None:
        return text
    exact = options.keep * before
    rounded = "" if exact == after else f" is {float(exact):g}, rounded down"
    return f"{text} ({float(100 * options.keep):g}%{rounded})"


def _method(job: Job, options: RunOptions) -> str:
    method = job.plan.settings.method
    refit = "" if method.refit == "none" else f"; refit {method.refit_experts} that stay"
    if method.grouping == "none":
        return f"drop experts of low {method.saliency}{refit}"
    size = ""
    if method.grouping == "ream":
        chosen = " by default" if "group_size" not in options.changes else ""
        size = f", groups of {method.group_size} at most{chosen}"
    return f"merge by {method.grouping}, ranked by {method.saliency}{size}{refit}"


def phases(seconds: Mapping[str, float]) -> str:
    """Return the time of each phase in one line."""
    return ", ".join(f"{name} {format_seconds(time)}" for name, time in seconds.items())
