"""How many numbers of quantized matrices a layer's phases decode and encode.

Arithmetic on a plan. An expert that is not kept on the device is decoded for each batch
that it is run on.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ream_stream.checkpoint.expert_stack import ExpertMatrix, ExpertStack
from ream_stream.method.alignment import ALIGNMENTS
from ream_stream.model.expert_blocks import cut_experts

from .plan import LayerPlan, Plan


class Coded(NamedTuple):
    """Numbers that pass through codecs."""

    decoded: int = 0
    """From codes to floats."""

    encoded: int = 0
    """From floats to codes."""


def coding_of(plan: Plan, layer: LayerPlan) -> Mapping[str, Coded]:
    """Return what a layer's phases decode and encode; those that do neither are left out."""
    source, output = layer.keys.stack, layer.stack
    dense = sum(s.rows * s.cols * (s.count or 1) for s in layer.keys.quantized.values())
    is_last = layer.keys.index == len(plan.layers) - 1
    writes_floats = plan.settings.decodes
    if source is None or output is None:
        found = {
            "write": Coded(decoded=dense * writes_floats),
            "propagate": Coded(decoded=dense * (not is_last)),
            "follow": Coded(decoded=dense * (plan.follows and not is_last)),
        }
    else:
        left = 0 if writes_floats else dense
        again = plan.settings.sequential and not is_last
        after = left + _numbers(output) * loads(plan, output.count)
        seen = dense + _numbers(source) * loads(plan, source.count)
        found = {
            "observe": Coded(decoded=seen),
            "follow": Coded(decoded=seen * plan.follows),
            "compare": Coded(decoded=_numbers(source) * source.count * _merges(plan)),
            "align": Coded(decoded=_numbers(source) * _aligned(plan)),
            "write": _written(plan, source, output, dense - left),
            "refit": _refitted(plan, output, left) if plan.refits else Coded(),
            "propagate": Coded(decoded=after * again),
        }
    return {phase: coded for phase, coded in found.items() if any(coded)}


def _is_coded(matrix: ExpertMatrix) -> bool:
    return matrix.stored.codec.scheme != "plain"


def _numbers(stack: ExpertStack) -> int:
    """Return the numbers of an expert's matrices that are quantized."""
    return sum(m.stored.rows * m.stored.cols for m in stack.matrices if _is_coded(m))


def loads(plan: Plan, experts: int) -> int:
    """Return how often an expert is loaded in the passes of all batches."""
    kept = [
        min(plan.schedule.resident_experts, len(block))
        for block in cut_experts(experts, plan.schedule.expert_blocks)
    ]
    return sum(kept) + (experts - sum(kept)) * plan.num_batches


def _merges(plan: Plan) -> bool:
    return plan.settings.method.grouping != "none" and plan.settings.experts < plan.num_experts


def merged_experts(plan: Plan) -> int:
    """Return the experts in groups of two or more, if groups are small."""
    return min(plan.num_experts, 2 * (plan.num_experts - plan.settings.experts))


def _aligned(plan: Plan) -> int:
    """Return how many experts are decoded to be aligned: to be run, and to be compared."""
    alignment = ALIGNMENTS[plan.settings.method.alignment]
    if not _merges(plan) or not (alignment.activations or alignment.weights):
        return 0
    return merged_experts(plan) * (1 + alignment.activations)


def _written(plan: Plan, source: ExpertStack, output: ExpertStack, dense: int) -> Coded:
    merged = merged_experts(plan) if _merges(plan) else 0
    made = min(output.count, plan.num_experts - output.count) if merged else 0
    decoded = encoded = 0
    for old, new in zip(source.matrices, output.matrices, strict=True):
        numbers = old.stored.rows * old.stored.cols
        # codes and scales that hold all experts are written apart, and merged for each
        times = 1 if new.numbered else len(new.tensors)
        if _is_coded(new):
            encoded += numbers * made * times
            decoded += numbers * merged * times
        elif _is_coded(old):
            alone = 0 if merged == plan.num_experts else output.count - made
            decoded += numbers * (merged + alone) * times
    return Coded(decoded=decoded + dense, encoded=encoded)


def _refitted(plan: Plan, output: ExpertStack, dense: int) -> Coded:
    """Count passes over the layer, and what its down projections become once stored."""
    passes = 1 + plan.refit_repeats
    run = _numbers(output) * (loads(plan, output.count) * passes + output.count)
    downs = [m.stored for m in output.matrices if m.parts == ("down",) and _is_coded(m)]
    down = output.count * sum(stored.rows * stored.cols for stored in downs)
    # to be judged, and once for each tensor that is written
    times = 1 + sum(len(s.codec.parts(s.rows, s.cols)) for s in downs)
    return Coded(decoded=int(dense + run) + down, encoded=down * times)
