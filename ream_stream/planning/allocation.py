"""What a run is given of a machine: a batch, blocks of experts, places for what is kept.

The largest batch that the budgets allow is chosen first. Then, if all experts of a layer
are more than the page cache (or a device) can hold, they are cut into blocks; and what is
kept from pass to pass goes into memory if there is room, else on disk, else it is made
again. docs/concepts/memory.md explains the words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ream_stream.errors import OverBudgetError
from ream_stream.units import format_size

from .memory import Parts
from .refit_memory import ACTIVATIONS, KEPT, Solver

MAX_BATCH_TOKENS = 8192
"""Tokens that are run together at most: larger batches gain nothing measurable."""

CACHE_SHARE = 0.5
"""Share of the memory left to the page cache that a block of experts may fill."""

OUTPUTS = "attention outputs"
"""Name of a part. Where it is neither in memory nor on disk, attention runs in each pass."""

SUMS = "sums of experts"
"""Name of a part that is there if experts are run in blocks."""

NORMS = "norms of experts"
"""Another one."""

CHUNKS = "chunks of scratch stores"
"""What is in memory of what is kept on disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a run may take of a machine, in bytes."""

    ram: int
    """Anonymous host memory."""

    steady: bool
    """Whether freed memory goes back to the kernel at once."""

    available: int
    """Host memory for anonymous memory and the page cache together."""

    disk: int | None
    """Disk for what is kept from pass to pass; None if there is no limit."""

    vram: int | None
    """Memory of the device that layers run on; None if that is the processor."""

    batch_sequences: int | None = None
    """The batch that a run began with, which it keeps."""

    expert_blocks: int | None = None
    """The blocks that it began with."""

    solver: Solver | None = None
    """How it began to solve refits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allotment:
    """A batch, blocks of experts, and what a run with them takes."""

    batch_sequences: int
    """Sequences of a batch."""

    expert_blocks: int
    """Blocks that a layer's experts are run in."""

    resident_experts: int
    """Experts of a block that stay on the device between batches."""

    memory: Mapping[str, int]
    """Bytes of host memory by part; the sum is the promised peak."""

    solver: Solver
    """How a refit is solved."""

    device: Mapping[str, int]
    """Bytes of device memory by part; empty if layers run on the processor."""

    scratch: Mapping[str, int]
    """Bytes of disk by part."""


def allot(parts: Parts, limits: Limits, *, sequences: int, length: int) -> Allotment:
    """Choose the largest batch that the budgets allow, and all that follows from it.

    Parameters
    ----------
    parts
        Of the run's memory.
    limits
        What it may take.
    sequences, length
        Size of the calibration set.

    Raises
    ------
    OverBudgetError
        Not even one sequence at a time fits, or not the batch that the run began with;
        the smallest budget that works is told.
    """
    batch = limits.batch_sequences or max(1, min(sequences, MAX_BATCH_TOKENS // length))
    while True:
        ways = parts.solvers if limits.solver is None else [limits.solver]
        for solver in ways:
            try:
                return _with_batch(parts, limits, batch, solver, sequences)
            except OverBudgetError:
                if solver == ways[-1] and (batch == 1 or limits.batch_sequences):
                    raise
        batch = -(-batch // 2)


def _with_batch(
    parts: Parts, limits: Limits, batch: int, solver: Solver, sequences: int
) -> Allotment:
    memory = parts.host(batch, solver, steady=limits.steady)
    _check(memory, limits, "ram", refits=parts.refits)
    batches, device = -(-sequences // batch), {}
    if limits.vram is not None:
        device = parts.device(batch, solver, 0)
        _check(device, limits, "vram", refits=parts.refits)
    wanted = limits.expert_blocks or _blocks(parts, limits, batches, memory, device)
    for blocks in dict.fromkeys((wanted, 1)):
        places = _Places(limits, dict(memory), {}, batch / sequences)
        if _placed(parts, places, blocks):
            break
        if limits.expert_blocks:
            raise OverBudgetError(
                f"the run was begun with experts in {blocks} blocks, for which neither "
                f"--ram {limits.ram} nor the disk has room ({format_size(parts.sum_bytes)}); "
                "give it more of either, or begin anew with --restart"
            )
    resident = 0
    if limits.vram is not None:
        room = limits.vram - sum(device.values())
        resident = min(room // parts.expert_bytes, -(-parts.experts // blocks))
        device = parts.device(batch, solver, resident)
    return Allotment(
        batch_sequences=batch,
        expert_blocks=blocks,
        resident_experts=resident,
        memory=places.memory,
        solver=solver,
        device=device,
        scratch=places.scratch,
    )


def _blocks(
    parts: Parts,
    limits: Limits,
    batches: int,
    memory: Mapping[str, int],
    device: Mapping[str, int],
) -> int:
    """Return how many blocks of experts are needed for each to be read once."""
    # a refit passes over the experts batch by batch in any case
    if batches == 1 or parts.refits:
        return 1
    taken = sum(memory.values())
    if parts.output_bytes <= limits.ram - taken:
        taken += parts.output_bytes
    cache = max(1, limits.available - taken)
    blocks = -(-parts.stored_bytes // int(CACHE_SHARE * cache + 1))
    if limits.vram is not None:
        room = (limits.vram - sum(device.values())) // parts.expert_bytes
        blocks = max(blocks, -(-parts.experts // max(1, room)))
    if blocks > parts.experts:
        return 1
    # a pass reads states and attention's outputs, and reads and writes sums
    again = 3 * parts.sum_bytes * (blocks - 1)
    return blocks if again < parts.stored_bytes * (batches - 1) else 1


@dataclass(frozen=True, slots=True)
class _Places:
    """What is taken of memory and disk so far."""

    limits: Limits
    memory: dict[str, int]
    scratch: dict[str, int]
    share: float
    """Of a batch in all sequences."""

    def place(self, part: str, nbytes: int, *, or_disk: bool) -> bool:
        """Take room for a part in memory, or else on disk; tell whether there was any."""
        room = self.limits.ram - sum(self.memory.values())
        fits = nbytes <= room
        self.memory[part] = nbytes if fits else 0
        # a tensor, and what writing makes of it: its bits, and they with their checksum
        chunk = 3 * math.ceil(nbytes * self.share)
        if fits or not or_disk or chunk > room:
            return fits
        disk = self.limits.disk
        if disk is not None and nbytes > disk - sum(self.scratch.values()):
            return False
        self.memory[CHUNKS] = self.memory.get(CHUNKS, 0) + chunk
        self.scratch[part] = nbytes
        return True


def _placed(parts: Parts, places: _Places, blocks: int) -> bool:
    """Take room for what is kept from pass to pass; tell whether what must be kept is."""
    if blocks > 1 and not places.place(NORMS, parts.norm_bytes, or_disk=False):
        return False
    if parts.passes_again or blocks > 1:
        # a device makes them again faster than a disk gives them
        places.place(OUTPUTS, parts.output_bytes, or_disk=places.limits.vram is None)
    if parts.refits:
        kept = parts.kept_bytes
        # those that are not kept are made again from what the experts were given
        if places.limits.vram is not None or not places.place(
            ACTIVATIONS, parts.activation_bytes, or_disk=False
        ):
            kept += parts.input_bytes
        if not places.place(KEPT, kept, or_disk=False):
            places.scratch[KEPT] = kept
    return blocks == 1 or places.place(SUMS, parts.sum_bytes, or_disk=True)


def _check(parts: Mapping[str, int], limits: Limits, option: str, *, refits: bool) -> None:
    """Refuse parts that are more than a budget."""
    needed, begun = sum(parts.values()), limits.batch_sequences
    limit = limits.ram if option == "ram" else limits.vram or 0
    if needed <= limit:
        return
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    told = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in largest)
    memory = "memory" if option == "ram" else "device memory"
    if begun:
        raise OverBudgetError(
            f"the run was begun with {begun} sequences at a time and goes on with them; that "
            f"needs {format_size(needed)} of {memory}, the budget is {format_size(limit)}; the "
            f"largest parts are {told}. Give --{option} {needed} or more, or begin anew with "
            "--restart"
        )
    raise OverBudgetError(
        f"the run needs {format_size(needed)} of {memory} with one sequence at a time, the "
        f"budget is {format_size(limit)}; the largest parts are {told}. Give --{option} "
        f"{needed} or more, or shorter sequences (--sequence-length), or fewer "
        f"--similarity-tokens{', or --refit none' if refits else ''}"
    )
