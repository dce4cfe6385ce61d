"""What a run holds in memory, part by part, in the host's and in a device's.

Parts that stay (weights, buffers, samples) are counted from shapes. What comes and goes
is the most that any phase has alive at once: from `footprint` where a layer runs, from
shapes where experts are compared, aligned and merged. docs/concepts/memory.md has the words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.header import DTYPES
from ream_stream.device import Lanes
from ream_stream.host_memory import anonymous_bytes
from ream_stream.method.alignment import ALIGNMENTS
from ream_stream.settings import Method, Settings

from .activation_memory import Footprints
from .refit_memory import RefitMemory
from .schedule import Solver

SAMPLE_ROWS = 2048
"""Sampled tokens that are run through an expert at once, where experts are compared."""

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

ON_THE_WAY = "experts on their way"
"""Name of a part: what `device.Lanes` needs in page-locked memory, and on the device."""

ALLOCATOR_SHARE = 0.2
"""What a device's allocator is left for fragments, as a share of what comes and goes.

An allowance: it was not measured.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much there is to run."""

    sequences: int
    """Calibration sequences."""

    length: int
    """Tokens of a sequence."""

    threads: int
    """Assignments matched side by side."""

    top_k: int
    """Experts a token is sent to."""

    padded: bool
    """Whether there is padding, for which models make masks."""

    @property
    def tokens(self) -> int:
        """All tokens, padding included."""
        return self.sequences * self.length


class Parts:
    """Bytes of a run's memory by part.

    Parameters
    ----------
    footprints
        Of the source.
    settings
        What was asked for.
    size
        How much is run.
    on_device
        Whether layers run on a device with memory of its own.
    """

    def __init__(
        self, footprints: Footprints, settings: Settings, size: Size, *, on_device: bool
    ) -> None:
        self._footprints, self._settings, self._size = footprints, settings, size
        self._on_device = on_device
        self._stack = _stack(footprints)
        self.refits = settings.refits(self._stack.count)
        """Whether experts are refitted."""
        refit = _refit(footprints, settings)
        # a device keeps no activations
        ways = list(refit.solvers(size.tokens, remakes=on_device))
        self.solvers = ways if self.refits else ways[:1]
        """The ways to do so, the fastest first."""
        self.kept_bytes = refit.kept(size.tokens) if self.refits else 0
        self.activation_bytes = refit.activations(size.tokens) if self.refits else 0
        self.input_bytes = refit.inputs(size.tokens) if self.refits else 0
        self.passes_again = settings.sequential or self.refits
        """Whether the layer is run again after it was observed."""
        self.experts = self._stack.count
        self.stored_bytes = _stored_bytes(footprints)
        self.expert_bytes = _expert_bytes(footprints)
        self.norm_bytes = 4 * size.tokens * size.top_k
        self.sum_bytes = 4 * size.tokens * self._stack.hidden
        self.output_bytes = size.sequences * max(
            footprints.of(index, 1, size.length, padded=size.padded).outputs
            for index in footprints.kinds()
        )

    def host(self, batch: int, solver: Solver, *, trims_heap: bool) -> dict[str, int]:
        """Return the parts of host memory with so many sequences in a batch."""
        phases = _compared_work(self._footprints, self._settings, self._size)
        held = _held(self._footprints, self._settings, self._size)
        fixed = _fixed(self._footprints, self._size)
        if self._on_device:
            # states on their way between the device and a store
            moving = 3 * batch * self._size.length * self._stack.hidden * 4
            phases |= {"observe": moving, "propagate": moving}
            held = {}
            fixed[ON_THE_WAY] = Lanes.host_bytes(Lanes.room(self._stack.sizes))
        else:
            phases |= _layer_work(self._footprints, self._settings, self._size, batch, solver)
        phase, held_then, working = _largest(phases, held)
        heap = SMALL_BLOCKS if trims_heap else int(HEAP_SHARE * working)
        return {**fixed, **held_then, f"work: {phase}": working, "kept by the heap": heap}

    def device(self, batch: int, solver: Solver, resident: int) -> dict[str, int]:
        """Return the parts of a device's memory with so many experts kept on it."""
        model = self._footprints.model
        entries = model.checkpoint.entries
        layer = _layer_work(self._footprints, self._settings, self._size, batch, solver)
        compared = _compared_work(self._footprints, self._settings, self._size)
        compared.pop("write", None)
        held = _held(self._footprints, self._settings, self._size)
        phase, held_then, working = _largest(layer | compared, held)
        numbers = [
            sum(math.prod(layer.shape(name, entries)) for name in layer.dense_names())
            for layer in model.layers
        ]
        return {
            "dense weights of a layer": max(numbers) * model.dtype.itemsize,
            "buffers of one expert": self.expert_bytes,
            ON_THE_WAY: self.expert_bytes + Lanes.room(self._stack.sizes),
            "experts kept": resident * self.expert_bytes,
            **held_then,
            f"work: {phase}": working,
            "left for fragments": int(ALLOCATOR_SHARE * working),
        }


def _fixed(footprints: Footprints, size: Size) -> dict[str, int]:
    """Return what stays for as long as a layer is worked on."""
    model = footprints.model
    entries, itemsize = model.checkpoint.entries, model.dtype.itemsize
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
        "buffers of one expert": _expert_bytes(footprints),
    }


def _held(footprints: Footprints, settings: Settings, size: Size) -> dict[str, dict[str, int]]:
    """Return what is kept from one phase to another until the shards are written."""
    model, method = footprints.model, settings.method
    held: dict[str, dict[str, int]] = {}
    stack = _stack(footprints)
    if settings.refits(stack.count):
        routing = _refit(footprints, settings).routing(size.tokens)
        held |= {name: {"routing of all tokens": routing} for name in ("refit", "propagate")}
    if method.grouping == "none":
        return held
    experts, itemsize = stack.count, model.dtype.itemsize
    tokens = min(method.similarity_tokens or size.tokens, size.tokens)
    sample = {"token sample": tokens * (stack.hidden * itemsize + 4 * experts)}
    compared = {**sample, "mean outputs": experts * stack.hidden * 8 + 3 * experts**2 * 8}
    return held | {"observe": sample, "compare": compared, "align": compared, "write": compared}


def _layer_work(
    footprints: Footprints, settings: Settings, size: Size, batch: int, solver: Solver
) -> dict[str, int]:
    """Return what comes and goes where a layer is run, or refitted, by phase."""
    model, length = footprints.model, size.length
    runs = [
        footprints.of(index, batch, length, padded=size.padded) for index in footprints.kinds()
    ]
    # what a store is read into and written from is more, but then no layer runs
    entering = batch * length * model.hidden_size * model.dtype.itemsize
    most = max(run.run for run in runs)
    observed = max(run.observe for run in runs) if settings.sequential else most
    phases = {"observe": observed + entering, "propagate": most + entering}
    if settings.refits(_stack(footprints).count):
        refit, tokens = _refit(footprints, settings), batch * length
        # the experts' outputs are added up, as they are when the layer runs to its end
        phases["observe"] = phases["propagate"] + refit.hearing(tokens)
        before = max(run.observe for run in runs) + entering
        phases["refit"] = refit.solving(solver, tokens, before)
        phases["propagate"] = max(phases["propagate"], before + refit.answering(tokens, solver))
    return phases


def _compared_work(footprints: Footprints, settings: Settings, size: Size) -> dict[str, int]:
    """Return what comes and goes where experts are compared, aligned and merged."""
    method, stack = settings.method, _stack(footprints)
    itemsize = footprints.model.dtype.itemsize
    if method.grouping == "none":
        return {}
    return {
        "compare": _compare_bytes(stack, itemsize),
        "align": _align_bytes(method, stack, itemsize, size.threads),
        "write": _merge_bytes(stack),
    }


def _largest(
    phases: Mapping[str, int], held: Mapping[str, dict[str, int]]
) -> tuple[str, dict[str, int], int]:
    """Return the phase that has most alive at once, what is held in it, and its own bytes."""
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


def _stored_bytes(footprints: Footprints) -> int:
    """Return the bytes of all experts of a layer as they are on disk."""
    entries = footprints.model.checkpoint.entries
    stacks = [layer.stack for layer in footprints.model.layers if layer.stack]
    return max(sum(entries[name].nbytes for name in stack.slots()) for stack in stacks)


def _expert_bytes(footprints: Footprints) -> int:
    """Return the bytes of one expert as it is run."""
    stack = _stack(footprints)
    return 3 * stack.hidden * stack.inner * footprints.model.dtype.itemsize


def _refit(footprints: Footprints, settings: Settings) -> RefitMemory:
    return RefitMemory(
        settings=settings,
        stack=_stack(footprints),
        top_k=footprints.model.top_k,
        itemsize=footprints.model.dtype.itemsize,
    )


def _stack(footprints: Footprints) -> ExpertStack:
    return next(layer.stack for layer in footprints.model.layers if layer.stack)
