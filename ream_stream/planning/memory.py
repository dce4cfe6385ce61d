"""Host and device memory of a run, part by part.

Parts that stay (weights, buffers, samples) are counted from shapes. Transient memory is
the most that any phase has alive at once: `activation_memory` measures it for a layer's
forward, other code states its own. docs/concepts/memory.md defines the terms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ream_stream.checkpoint.header import ITEM_BYTES, torch_dtype
from ream_stream.host_memory import anonymous_bytes
from ream_stream.method.alignment import ALIGNMENTS, aligning_bytes
from ream_stream.method.merging import merging_bytes
from ream_stream.method.similarity import MeanActivations
from ream_stream.method.slices import removal_bytes
from ream_stream.model.device import TransferLanes, locked_bytes
from ream_stream.model.tensor_map import LayerTensors
from ream_stream.settings import Settings

from .activation_memory import Footprint, Footprints
from .refit_memory import refit_memory
from .schedule import Solver

SAMPLE_ROWS = 2048
"""Sampled tokens that an expert processes at once when experts are compared."""

LIBRARY_BYTES = 32_000_000
"""Memory of libraries in use: 4 MB at the first use, up to 20 MB for oneDNN's kernels."""

HEAP_SHARE = 1.2
"""Memory that glibc's heap may retain, as a share of transient allocations.

Measured on the 106M-parameter benchmark: 0.9 to 1.0. A heap that is trimmed gives freed
memory back to the kernel at once, except `SMALL_BLOCKS`; that costs a small model a third of
its speed (the kernel clears every page again) and a large one little.
"""

SMALL_BLOCKS = 24_000_000
"""Memory that the heap retains in blocks under a megabyte; it never returns them at once.

Measured on the 106M-parameter benchmark, which has blocks of that size: 9 MB above the
rest of the plan with two threads, none with one.
"""

ON_THE_WAY = "experts on their way"
"""Memory part: buffers of `TransferLanes` in page-locked memory and on the device."""

SOLVE = "solve"
"""Phase of a refit on stored activations in which no experts are kept on the device."""

ALLOCATOR_SHARE = 0.2
"""Reserve for fragments in a device's allocator, as a share of transient allocations.

This is an allowance that was not measured.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Size of the calibration run."""

    sequences: int
    """Number of calibration sequences."""

    length: int
    """Tokens of a sequence."""

    threads: int
    """Number of assignments that are solved in parallel."""

    padded: bool
    """Whether sequences have padding; models then make masks."""

    domains: int = 1
    """Domains of the calibration set."""

    @property
    def tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.sequences * self.length


class MemoryModel:
    """Bytes of a run's memory by part.

    Parameters
    ----------
    footprints
        Footprints of the source's layers.
    settings
        Settings of the run.
    workload
        Size of the calibration run.
    on_device
        Whether layers run on a device with its own memory.
    """

    def __init__(
        self,
        footprints: Footprints,
        settings: Settings,
        workload: Workload,
        *,
        on_device: bool,
    ) -> None:
        self._footprints, self._settings, self.workload = footprints, settings, workload
        self._on_device = on_device
        model, tokens = footprints.model, workload.tokens
        entries, self._itemsize = model.checkpoint.entries, model.dtype.itemsize
        stacks = [layer.stack for layer in model.layers if layer.stack]
        self._stack = stack = stacks[0]
        self._refit = refit = refit_memory(settings, stack, model.top_k, self._itemsize)
        self.runs_layers = settings.runs_layers
        """Whether the calibration set is run through the layers."""
        self.refits = settings.refits(stack.count)
        """Whether experts are refitted."""
        # a device caches no activations
        ways = list(refit.solvers(tokens, remakes=on_device))
        self.solvers = ways if self.refits else ways[:1]
        """Possible solvers of the refit, the fastest first."""
        self.experts_left = settings.experts if self.refits else stack.count
        """Experts that stay, if they are refitted."""
        self.passes_again = settings.runs_layers and (settings.sequential or self.refits)
        """Whether the layer runs again after its observation."""
        self.kept_bytes = refit.kept(tokens) if self.refits else 0
        self.activation_bytes = refit.activations(tokens) if self.refits else 0
        self.input_bytes = refit.inputs(tokens) if self.refits else 0
        self.norm_bytes = 4 * tokens * model.top_k
        self.sum_bytes = 4 * tokens * stack.hidden
        self.output_bytes = workload.sequences * max(
            (each.outputs for each in self._runs(1)), default=0
        )
        self.experts = stack.count
        self.expert_bytes = 3 * stack.hidden * stack.inner * self._itemsize
        self.stored_bytes = max(sum(entries[n].nbytes for n in s.slots()) for s in stacks)
        """Stored bytes of all experts of a layer."""
        one = 4 * stack.inner**2 * (workload.domains if settings.observes else 1)
        self.gram_bytes = one if settings.sums_moments else 0
        """Bytes of the products of activations of one expert; 0 if none are needed."""
        self._held = self._held_by_phase()
        self._compared = self._compared_by_phase()

    def host(
        self, batch: int, solver: Solver, *, trims_heap: bool, stored: bool = False
    ) -> dict[str, int]:
        """Return the parts of host memory for a batch of so many sequences.

        With `stored` a refit stores activations block by block.
        """
        phases, held = dict(self._compared), self._held
        fixed = {
            "interpreter and libraries": anonymous_bytes() + LIBRARY_BYTES,
            "token ids": 3 * 8 * self.workload.tokens,
            "dense weights of a layer": self._dense_bytes(only_copied=True),
            "buffers of one expert": self.expert_bytes,
        }
        if self._on_device:
            # hidden states of four batches: the one in use, the next two, and the last
            moving = 4 * locked_bytes(self._entering_bytes(batch))
            if self.runs_layers:
                phases |= {"observe": moving, "propagate": moving}
            held = {}
            fixed[ON_THE_WAY] = TransferLanes.host_bytes(TransferLanes.room(self._stack.sizes))
        else:
            phases |= self._layer_by_phase(batch, solver, stored=stored)
        parts, working = _largest(phases, held)
        heap = SMALL_BLOCKS if trims_heap else int(HEAP_SHARE * working)
        return {**fixed, **parts, "kept by the heap": heap}

    def device(
        self, batch: int, solver: Solver, resident: int, *, stored: bool = False
    ) -> dict[str, int]:
        """Return the parts of device memory with so many resident experts.

        With `stored` a refit stores activations block by block, and solves without experts.
        """
        phases = self._device_phases(batch, solver, stored=stored)
        kept = {"experts kept": resident * self.expert_bytes}
        held = {name: self._held.get(name, {}) | kept for name in phases if name != SOLVE}
        parts, working = _largest(phases, held, 1 + ALLOCATOR_SHARE)
        return self._fixed_on_device() | {
            **parts,
            "left for fragments": int(ALLOCATOR_SHARE * working),
        }

    def resident_room(self, vram: int, batch: int, solver: Solver, *, stored: bool) -> int:
        """Return how many experts the device can keep."""
        phases = self._device_phases(batch, solver, stored=stored)
        phases.pop(SOLVE, None)
        parts, working = _largest(phases, self._held, 1 + ALLOCATOR_SHARE)
        taken = sum(self._fixed_on_device().values()) + sum(parts.values())
        return (vram - taken - int(ALLOCATOR_SHARE * working)) // self.expert_bytes

    def _device_phases(self, batch: int, solver: Solver, *, stored: bool) -> dict[str, int]:
        """Return the transient bytes of each phase on the device."""
        phases = self._layer_by_phase(batch, solver, stored=stored) | self._compared
        phases.pop("write", None)
        return phases

    def _fixed_on_device(self) -> dict[str, int]:
        """Return the parts of device memory that are there in all phases."""
        return {
            "dense weights of a layer": self._dense_bytes(),
            "buffers of one expert": self.expert_bytes,
            ON_THE_WAY: self.expert_bytes + TransferLanes.room(self._stack.sizes),
        }

    def _entering_bytes(self, batch: int) -> int:
        """Return the bytes of the hidden states of a batch."""
        width = self._footprints.model.hidden_size
        return batch * self.workload.length * width * self._itemsize

    def _runs(self, batch: int) -> list[Footprint]:
        """Return the footprint of each kind of layer; none if layers are not run."""
        if not self._settings.runs_layers:
            return []
        size, footprints = self.workload, self._footprints
        return [
            footprints.of(index, batch, size.length, padded=size.padded)
            for index in footprints.kinds()
        ]

    def _dense_bytes(self, *, only_copied: bool = False) -> int:
        """Return the bytes of a layer's non-expert weights: all, or only those not mapped."""
        model = self._footprints.model
        entries = model.checkpoint.entries

        def numbers(layer: LayerTensors) -> int:
            return sum(
                math.prod(layer.shape(name, entries))
                for name in layer.dense_names()
                if not only_copied
                or name in layer.quantized
                or torch_dtype(entries[name].dtype) != model.dtype
            )

        return max(map(numbers, model.layers)) * self._itemsize

    def _held_by_phase(self) -> dict[str, dict[str, int]]:
        """Return the parts that are kept between phases until the shards are written."""
        held: dict[str, dict[str, int]] = {}
        stack, size = self._stack, self.workload
        if self.refits:
            routing = {"routing of all tokens": self._refit.routing(size.tokens)}
            held |= {"refit": routing, "propagate": routing}
        if self._settings.observes or self._settings.merges(stack.count):
            most = self._settings.method.similarity_tokens or size.tokens
            row = stack.hidden * self._itemsize + 4 * stack.count
            sample = {"token sample": min(most, size.tokens) * row}
            means = 8 * stack.count * (stack.hidden + 3 * stack.count)
            held["observe"] = sample
            if self._settings.observes:
                return {**held, "write": sample}
            compared = {**sample, "mean outputs": means}
            held |= dict.fromkeys(("compare", "align", "write"), compared)
        return held

    def _compared_by_phase(self) -> dict[str, int]:
        """Return the transient bytes of comparing, aligning, merging or cutting experts."""
        stack, method, itemsize = self._stack, self._settings.method, self._itemsize
        hidden, inner = stack.hidden, stack.inner
        if self._settings.observes:  # a shorter sample is filled up
            return {"write": sum(self._held["write"].values())}
        if self._settings.cuts:
            removal = removal_bytes(inner, hidden)
            if not self._settings.runs_layers:  # a domain's moments, weighed and added
                removal += 2 * 4 * inner**2
            return {"cut": self.workload.threads * removal, "write": removal}
        if not self._settings.merges(stack.count):
            return {}
        # the forward of an expert, and its down projection in float32
        compare = SAMPLE_ROWS * 4 * inner * itemsize + hidden * inner * 4
        alignment, rows = ALIGNMENTS[method.alignment], method.alignment_tokens
        align = 0
        if alignment.compares:
            run = rows * (4 * inner + hidden) * itemsize
            align = run + aligning_bytes(rows, hidden, inner, self.workload.threads)
        # quantized matrices are decoded to float32
        stored = ITEM_BYTES[stack.dtype] if stack.scheme == "plain" else 4
        return {
            "compare": compare + MeanActivations.WIDENED_BYTES,
            "align": align,
            "write": merging_bytes(hidden * inner, stored),
        }

    def _layer_by_phase(self, batch: int, solver: Solver, *, stored: bool) -> dict[str, int]:
        """Return the transient bytes of a layer's forward and of its refit."""
        if not self._settings.runs_layers:
            return {}
        runs, tokens = self._runs(batch), batch * self.workload.length
        # states that enter; on the host, of several batches, also the next and the last output
        states = self._entering_bytes(batch)
        alone = self._on_device or batch >= self.workload.sequences
        entering, behind = (states, 0) if alone else (2 * states, states)
        whole = max(run.run for run in runs) + entering + behind
        before = max(run.observe for run in runs) + entering
        if not self.refits:
            return {
                "observe": before if self._settings.sequential else whole,
                "propagate": whole,
            }
        refit, tracks = self._refit, self._settings.tracks_original(self._stack.count)
        phases = {
            # the experts' outputs are summed, as in a run of the whole layer
            "observe": whole + refit.inputs(tokens),
            "propagate": max(whole, before + behind + refit.replaying(tokens, solver)),
        }
        if not stored:
            most = max(refit.summing(tokens, solver, before), refit.solving(tokens, solver))
            return phases | {"refit": most}
        # stored activations need no more of the layer, unless its end is the target
        most = max(
            refit.collecting(tokens, solver, before),
            refit.summing(tokens, solver, before if tracks else 0),
        )
        return phases | {"refit": most, SOLVE: refit.solving(tokens, solver)}


def _largest(
    phases: Mapping[str, int], held: Mapping[str, dict[str, int]], factor: float = 1.0
) -> tuple[dict[str, int], int]:
    """Return the parts of the phase with the highest peak, and its transient bytes.

    The transient bytes of each phase take `factor` of themselves.
    """
    phases = phases or {"write": 0}  # nothing but bytes is copied
    phase = max(
        phases, key=lambda name: factor * phases[name] + sum(held.get(name, {}).values())
    )
    return {**held.get(phase, {}), f"work: {phase}": phases[phase]}, phases[phase]
