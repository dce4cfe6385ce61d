"""The plan of a run as a table."""

from collections.abc import Mapping

from rich.table import Table

from ream_stream.compression.config import RunOptions
from ream_stream.compression.job import Job, plan_facts
from ream_stream.device import is_here
from ream_stream.planning.plan import Plan
from ream_stream.planning.throughput import Forecast
from ream_stream.units import format_seconds, format_size

from .console import facts, phases


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
