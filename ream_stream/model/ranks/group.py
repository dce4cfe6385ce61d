"""Processes (ranks) that work on one run: whose batch is whose, and what ranks tell each other.

Batch b is run by rank b mod N. Sums over tokens are carried from rank to rank in the order of
batches (`Relay`): each rank adds its batch to what all batches before came to, by the same
operations as a single process. So the sums, and with them the bytes of the output, do not
depend on the number of ranks.

A function that may run on several ranks takes a `Ranks`; `ALONE` is a single process, in which
nothing is sent. Several ranks are a `connected.ConnectedRanks`, made by `launch.joined`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def in_turn(parts: Sequence[Sequence[T]], count: int) -> list[T]:
    """Return `count` results in order, of what each rank made of its `Ranks.own`."""
    return [parts[number % len(parts)][number // len(parts)] for number in range(count)]


def is_other_rank(environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether this process is one of several ranks, and not the first, which prints."""
    known = os.environ if environment is None else environment
    return known.get("WORLD_SIZE", "1") != "1" and known.get("RANK", "0") != "0"


class Ranks:
    """The processes of a run, as one of them sees them; this class is a single process.

    All ranks call the same methods in the same order.
    """

    rank = 0
    """Number of this process."""

    size = 1
    """Number of processes, N."""

    local_rank = 0
    """Number of this process among those of its machine."""

    local_size = 1
    """Number of processes on this machine."""

    names: Sequence[str] = ("0",)
    """Number, host and process of each rank, for people."""

    sent_bytes = 0
    """Bytes of tensors that this process sent."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone commits and prints."""
        return self.rank == 0

    def own(self, count: int) -> range:
        """Return the numbers of this rank among `count` batches, experts or shards."""
        return range(self.rank, count, self.size)

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Return the values of all ranks in their order; none goes on before all have come.

        They are what JSON can hold: of several ranks tuples become lists.
        """
        return [value]

    def gather_tensors(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return small tensors of all ranks, in the order of ranks, on the processor."""
        return [[tensor.cpu() for tensor in tensors]]

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401
        """Return the value of rank 0, as `gather` does; those of the others do not matter."""
        return value

    def broadcast_tensors(self, tensors: Sequence[Tensor], source: int) -> None:
        """Overwrite tensors, contiguous ones of equal shapes, with those of rank `source`."""

    def agree(self, what: str, value: object) -> None:
        """Make sure that all ranks came to the same value, by a digest of its `repr`.

        Raises
        ------
        ReamStreamError
            They did not; the message names what and the ranks.
        """

    def relay(self, batches: int) -> Relay:
        """Return what carries the sums of one pass over so many batches."""
        return Relay(self, batches)

    def channel(self) -> int:
        """Return the number of a new channel; what is sent on one arrives in order."""
        return 0

    def send(self, tensors: Sequence[Tensor], target: int, channel: int) -> None:
        """Send tensors, which must not change before they are received again."""
        raise NotImplementedError

    def receive(self, tensors: Sequence[Tensor], source: int, channel: int) -> None:
        """Overwrite tensors with those that rank `source` sent."""
        raise NotImplementedError


class Relay:
    """Carries running sums through one pass over all batches, from rank to rank.

    Parameters
    ----------
    ranks
        The processes.
    batches
        Number of batches of the pass; at least the number of ranks.
    """

    def __init__(self, ranks: Ranks, batches: int) -> None:
        self._ranks, self._batches = ranks, batches
        self._channel = ranks.channel()

    @contextmanager
    def turn(self, number: int, sums: Sequence[Tensor]) -> Iterator[None]:
        """Let the block add batch `number` to sums that hold all batches before.

        Several sums may be carried apart, each in the same order on all ranks.
        """
        self.take(number, sums)
        yield
        self.pass_on(number, sums)

    def take(self, number: int, sums: Sequence[Tensor]) -> None:
        """Begin a turn: the sums hold all batches before `number` then."""
        ranks = self._ranks
        if ranks.size > 1 and number > 0:
            ranks.receive(sums, (ranks.rank - 1) % ranks.size, self._channel)

    def pass_on(self, number: int, sums: Sequence[Tensor]) -> None:
        """End a turn: the sums hold batch `number` too."""
        ranks = self._ranks
        if ranks.size > 1 and number < self._batches - 1:
            ranks.send(sums, (ranks.rank + 1) % ranks.size, self._channel)

    def finish(self, sums: Sequence[Tensor]) -> None:
        """Give the sums of all batches to every rank."""
        if self._ranks.size > 1:
            self._ranks.broadcast_tensors(sums, (self._batches - 1) % self._ranks.size)


ALONE = Ranks()
"""A single process."""
