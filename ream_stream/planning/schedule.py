"""How a run goes through a layer, and what it may take of a machine for that."""

from dataclasses import dataclass, replace

from ream_stream.host_memory import anonymous_bytes, available_bytes

RAM_SHARE = 0.8
"""Share of the free memory that is used if no budget is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """What a run may take of a machine, in bytes."""

    ram: int
    """Anonymous host memory."""

    trims_heap: bool
    """Whether freed memory goes back to the kernel at once, which takes time."""

    available: int
    """Host memory for anonymous memory and the page cache together."""

    disk: int | None = None
    """What output and work folder may hold together; None if there is no limit."""

    vram: int | None = None
    """Memory of the device that layers run on; None if that is the processor."""

    @classmethod
    def of(
        cls, ram: int | None = None, *, disk: int | None = None, vram: int | None = None
    ) -> "Budgets":
        """Return the budgets that were given; for host memory, otherwise most of what is free.

        Only a budget that was given is kept so strictly that the heap is trimmed.
        """
        free = available_bytes()
        return cls(
            ram=int(RAM_SHARE * free) if ram is None else ram,
            trims_heap=ram is not None,
            available=free + anonymous_bytes(),
            disk=disk,
            vram=vram,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """How the equations of a refit are solved; it decides last bits, or iterations."""

    preconditioner: str
    """Key of `method.preconditioning.PRECONDITIONERS`."""

    gathered: bool
    """Whether all products of activations are gathered once: no pass for an iteration."""

    column_blocks: int
    """Parts that the hidden channels are solved in, one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How a run goes through each layer on the machine that it began on."""

    batch_sequences: int
    """Sequences that are run together."""

    expert_blocks: int
    """Blocks that a layer's experts are run in; with 1, all batches see all of them."""

    resident_experts: int
    """Experts of a block that stay on the device between batches."""

    solver: Solver
    """How a refit is solved, if there is one."""

    threads: int
    """Processor threads."""

    def halved(self) -> "Schedule":
        """Return the schedule with half as much on the device at once."""
        return replace(
            self,
            batch_sequences=-(-self.batch_sequences // 2),
            resident_experts=self.resident_experts // 2,
        )

    def going_on(self, begun: "Schedule") -> "Schedule":
        """Return what a run that began with `begun` goes on with, where this one is planned.

        What decides last bits stays. As many threads are used as were asked for this time,
        and no more experts stay on the device than it has room for now.
        """
        resident = min(self.resident_experts, begun.resident_experts)
        return replace(begun, resident_experts=resident, threads=self.threads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """How far a run is that a plan goes on with."""

    schedule: Schedule
    """What it began with."""

    layers: int
    """Layers that are done; unless it is 0 or all, one boundary's states are on the disk."""

    written_bytes: int
    """Bytes of the output's shards that are written."""
