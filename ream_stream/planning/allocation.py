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
from .refit_memory import ACTIVATIONS, INPUTS, KEPT
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
class _Cut:
    """How a layer's experts are gone through."""

    blocks: int
    """Number of blocks that they are cut into."""

    stored: bool
    """Whether a refit stores their activations, so that no pass after needs experts."""


WHOLE = _Cut(1, stored=False)
"""All experts at once."""


@dataclass(frozen=True, slots=True)
class _Chooser:
    """Allocates memory and disk for a batch, and checks the budgets."""

    parts: MemoryModel
    budgets: Budgets
    scratch_bytes: int | None
    begun: Schedule | None

    def with_batch(self, batch: int, solver: Solver) -> Allocation:
        """Return the allocation for a batch and a solver; refuse one over a budget."""
        wanted = self._cut(batch, solver)
        if wanted != WHOLE:
            allocation = self._with_cut(batch, solver, wanted)
            if allocation is not None:
                return allocation
        allocation = self._with_cut(batch, solver, WHOLE)
        assert allocation is not None
        return allocation

    def _with_cut(self, batch: int, solver: Solver, cut: _Cut) -> Allocation | None:
        """Return the allocation for a cut of the experts; None if it has no room.

        Raises
        ------
        OverBudgetError
            The experts are not cut, or the run was begun so.
        """
        parts, budgets, begun = self.parts, self.budgets, self.begun
        memory = parts.host(batch, solver, trims_heap=budgets.trims_heap, stored=cut.stored)
        device: Mapping[str, int] = {}
        if budgets.vram is not None:
            device = parts.device(batch, solver, 0, stored=cut.stored)
        must = cut == WHOLE or begun is not None
        if must:
            self._check(memory, "ram", budgets.ram)
            self._check(device, "vram", budgets.vram or 0)
        elif sum(memory.values()) > budgets.ram or sum(device.values()) > (budgets.vram or 0):
            return None
        share = batch / parts.workload.sequences
        places = _Places(budgets, self.scratch_bytes, dict(memory), {}, share)
        gram_blocks = self._gram_blocks(places, device)
        if not _placed(parts, places, cut):
            if begun is None:
                return None
            raise OverBudgetError(
                f"the run was begun with experts in {cut.blocks} blocks, for which neither "
                f"--ram {size_option(budgets.ram)} nor the disk has room "
                f"({format_size(parts.sum_bytes)}); "
                "give it more of either, or begin anew with --restart"
            )
        summed = self._summed_grams(gram_blocks)
        resident = 0
        if budgets.vram is not None:
            room = parts.resident_room(
                budgets.vram - sum(summed.values()), batch, solver, stored=cut.stored
            )
            resident = max(0, min(room, -(-parts.experts // cut.blocks)))
        schedule = Schedule(
            batch_sequences=batch,
            expert_blocks=cut.blocks,
            resident_experts=resident,
            solver=solver,
            threads=parts.workload.threads,
            gram_blocks=gram_blocks,
        )
        if begun is not None:
            schedule = schedule.going_on(begun)
        if budgets.vram is not None:
            kept = schedule.resident_experts
            device = parts.device(batch, solver, kept, stored=cut.stored) | summed
        return Allocation(
            schedule=schedule, memory=places.memory, device=device, scratch=places.scratch
        )

    def _cut(self, batch: int, solver: Solver) -> _Cut:
        """Return the cut of the experts with which each is read only once a phase."""
        parts, budgets = self.parts, self.budgets
        batches = -(-parts.workload.sequences // batch)
        if batches == 1 or not parts.runs_layers:
            return WHOLE
        memory = parts.host(batch, solver, trims_heap=budgets.trims_heap)
        taken = sum(memory.values())
        free = budgets.ram - taken
        if not parts.refits and parts.output_bytes <= free:
            taken += parts.output_bytes
        cache = max(1, budgets.available - taken)
        blocks = -(-parts.stored_bytes // int(CACHE_SHARE * cache + 1))
        stored, in_memory = parts.refits and blocks > 1, parts.activation_bytes <= free
        if budgets.vram is not None:
            room = parts.resident_room(budgets.vram, batch, solver, stored=False)
            if parts.refits:
                # what a page cache holds is cheaper than activations on the disk
                if room >= parts.experts_left or (blocks == 1 and not in_memory):
                    return self._begun(WHOLE)
                stored = True
                room = parts.resident_room(budgets.vram, batch, solver, stored=True)
            # what a device keeps is read once a phase, whatever the page cache holds
            blocks = -(-parts.experts // room) if room > 0 else blocks
        cut = self._begun(_Cut(blocks, stored=stored))
        if self.begun is not None:
            return cut
        # a pass reads states and attention's outputs, and reads and writes sums
        again = 3 * parts.sum_bytes * (blocks - 1)
        if stored and not in_memory:
            again += 4 * parts.activation_bytes
        worth = again < parts.stored_bytes * (batches - 1)
        return cut if worth and blocks <= parts.experts else WHOLE

    def _begun(self, cut: _Cut) -> _Cut:
        """Return a cut with as many blocks as the run was begun with."""
        if self.begun is None:
            return cut
        blocks = self.begun.expert_blocks
        return _Cut(blocks, stored=self.parts.refits and (blocks > 1 or cut.stored))

    def _gram_blocks(self, places: "_Places", device: Mapping[str, int]) -> int:
        """Return in how many blocks of experts products of activations are summed.

        They are summed on the device of the layers and kept in memory if there is room, else
        on the disk; half of the room for sums is left to what other passes keep.
        """
        parts, one = self.parts, self.parts.gram_bytes
        if not one:
            return 1
        total, vram = one * parts.experts, self.budgets.vram
        half = places.room // 2
        fits = total <= half
        if not fits and not places.on_disk(GRAMS, total):
            raise OverBudgetError(
                f"the products of activations of a layer's experts take {format_size(total)}, "
                "for which neither memory nor the disk has room; give it more of either"
            )
        # a sum in use, the next, and the last
        places.memory[GRAMS] = total if fits else 3 * one
        if vram is not None:
            return self._blocks_of((vram - sum(device.values())) // 2, one, "vram")
        if fits:  # they are summed where they are kept
            return 1
        blocks = self._blocks_of(half - 3 * one, one, "ram")
        places.memory[GRAMS] += one * -(-parts.experts // blocks)
        return blocks

    def _blocks_of(self, room: int, one: int, option: str) -> int:
        """Return the blocks of experts whose sums, of so many bytes each, fit into the room."""
        if room < one:
            budget = getattr(self.budgets, option)
            self._check({GRAMS: one - room + budget}, option, budget)
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
        chunk = self.chunk(nbytes)
        if fits or not or_disk or chunk > room or not self.on_disk(part, nbytes):
            return fits
        self.memory[CHUNKS] = self.memory.get(CHUNKS, 0) + chunk
        return True

    def fill(self, part: str, nbytes: int, spare: int, *, chunk: int = 0) -> bool:
        """Allocate a part in memory, what has no room there on disk; return whether it fits.

        Parameters
        ----------
        part, nbytes
            The part.
        spare
            Bytes of memory for a share of it, if it does not fit as a whole.
        chunk
            Bytes of memory for the buffers of a store on disk.
        """
        room = self.room
        if nbytes <= room:
            self.memory[part] = nbytes
            return True
        if chunk > room:
            return False
        self.memory[part] = share = max(0, min(room - chunk, spare))
        if chunk:
            self.memory[CHUNKS] = self.memory.get(CHUNKS, 0) + chunk
        return self.on_disk(part, nbytes - share)

    def on_disk(self, part: str, nbytes: int) -> bool:
        """Allocate a part on disk; return whether it fits."""
        disk = self.scratch_bytes
        if disk is not None and nbytes > disk - sum(self.scratch.values()):
            return False
        self.scratch[part] = nbytes
        return True

    def chunk(self, nbytes: int) -> int:
        """Return the bytes of a store's tensors in memory: in use, the next, and the last."""
        return 3 * math.ceil(nbytes * self.share)


def _placed(parts: MemoryModel, places: _Places, cut: _Cut) -> bool:
    """Allocate the tensors that passes share; return whether all required ones fit."""
    budgets, cuts = places.budgets, cut.blocks > 1
    if cuts and not places.place(NORMS, parts.norm_bytes, or_disk=False):
        return False
    # of what does not fit a share is in memory, unless the page cache then lost the layer
    taken = sum(places.memory.values()) + parts.stored_bytes / CACHE_SHARE
    spare = int(budgets.available - taken) if taken <= budgets.available else budgets.ram
    if cut.stored:
        # read by each pass of the refit, so before all else that may be in memory
        chunk = places.chunk(parts.activation_bytes)
        left = places.room - chunk - (places.chunk(parts.sum_bytes) if cuts else 0)
        spare = min(spare, left)
        if not places.fill(ACTIVATIONS, parts.activation_bytes, spare, chunk=chunk):
            return False
    if parts.passes_again or cuts:
        # a device computes them again faster than a disk reads them
        places.place(OUTPUTS, parts.output_bytes, or_disk=budgets.vram is None)
    if cuts and parts.refits and not places.place(SUMS, parts.sum_bytes, or_disk=True):
        return False
    if parts.refits:
        if not cut.stored and (
            budgets.vram is not None
            or not places.place(ACTIVATIONS, parts.activation_bytes, or_disk=False)
        ):
            # activations that are not kept are computed again from the expert inputs
            places.fill(INPUTS, parts.input_bytes, spare)
            spare -= places.memory[INPUTS]
        places.fill(KEPT, parts.kept_bytes, spare)
    return not cuts or parts.refits or places.place(SUMS, parts.sum_bytes, or_disk=True)
