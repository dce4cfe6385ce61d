"""The plan of a run as a table."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from ream_stream.units import format_count, format_seconds, format_size

from .console import facts, phases


def plan_table(
    known: Mapping[str, Any], asked: Mapping[str, Any], *, verbose: bool = False
) -> Table:
    """Return a plan as a table.

    Parameters
    ----------
    known
        What `plan_facts` tells.
    asked
        Values of the options.
    verbose
        Whether the parts of memory and disk are shown, and what the time is made of.
    """
    rows = [row for row in _rows(known, asked) if not known["observes"] or row[0] in _OBSERVED]
    if not verbose:
        rows = [row for row in rows if row[0] == _NOTE or not _is_part(row[0])]
    return facts(rows, title="Plan")


_NOTE = "  note"

_OBSERVED = frozenset({
    *("source", "model", "experts a layer", "statistics", _NOTE, "calibration"),
    *("blocks of experts", "run in", "memory", "device memory", "disk", "time", "  from"),
    *("reads", "writes", "products", "decodes"),
})  # fmt: skip
"""Rows of a plan that keeps statistics."""


def _is_part(name: str) -> bool:
    """Tell whether a row is a part of the one above it, or of the time."""
    return name.startswith("  ") or name in {"reads", "writes", "products", "decodes"}


def _rows(known: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, str]]:
    dense, mtp = known["layers"] - known["moe_layers"], known["mtp_layers"]
    source, output = known["source_bytes"], known["output_bytes"]
    free = known["disk_free_bytes"]
    return [
        *_headers_only(known),
        (
            "model",
            f"{known['family']}, {known['layers']} layers"
            + (f", {dense} of them dense" if dense else "")
            + (f", {mtp} for multi-token prediction" if mtp else "")
            + context(known["context_length"]),
        ),
        ("experts a layer", f"{_experts(known, asked)}, {_per_token(known)} a token"),
        *_by_statistics(known),
        *size_target(known),
        *((_NOTE, note) for note in known["notes"]),
        *_widths(known),
        ("parameters", _arrow(known["parameters"], parameters)),
        ("method", _method(known, asked)),
        (
            "weights",
            f"{format_size(source)} -> {format_size(output)} ({output / source:.1%}), "
            f"{_arrow(known['stored_as'], str)}",
        ),
        (BITS_ROW, _arrow(known["parameters"], sizes_at)),
        (
            "calibration",
            f"{known['calibration_sequences']} sequences of "
            f"{known['calibration_sequence_length']} tokens, "
            f"{known['batch_sequences']} at a time",
        ),
        *_blocks(known),
        (
            "run in",
            f"{known['settings']['compute_dtype']} on {known['device']}, "
            f"{known['threads']} threads",
        ),
        (
            "memory",
            f"{format_size(known['memory_bytes'])} of "
            f"{format_size(known['memory_budget_bytes'])} allowed",
        ),
        *_ranks(known),
        *_parts(known["memory_parts"]),
        *_device_memory(known),
        (
            "disk",
            f"{format_size(known['disk_bytes'])} at most"
            + (f", {format_size(free)} free" if free is not None else ""),
        ),
        *_parts(known["disk_parts"]),
        *_forecast(known["forecast"]),
    ]


BITS_ROW = "at 16, 8, 4 bits"
"""Head of what the weights take at these numbers of bits, scales not counted."""


def context(length: int | None) -> str:
    """Return the length of the context as the end of a list; nothing if it is unknown."""
    return "" if length is None else f", context {length} tokens"


def parameters(size: Mapping[str, Any]) -> str:
    """Return a model's parameters, and how many a token uses: ``30.5B, 3.35B active``."""
    active = "" if size["active"] is None else f", {format_count(size['active'])} active"
    return format_count(size["total"]) + active


def sizes_at(size: Mapping[str, Any]) -> str:
    """Return what the weights take at the bits of `BITS_ROW`."""
    return ", ".join(map(format_size, size["bytes_at_bits"].values()))


def _arrow(of: Mapping[str, Any], describe: Callable[[Any], str]) -> str:
    """Return a description before and after, once if they are the same."""
    before, after = describe(of["before"]), describe(of["after"])
    return before if before == after else f"{before} -> {after}"


def _parts(sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(f"  {name}", format_size(size)) for name, size in sizes.items() if size]


def _blocks(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row if a layer's experts are run in blocks."""
    blocks, resident = known["expert_blocks"], known["resident_experts"]
    if blocks == 1:
        return []
    size = -(-known["experts_before"] // blocks)
    kept = f", {resident} kept on the device" if resident else ""
    text = f"{blocks} of up to {size}, each run on all batches before the next"
    return [("blocks of experts", text + kept)]


def _ranks(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row if several processes divide the work."""
    count, here, batches = known["ranks"], known["ranks_here"], known["batches"]
    if count == 1:
        return []
    memory = format_size(known["machine_memory_bytes"])
    each = (
        f"{batches // count} to {-(-batches // count)}"
        if batches % count
        else f"{batches // count}"
    )
    return [
        (
            "ranks",
            f"{count}, of {each} batches each; {here} on this machine, which take {memory} "
            "together and read each layer once if the page cache holds it",
        )
    ]


def _device_memory(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return rows of a device's memory, if layers run on one."""
    parts, budget = known["device_memory_parts"], known["device_memory_budget_bytes"]
    if budget is None:
        return []
    told = f"{format_size(known['device_memory_bytes'])} of {format_size(budget)} allowed"
    if (gpu := known["gpu"]) is not None:
        shown = f"{gpu['name']}: {told}; times by {gpu['efficiency']:.0%} of the rates of its "
        text = f"data sheet ({gpu['source']}), reads and the processor's as here"
        return [("device memory", shown + text), *_parts(parts)]
    here = "" if known["device_is_here"] else ", which is not here: times are the processor's"
    return [("device memory", told + here), *_parts(parts)]


def _forecast(left: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return rows of what is left to do, and about how long it takes."""
    if left is None:
        return []
    rates, seconds = left["rates"], {k: v["seconds"] for k, v in left["phases"].items()}
    long = {name: time for name, time in seconds.items() if time > 0.01 * left["seconds"]}
    measured = "measured" if rates["read_measured"] else "assumed, not measured"
    return [
        (
            "reads",
            f"{format_size(left['read_bytes'])}, of which {format_size(left['cached_bytes'])} "
            "should still be in memory",
        ),
        ("writes", format_size(left["written_bytes"])),
        ("products", f"{left['flop']:.2g} operations"),
        *_coded(left, rates),
        ("time", f"about {format_seconds(left['seconds'])} ({phases(long)})"),
        (
            "  from",
            f"{rates['expert'] / 1e9:.0f} GFLOP/s of experts, {rates['product'] / 1e9:.0f} of "
            f"other products, {format_size(rates['read'])}/s of reads ({measured}; writes are "
            "assumed to be as fast)",
        ),
    ]


def _coded(left: Mapping[str, Any], rates: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row if quantized matrices are decoded."""
    if not rates["decode"]:
        return []
    text = f"{left['decoded_numbers']:.2g} numbers at {rates['decode'] / 1e9:.2f} G/s"
    if rates["encode"]:
        text += f"; encodes {left['encoded_numbers']:.2g} at {rates['encode'] / 1e9:.2f} G/s"
    return [("decodes", text)]


def _headers_only(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row if there is less of the source than a run needs."""
    cut, count = known["headers_only_files"], known["source_files"]
    if not cut:
        return []
    if known["is_remote"]:
        return [("source", "on the hub: its headers were read, compress fetches the rest")]
    text = f"{cut} of {count} files end before their tensors do, which compress needs"
    return [("source", f"headers only: {text}")]


def _experts(known: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    before, after, keep = known["experts_before"], known["experts_after"], asked.get("keep")
    text = str(before) if known["observes"] else f"{before} -> {after}"
    if keep is None:
        return text
    exact = keep * before * known["width_before"] / known["width_after"]
    rounded = "" if exact == after else f" is {float(exact):.4g}, rounded"
    return f"{text} ({float(100 * keep):g}%{rounded})"


def _by_statistics(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row on statistics that are kept, or that experts are chosen by."""
    if known["observes"]:
        kept = "second moments, " if known["settings"].get("moments") else ""
        text = f"{format_size(known['output_bytes'])}: sums by domain, {kept}a token sample"
        return [("statistics", text)]
    if known["statistics"] is None:
        return []
    weights = known["settings"].get("domain_weights", ())
    told = ", ".join(f"{name} {weight:g}" for name, weight in weights)
    return [("statistics", known["statistics"] + (f", weighted {told}" if told else ""))]


def size_target(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row on the size that experts were kept for, if one was given."""
    target = known["size_target"]
    return [] if target is None else [("size asked for", target["sentence"])]


def _per_token(known: Mapping[str, Any]) -> str:
    before, after = known["experts_per_token"], known["experts_per_token_after"]
    return str(before) if before == after else f"{before} -> {after}"


def _widths(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row if experts become narrower."""
    before, after = known["width_before"], known["width_after"]
    return [] if before == after else [("width of an expert", f"{before} -> {after}")]


def _method(known: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return what is done with experts, and why if ``--method auto`` chose it."""
    reason = known["method_reason"]
    why = f" (--method auto is {known['method']}: {reason})" if reason else ""
    return _parts_of_method(known["settings"], asked) + why


def _parts_of_method(settings: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    refit = (
        "" if settings["refit"] == "none" else f"; refit {settings['refit_experts']} that stay"
    )
    if settings["slices"] > 1:
        return (
            f"cut experts into {settings['slices']} slices, drop those that matter least{refit}"
        )
    if settings["slices"]:
        return f"drop the neurons and experts that matter least{refit}"
    if settings["grouping"] == "none":
        return f"drop experts of low {settings['saliency']}{refit}"
    size = ""
    if settings["grouping"] == "ream":
        chosen = " by default" if asked.get("group_size") is None else ""
        size = f", groups of {settings['group_size']} at most{chosen}"
    return f"merge by {settings['grouping']}, ranked by {settings['saliency']}{size}{refit}"
