"""Allocation of a machine to a run: batch size, blocks of experts, memory or disk.

The largest batch that the budgets allow is chosen first. Then, if all experts of a layer
are more than the page cache (or a device) can hold, they are cut into blocks. Tensors that
passes share are kept in memory if there is room, else on disk, else each pass computes
them. docs/concepts/memory.md defines the terms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ream_stream.errors import OverBudgetError
from ream_stream.units import format_size, size_option

from .memory import MemoryModel
from .plan import GRAMS, OUTPUTS, SUMS
from .refit_memory import ACTIVATIONS, KEPT
from .schedule import Budgets, Schedule, Solver

MAX_BATCH_TOKENS = 8192
"""Most tokens of a batch; larger batches gain nothing measurable."""

CACHE_SHARE = 0.5
"""Share of the page cache's memory that a block of experts may fill."""

NORMS = "norms of experts"
"""Memory part: output norms of every (token, expert) pair, kept between blocks of experts."""

CHUNKS = "chunks of scratch stores"
"""Memory part: buffers of stores that are kept on disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """A schedule, and the memory and disk that a run with it takes."""

    schedule: Schedule
    """Schedule of the run."""

    memory: Mapping[str, int]
    """Bytes of host memory by part; the sum is the planned peak."""

    device: Mapping[str, int]
    """Bytes of device memory by part; empty if layers run on the processor."""

    scratch: Mapping[str, int]
    """Bytes of scratch files on disk by part."""


def allocate(
    parts: MemoryModel,
    budgets: Budgets,
    *,
    scratch_bytes: int | None = None,
    begun: Schedule | None = None,
) -> Allocation:
    """Choose the largest batch that the budgets allow, and the rest of the schedule.

    Parameters
    ----------
    parts
        Memory of the run by part.
    budgets
        Limits on memory and disk.
    scratch_bytes
        Disk for tensors that passes share; None without a limit.
    begun
        Schedule that the run began with; None for a new run.

    Raises
    ------
    OverBudgetError
        One sequence at a time does not fit, or the batch that the run began with does
        not; the message states the smallest budget that works.
    """
    chooser = _Chooser(parts, budgets, scratch_bytes, begun)
    if begun is not None:
        return chooser.with_batch(begun.batch_sequences, begun.solver)
    size = parts.workload
    batch = max(1, min(size.sequences, MAX_BATCH_TOKENS // size.length))
    while True:
        for solver in parts.solvers:
            try:
                return chooser.with_batch(batch, solver)
            except OverBudgetError:
                if solver == parts.solvers[-1] and batch == 1:
                    raise
        batch = -(-batch // 2)


@dataclass(frozen=True, slots=True)
class _Chooser:
    """Allocates memory and disk for a batch, and checks the budgets."""

    parts: MemoryModel
    budgets: Budgets
    scratch_bytes: int | None
    begun: Schedule | None

    def with_batch(self, batch: int, solver: Solver) -> Allocation:
        """Return the allocation for a batch and a solver; refuse one over a budget."""
        parts, budgets, begun = self.parts, self.budgets, self.begun
        memory = parts.host(batch, solver, trims_heap=budgets.trims_heap)
        self._check(memory, "ram", budgets.ram)
        device: Mapping[str, int] = {}
        if budgets.vram is not None:
            device = parts.device(batch, solver, 0)
            self._check(device, "vram", budgets.vram)
        wanted = begun.expert_blocks if begun else self._blocks(batch, memory, device)
        for blocks in dict.fromkeys((wanted, 1)):
            share = batch / self.parts.workload.sequences
            places = _Places(budgets, self.scratch_bytes, dict(memory), {}, share)
            gram_blocks = self._gram_blocks(places, device)
            if _placed(parts, places, blocks):
                break
            if begun is not None:
                raise OverBudgetError(
                    f"the run was begun with experts in {blocks} blocks, for which neither "
                    f"--ram {size_option(budgets.ram)} nor the disk has room "
                    f"({format_size(parts.sum_bytes)}); "
                    "give it more of either, or begin anew with --restart"
                )
        resident = 0
        if budgets.vram is not None:
            summed = self._summed_grams(gram_blocks)
            room = budgets.vram - sum(device.values()) - sum(summed.values())
            resident = min(room // parts.expert_bytes, -(-parts.experts // blocks))
        schedule = Schedule(
            batch_sequences=batch,
            expert_blocks=blocks,
            resident_experts=resident,
            solver=solver,
            threads=self.parts.workload.threads,
            gram_blocks=gram_blocks,
        )
        if begun is not None:
            schedule = schedule.going_on(begun)
        if budgets.vram is not None:
            device = parts.device(batch, solver, schedule.resident_experts) | summed
        return Allocation(
            schedule=schedule, memory=places.memory, device=device, scratch=places.scratch
        )

    def _blocks(self, batch: int, memory: Mapping[str, int], device: Mapping[str, int]) -> int:
        """Return the number of blocks with which each expert is read only once."""
        parts, budgets = self.parts, self.budgets
        batches = -(-self.parts.workload.sequences // batch)
        # a refit passes over the experts batch by batch in any case
        if batches == 1 or parts.refits or not parts.runs_layers:
            return 1
        taken = sum(memory.values())
        if parts.output_bytes <= budgets.ram - taken:
            taken += parts.output_bytes
        cache = max(1, budgets.available - taken)
        blocks = -(-parts.stored_bytes // int(CACHE_SHARE * cache + 1))
        if budgets.vram is not None:
            room = (budgets.vram - sum(device.values())) // parts.expert_bytes
            # what a device keeps is read once a phase, whatever the page cache holds
            blocks = -(-parts.experts // room) if room > 0 else blocks
        if blocks > parts.experts:
            return 1
        # a pass reads states and attention's outputs, and reads and writes sums
        again = 3 * parts.sum_bytes * (blocks - 1)
        return blocks if again < parts.stored_bytes * (batches - 1) else 1

    def _gram_blocks(self, places: "_Places", device: Mapping[str, int]) -> int:
        """Return in how many blocks of experts products of activations are summed.

        They are summed on the device of the layers and kept in memory if there is room, else
        on the disk; half of the room for sums is left to what other passes keep.
        """
        parts, budgets, one = self.parts, self.budgets, self.parts.gram_bytes
        if not one:
            return 1
        total = one * parts.experts
        if budgets.vram is None and total <= places.room // 2:
            places.memory[GRAMS] = total
            return 1
        if budgets.vram is not None:
            room = (budgets.vram - sum(device.values())) // 2
            if total <= places.room // 2:
                places.memory[GRAMS] = total
                return self._blocks_of(room, one, "vram")
        else:
            room = places.room // 2 - 3 * one
        blocks = self._blocks_of(room, one, "ram" if budgets.vram is None else "vram")
        disk = self.scratch_bytes
        if disk is not None and total > disk - sum(places.scratch.values()):
            raise OverBudgetError(
                f"the products of activations of a layer's experts take {format_size(total)}, "
                "for which neither memory nor the disk has room; give it more of either"
            )
        places.scratch[GRAMS] = total
        places.memory[GRAMS] = 3 * one
        if budgets.vram is None:
            places.memory[GRAMS] += one * -(-parts.experts // blocks)
        return blocks

    def _blocks_of(self, room: int, one: int, option: str) -> int:
        """Return the blocks of experts whose sums, of so many bytes each, fit into the room."""
        if room < one:
            self._check(
                {GRAMS: one - room + getattr(self.budgets, option)},
                option,
                getattr(self.budgets, option),
            )
        return -(-self.parts.experts // min(self.parts.experts, room // one))

    def _summed_grams(self, blocks: int) -> dict[str, int]:
        """Return the sums of a block's products of activations on the device, by part."""
        one = self.parts.gram_bytes
        return {GRAMS: one * -(-self.parts.experts // blocks)} if one else {}

    def _check(self, needs: Mapping[str, int], option: str, budget: int) -> None:
        """Refuse parts whose sum exceeds a budget."""
        needed = sum(needs.values())
        if needed <= budget:
            return
        largest = sorted(needs.items(), key=lambda part: -part[1])[:3]
        told = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in largest)
        memory = "memory" if option == "ram" else "device memory"
        if self.begun is not None:
            raise OverBudgetError(
                f"the run was begun with {self.begun.batch_sequences} sequences at a time and "
                f"goes on with them; that needs {format_size(needed)} of {memory}, the budget "
                f"is {format_size(budget)}; the largest parts are {told}. Give --{option} "
                f"{size_option(needed)} or more, or begin anew with --restart"
            )
        raise OverBudgetError(
            f"the run needs {format_size(needed)} of {memory} with one sequence at a time, the "
            f"budget is {format_size(budget)}; the largest parts are {told}. Give --{option} "
            f"{size_option(needed)} or more, shorter sequences (--sequence-length), or fewer "
            f"--similarity-tokens{', or --refit none' if self.parts.refits else ''}"
        )


@dataclass(frozen=True, slots=True)
class _Places:
    """Parts of memory and disk that are allocated so far."""

    budgets: Budgets
    scratch_bytes: int | None
    memory: dict[str, int]
    scratch: dict[str, int]
    share: float
    """Share of a batch in all sequences."""

    @property
    def room(self) -> int:
        """Bytes of memory that are left."""
        return self.budgets.ram - sum(self.memory.values())

    def place(self, part: str, nbytes: int, *, or_disk: bool) -> bool:
        """Allocate a part in memory, or else on disk; return whether it fits."""
        room = self.room
        fits = nbytes <= room
        self.memory[part] = nbytes if fits else 0
        # a tensor in use, the next, and the last
        chunk = 3 * math.ceil(nbytes * self.share)
        if fits or not or_disk or chunk > room:
            return fits
        disk = self.scratch_bytes
        if disk is not None and nbytes > disk - sum(self.scratch.values()):
            return False
        self.memory[CHUNKS] = self.memory.get(CHUNKS, 0) + chunk
        self.scratch[part] = nbytes
        return True


def _placed(parts: MemoryModel, places: _Places, blocks: int) -> bool:
    """Allocate the tensors that passes share; return whether all required ones fit."""
    if blocks > 1 and not places.place(NORMS, parts.norm_bytes, or_disk=False):
        return False
    if parts.passes_again or blocks > 1:
        # a device computes them again faster than a disk reads them
        places.place(OUTPUTS, parts.output_bytes, or_disk=places.budgets.vram is None)
    if parts.refits:
        kept = parts.kept_bytes
        # activations that are not kept are computed again from the expert inputs
        if places.budgets.vram is not None or not places.place(
            ACTIVATIONS, parts.activation_bytes, or_disk=False
        ):
            kept += parts.input_bytes
        if not places.place(KEPT, kept, or_disk=False):
            places.scratch[KEPT] = kept
    return blocks == 1 or places.place(SUMS, parts.sum_bytes, or_disk=True)
