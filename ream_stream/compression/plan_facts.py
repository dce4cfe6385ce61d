"""All that is known before a run, as plain data."""

from dataclasses import asdict
from typing import Any

from ream_stream.calibration.mix import BUILTIN
from ream_stream.calibration.tokens import Tokens
from ream_stream.file_access import free_bytes
from ream_stream.model import device as devices
from ream_stream.planning.gpus import EFFICIENCY, Gpu
from ream_stream.planning.model_size import context_length, model_size, stored_as
from ream_stream.planning.phase_cost import Cost
from ream_stream.planning.plan import Plan
from ream_stream.planning.serving_rules import served, serving_notes
from ream_stream.planning.throughput import Forecast

from .job import Job


def plan_facts(job: Job) -> dict[str, Any]:
    """Return all that is known before a run, as plain data."""
    plan = job.plan
    output = job.workspace.output if job.workspace else None
    return {
        "source": str(plan.source.folder),
        "source_files": len(plan.source.files()),
        "headers_only_files": len(plan.source.cut_files()),
        "is_remote": plan.source.fetch is not None,
        "output": str(output) if output else None,
        "family": plan.config["model_type"],
        "layers": len(plan.layers),
        "moe_layers": len(plan.moe_layers),
        "mtp_layers": sum(layer.keys.is_mtp for layer in plan.layers),
        "experts_before": plan.num_experts,
        "experts_after": plan.settings.experts,
        "experts_per_token": plan.top_k,
        "experts_per_token_after": plan.output_top_k,
        "width_before": plan.experts[0].inner,
        "width_after": plan.experts[1].inner,
        "notes": [
            *notes_of(plan),
            *([job.unused_gpu] if job.unused_gpu else []),
            *_thin(job.tokens),
            *_built_in(job.tokens),
            *_by_statistics(job),
            *_slow_ranks(job),
        ],
        "settings": plan.settings.fields(),
        "observes": plan.settings.observes,
        "statistics": None if job.statistics is None else str(job.statistics.folder),
        "size_target": None if job.target is None else job.target.facts(plan),
        "method": job.method,
        "method_reason": job.reason,
        "parameters": {
            "before": model_size(plan.source).facts(),
            "after": model_size(plan.output_model.checkpoint).facts(),
        },
        "context_length": context_length(plan.source.config),
        "stored_as": {
            "before": stored_as(plan.source),
            "after": stored_as(plan.output_model.checkpoint),
        },
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "calibration_sequences": plan.sequences,
        "calibration_sequence_length": plan.sequence_length,
        "batch_sequences": plan.schedule.batch_sequences,
        **_machine_facts(plan),
        **_rank_facts(job),
        "disk_free_bytes": free_bytes(output) if output else None,
        "device": str(job.device),
        "device_is_here": devices.is_here(job.device),
        "gpu": _gpu_facts(job.gpu),
        "threads": plan.schedule.threads,
        "begun": job.workspace is not None and job.workspace.has_journal(),
        "complete": job.workspace is not None and job.workspace.is_complete(),
        "committed_layers": len(job.journal.layers) if job.journal else 0,
        "forecast": None if job.forecast is None else forecast_facts(job.forecast),
    }


def _machine_facts(plan: Plan) -> dict[str, Any]:
    """Return what a run takes of the machine, in bytes, and how layers are cut for it."""
    return {
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
    }


def _rank_facts(job: Job) -> dict[str, Any]:
    """Return the processes of a run, and what those of this machine take together."""
    size, here = job.ranks
    return {
        "ranks": size,
        "ranks_here": here,
        "machine_memory_bytes": here * job.plan.memory_bytes,
        "batches": job.plan.num_batches,
    }


def _gpu_facts(gpu: Gpu | None) -> dict[str, Any] | None:
    return None if gpu is None else {**asdict(gpu), "efficiency": EFFICIENCY}


def _slow_ranks(job: Job) -> list[str]:
    """Return a note if ranks on GPUs carry sums that take longer than what they divide."""
    plan, several = job.plan, job.ranks[0] > 1
    if not several or job.device.type == "cpu" or not (plan.refits or plan.settings.cuts):
        return []
    return [
        "ranks carry the sums of a refit or of slices through host memory, once a batch: on "
        "GPUs one rank may be faster; --method reap and ream carry next to nothing"
    ]


FEW_TOKENS = 65_536
"""Calibration tokens below which the built-in checkpoint lost more: docs/concepts/method.md."""


def _thin(tokens: Tokens | None) -> list[str]:
    """Return a note on a calibration set that is small."""
    if tokens is None or tokens.num_tokens >= FEW_TOKENS:
        return []
    return [
        f"{tokens.num_tokens} calibration tokens are few: with fewer than {FEW_TOKENS}, and of "
        "few documents, more is lost; give more text, of what the model is for"
    ]


def _built_in(tokens: Tokens | None) -> list[str]:
    """Return a note on built-in texts."""
    if tokens is None or BUILTIN not in tokens.description:
        return []
    return [
        "the built-in texts are for trying things out only: help pages and modules of Python, "
        "and generated exercises; calibrate on text of what the model is for"
    ]


def _by_statistics(job: Job) -> list[str]:
    """Return a note on what statistics of an earlier run cannot do."""
    if job.statistics is None:
        return []
    return [
        "experts are chosen by statistics of the original model: layers are not adjusted to "
        "those before them, and nothing is refitted, which loses more than a run over the text"
    ]


def notes_of(plan: Plan) -> list[str]:
    """Return the plan's, and what servers make of new numbers of experts and widths."""
    before, after = plan.experts
    source = served(before, plan.top_k, plan.routing_groups)
    return [
        *plan.notes,
        *serving_notes(served(after, plan.output_top_k, plan.routing_groups), source),
    ]


def forecast_facts(forecast: Forecast) -> dict[str, Any]:
    """Return the remaining work, by phase and in all, and the rates behind the times."""
    seconds = forecast.seconds

    def described(cost: Cost, time: float) -> dict[str, Any]:
        return {
            "read_bytes": cost.read_bytes,
            "cached_bytes": cost.cached_bytes,
            "written_bytes": cost.written_bytes,
            "flop": cost.flop,
            "decoded_numbers": cost.decoded_numbers,
            "encoded_numbers": cost.encoded_numbers,
            "seconds": time,
        }

    return {
        **described(forecast.total, sum(seconds.values())),
        "phases": {name: described(c, seconds[name]) for name, c in forecast.costs.items()},
        "rates": asdict(forecast.throughput),
    }
