"""What a run needs of a disk, and whether the disk or a budget has it."""

from pathlib import Path

from ream_stream.checkpoint.reader import INDEX
from ream_stream.errors import OverBudgetError
from ream_stream.file_access import free_bytes, same_disk
from ream_stream.units import format_size, size_option

from .plan import Layout, Plan
from .schedule import Begun


def scratch_room(
    layout: Layout,
    budget: int | None,
    output: Path | None,
    work: Path | None,
    begun: Begun | None,
) -> int | None:
    """Return the disk space for scratch stores; None without a limit.

    Raises
    ------
    OverBudgetError
        Even without any the run needs more than the budget.
    """
    rooms = []
    if budget is not None:
        needed = sum(layout.fixed_disk.values())
        rooms.append(budget - needed)
        if needed > budget:
            largest = sorted(layout.fixed_disk.items(), key=lambda part: -part[1])[:3]
            told = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in largest)
            raise OverBudgetError(
                f"output and work folder need {format_size(needed)} of disk, the "
                f"budget is {format_size(budget)}; the largest parts are {told}. Give --disk "
                f"{size_option(needed)} or more, keep fewer experts, or use fewer --sequences"
            )
    if output is not None:
        work = work or output
        shards, states = _left_to_write(layout, 0, output, begun)
        rooms.append(free_bytes(work) - states - shards * same_disk(output, work))
    return min(rooms) if rooms else None


def check_disk(
    plan: Plan, output: Path, work: Path | None = None, begun: Begun | None = None
) -> None:
    """Refuse a run that a disk cannot hold.

    Parameters
    ----------
    plan
        The run.
    output, work
        Where its shards and its hidden states go; they may be on different disks.
    begun
        How far it is, if it goes on: what is written is on the disk already.

    Raises
    ------
    OverBudgetError
        With what is needed and what is free.
    """
    work = work or output
    shards, hidden = _left_to_write(plan, sum(plan.scratch.values()), output, begun)
    together = same_disk(output, work)
    for place, needed in ((output, shards + hidden * together), (work, hidden)):
        free = free_bytes(place)
        if needed > free:
            raise OverBudgetError(
                f"the run needs {format_size(needed)} on the disk of {place} "
                f"({format_size(shards)} of shards, {format_size(hidden)} of hidden states"
                f"{' and streamed shards' if plan.fetcher.peak_bytes else ''}"
                f"{'' if together else ' elsewhere'}), {format_size(free)} are free; "
                "fewer --sequences need less"
            )


def _left_to_write(
    layout: Layout, scratch_bytes: int, output: Path, begun: Begun | None
) -> tuple[int, int]:
    """Return the bytes still to be written in the output, and in the work folder at most."""
    shards = layout.output_bytes + layout.listing_bytes
    work = 2 * layout.boundary_bytes + layout.staged_bytes + scratch_bytes
    work += layout.fetcher.peak_bytes
    others = layout.others
    if begun is not None:
        shards -= begun.written_bytes
        if (output / INDEX).exists():
            shards -= layout.listing_bytes
        left = len(layout.layers) - begun.layers
        # one boundary is there already; after the last layer there is none
        work -= layout.boundary_bytes if left and begun.layers else 0 if left else work
        others = {n: size for n, size in others.items() if not (output / n).exists()}
    return shards + sum(others.values()), work
