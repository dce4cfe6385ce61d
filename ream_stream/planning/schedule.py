"""Schedule of a run through each layer, and its limits on memory and disk."""

import itertools
from dataclasses import dataclass, replace

from ream_stream.host_memory import anonymous_bytes, available_bytes

RAM_SHARE = 0.8
"""Share of free memory that is the default budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Limits on the memory and disk of a run, in bytes."""

    ram: int
    """Most bytes of anonymous host memory."""

    trims_heap: bool
    """Whether the heap returns freed memory to the kernel at once, which costs time."""

    available: int
    """Bytes of host memory for anonymous memory and the page cache together."""

    disk: int | None = None
    """Most bytes of output and work folder together; None without a limit."""

    vram: int | None = None
    """Most bytes of memory on the GPU; None if layers run on the processor."""

    @classmethod
    def of(
        cls,
        ram: int | None = None,
        *,
        disk: int | None = None,
        vram: int | None = None,
        elsewhere: bool = False,
        processes: int = 1,
    ) -> "Budgets":
        """Return the budgets that were given; for host memory, otherwise most of what is free.

        Only a budget that was given is kept so strictly that the heap is trimmed. One for a
        machine elsewhere is taken as the usual share of what is free there. What is free is
        divided among the `processes` of this machine.
        """
        free = available_bytes() // processes
        available = free + anonymous_bytes()
        if elsewhere and ram is not None:
            available = int(ram / RAM_SHARE)
        return cls(
            ram=int(RAM_SHARE * free) if ram is None else ram,
            trims_heap=ram is not None,
            available=available,
            disk=disk,
            vram=vram,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """Solver of a refit; the choice decides last bits, or the number of iterations."""

    preconditioner: str
    """Key of `method.preconditioning.PRECONDITIONERS`."""

    gathered: bool
    """Whether the normal matrix is accumulated once, so that iterations need no pass."""

    column_blocks: int
    """Number of parts of the hidden channels that are solved one after another."""

    def columns(self, hidden: int) -> list[slice]:
        """Return the parts of so many hidden channels."""
        # rounded up, so that the first part is the largest
        count = self.column_blocks
        bounds = [-(-hidden * part // count) for part in range(count + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Batches, blocks and solver of each layer on the machine that the run began on."""

    batch_sequences: int
    """Sequences of a batch."""

    expert_blocks: int
    """Number of blocks of a layer's experts; with 1, each batch passes all experts at once."""

    resident_experts: int
    """Experts of a block that stay on the device between batches."""

    solver: Solver
    """Solver of the refit, if there is one."""

    threads: int
    """Number of processor threads."""

    gram_blocks: int = 1
    """Number of blocks of experts whose products of activations are summed in one pass."""

    def halved(self) -> "Schedule":
        """Return the schedule with half as much on the device at once."""
        return replace(
            self,
            batch_sequences=-(-self.batch_sequences // 2),
            resident_experts=self.resident_experts // 2,
        )

    def going_on(self, begun: "Schedule") -> "Schedule":
        """Return the schedule of a resumed run: `begun`, adapted to this planned schedule.

        All that decides last bits stays. The number of threads is the new one, and no more
        experts stay on the device than it has room for now.
        """
        resident = min(self.resident_experts, begun.resident_experts)
        return replace(
            begun,
            resident_experts=resident,
            threads=self.threads,
            gram_blocks=self.gram_blocks,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """Progress of a run that a plan resumes."""

    schedule: Schedule
    """Schedule that the run began with."""

    layers: int
    """Number of committed layers; unless 0 or all, states of one boundary are on the disk."""

    written_bytes: int
    """Bytes of the output's committed shards."""
