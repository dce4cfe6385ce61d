"""What a run holds in memory, part by part, and the batch that fits a budget.

Parts that stay (weights, buffers, samples) are counted from shapes. What comes and goes
is the most that any phase has alive at once: from `footprint` where a layer runs, from
shapes where experts are compared, aligned and merged. docs/memory.md explains the words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .checkpoint.header import DTYPES
from .checkpoint.stacks import ExpertStack
from .errors import OverBudgetError
from .footprint import Footprints
from .memory import anonymous_bytes
from .method.alignment import ALIGNMENTS
from .observe import SAMPLE_ROWS
from .refit_budget import KEPT, RefitMemory, Solver, solvers
from .settings import Method, Settings
from .sizes import format_size

MAX_BATCH_TOKENS = 8192
"""Tokens that are run together at most: larger batches gain nothing measurable."""

LIBRARY_BYTES = 32_000_000
"""What libraries take once they are used: 4 MB at once, up to 20 MB for oneDNN's kernels."""

HEAP_SHARE = 1.2
"""What glibc's heap may hold on to, as a share of what comes and goes.

Measured on the 106M-parameter benchmark: 0.9 to 1.0. With a stated budget freed memory
goes back to the kernel at once, but for `SMALL_BLOCKS`; that costs a small model a third
of its speed (the kernel clears every page again) and a large one little.
"""

SMALL_BLOCKS = 24_000_000
"""What the heap holds on to of blocks under a megabyte, which never go back at once.

Measured on the 106M-parameter benchmark, whose blocks are of that size: 9 MB beyond the
rest of the plan with two threads, none with one.
"""

OUTPUTS = "attention outputs"
"""Name of the part that is taken only if there is room: with 0, attention runs twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much there is to run."""

    sequences: int
    """Calibration sequences."""

    length: int
    """Tokens of a sequence."""

    threads: int
    """Assignments matched side by side."""

    @property
    def tokens(self) -> int:
        """All tokens, padding included."""
        return self.sequences * self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class Allotment:
    """A batch and the memory that a run with it takes."""

    batch_sequences: int
    """Sequences of a batch."""

    parts: Mapping[str, int]
    """Bytes by part; the sum is the promised peak."""

    solver: Solver
    """How a refit is solved."""


def allot(
    footprints: Footprints, settings: Settings, size: Size, ram: int, *, steady: bool
) -> Allotment:
    """Choose the largest batch that the budget allows, and the fastest refit with it.

    Parameters
    ----------
    footprints
        Of the source.
    settings
        What was asked for.
    size
        How much is run.
    ram
        Budget of anonymous host memory, bytes.
    steady
        Whether freed memory goes back to the kernel at once.

    Raises
    ------
    OverBudgetError
        Not even one sequence at a time fits; the smallest budget that works is told.
    """
    fixed = _fixed(footprints, size)
    outputs = _output_bytes(footprints, settings, size)
    refits = settings.method.refit != "none"
    kept = _refit(footprints, settings).kept(size.tokens) if refits else 0

    def parts(batch: int, solver: Solver) -> dict[str, int]:
        phase, held, working = _work(footprints, settings, size, batch, solver)
        heap = SMALL_BLOCKS if steady else int(HEAP_SHARE * working)
        return {**fixed, **held, f"work: {phase}": working, "kept by the heap": heap}

    ways = list(solvers(_stack(footprints).hidden))
    if settings.method.refit == "none":
        ways = ways[:1]
    batch = max(1, min(size.sequences, MAX_BATCH_TOKENS // size.length))
    while True:
        for solver in ways:
            chosen = parts(batch, solver)
            if sum(chosen.values()) <= ram:
                break
        else:
            if batch == 1:
                raise OverBudgetError(_too_little(chosen, ram))
            batch = -(-batch // 2)
            continue
        break
    room = ram - sum(chosen.values())
    for name, nbytes in ((OUTPUTS, outputs), (KEPT, kept)):
        chosen[name] = nbytes if nbytes <= room else 0
        room -= chosen[name]
    return Allotment(batch_sequences=batch, parts=chosen, solver=solver)


def _fixed(footprints: Footprints, size: Size) -> dict[str, int]:
    """Return what stays for as long as a layer is worked on."""
    model = footprints.model
    entries, itemsize = model.checkpoint.entries, model.dtype.itemsize
    stack = _stack(footprints)
    converted = max(
        sum(
            math.prod(layer.shape(name, entries))
            for name in layer.dense_names()
            if name in layer.quantized or DTYPES[entries[name].dtype] != model.dtype
        )
        for layer in model.layers
    )
    return {
        "interpreter and libraries": anonymous_bytes() + LIBRARY_BYTES,
        "token ids": 3 * 8 * size.tokens,
        "dense weights of a layer": converted * itemsize,
        "buffers of one expert": 3 * stack.hidden * stack.inner * itemsize,
    }


def _held(footprints: Footprints, settings: Settings, size: Size) -> dict[str, dict[str, int]]:
    """Return what is kept from one phase to another until the shards are written."""
    model, method = footprints.model, settings.method
    stack = _stack(footprints)
    experts, itemsize = stack.count, model.dtype.itemsize
    tokens = min(method.similarity_tokens or size.tokens, size.tokens)
    sample = {"token sample": tokens * (stack.hidden * itemsize + 4 * experts)}
    compared = {**sample, "mean outputs": experts * stack.hidden * 8 + 3 * experts**2 * 8}
    return {"observe": sample, "compare": compared, "align": compared, "write": compared}


def _work(
    footprints: Footprints, settings: Settings, size: Size, batch: int, solver: Solver
) -> tuple[str, dict[str, int], int]:
    """Return the phase that has most alive at once, what is held in it, and its own bytes."""
    model, method = footprints.model, settings.method
    stack, itemsize = _stack(footprints), model.dtype.itemsize
    runs = [footprints.of(index, batch, size.length) for index in footprints.kinds()]
    # what a store is read into and written from is more, but then no layer runs
    entering = batch * size.length * stack.hidden * itemsize
    most = max(run.run for run in runs)
    observed = max(run.observe for run in runs) if settings.sequential else most
    phases = {"observe": observed + entering, "propagate": most + entering}
    held: dict[str, dict[str, int]] = {}
    if method.refit != "none":
        refit, tokens = _refit(footprints, settings), batch * size.length
        # the experts' outputs are added up, as they are when the layer runs to its end
        phases["observe"] = phases["propagate"] + refit.hearing(tokens)
        phases["refit"] = refit.solving(solver, tokens)
        held["refit"] = {"routing of all tokens": refit.routing(size.tokens)}
    if method.grouping != "none":
        phases["compare"] = _compare_bytes(stack, itemsize)
        phases["align"] = _align_bytes(method, stack, itemsize, size.threads)
        phases["write"] = _merge_bytes(stack)
        held |= _held(footprints, settings, size)
    phase = max(phases, key=lambda name: phases[name] + sum(held.get(name, {}).values()))
    return phase, held.get(phase, {}), phases[phase]


def _compare_bytes(stack: ExpertStack, itemsize: int) -> int:
    """Return what running an expert on a block of the sample takes, and its down in float32."""
    widened = 16 << 20  # `MeanActivations.add` works in blocks of this
    return SAMPLE_ROWS * 4 * stack.inner * itemsize + widened + stack.hidden * stack.inner * 4


def _align_bytes(method: Method, stack: ExpertStack, itemsize: int, threads: int) -> int:
    """Return what the cost of one pair takes while others are matched."""
    alignment, square = ALIGNMENTS[method.alignment], stack.inner**2
    if not (alignment.activations or alignment.weights):
        return 0
    # scipy makes a float64 copy of each float32 cost that it works on
    matching = threads * square * (4 + 8)
    rows = method.alignment_tokens
    # of two experts in float32, and of the one being run
    activations = rows * (2 * 4 + 4 * itemsize) * stack.inner + rows * stack.hidden * itemsize
    # a part of both experts in float32, and the costs
    weights = 2 * stack.hidden * stack.inner * 4 + 4 * square * 4
    return matching + activations + weights


def _merge_bytes(stack: ExpertStack) -> int:
    """Return what merging takes: a float32 sum, a member, its widened part, a result."""
    # what is quantized is decoded to float32
    itemsize = DTYPES[stack.dtype].itemsize if stack.scheme == "plain" else 4
    matrix = stack.hidden * stack.inner
    return 3 * matrix * 4 + 2 * 3 * matrix * itemsize + 2 * matrix * 4


def _output_bytes(footprints: Footprints, settings: Settings, size: Size) -> int:
    """Return what keeping the mixers' outputs of all tokens takes."""
    if not settings.sequential and settings.method.refit == "none":
        return 0
    model = footprints.model
    mixers = max(len(model.mixers(layer.index)) for layer in model.layers if layer.stack)
    return mixers * size.tokens * _stack(footprints).hidden * model.dtype.itemsize


def _refit(footprints: Footprints, settings: Settings) -> RefitMemory:
    return RefitMemory(
        settings=settings,
        stack=_stack(footprints),
        top_k=footprints.model.top_k,
        itemsize=footprints.model.dtype.itemsize,
    )


def _stack(footprints: Footprints) -> ExpertStack:
    return next(layer.stack for layer in footprints.model.layers if layer.stack)


def _too_little(parts: Mapping[str, int], ram: int) -> str:
    minimum = sum(parts.values())
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    told = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in largest)
    return (
        f"the run needs {format_size(minimum)} of memory with one sequence at a time, the "
        f"budget is {format_size(ram)}; the largest parts are {told}. Give --ram {minimum} "
        "or more, or shorter sequences (--sequence-length), or fewer --similarity-tokens"
    )
