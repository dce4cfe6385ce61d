"""Ranks connected by torch.distributed: gloo carries tensors, torchrun's store all else.

Whoever waits for a rank waits at the store, a second at a time, and looks there whether the
others live and whether one has told why it ended. Only when both sides have come is anything
transferred, so that no wait is without bounds and none is left to gloo, which cannot be woken.

torch.distributed is imported only where WORLD_SIZE tells of several processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ream_stream.errors import InterruptedRunError, RankError, ReamStreamError, of_system

from .group import Ranks
from .heartbeat import BEAT_SECONDS, SILENT_SECONDS, Heartbeat, SilenceWatch
from .tensor_bytes import byte_pieces

if TYPE_CHECKING:
    from torch import Tensor

JOIN_SECONDS = 50.0
"""Seconds that ranks wait for all to come at the start, and for one transfer."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0001, 0.005
_LEAVE_SECONDS = 5.0
_GO_ON = "nothing committed is lost, start all ranks again to go on"


@dataclass(frozen=True, kw_only=True, slots=True)
class _End:
    """Why a rank ended, as it told the others."""

    rank: int
    message: str
    kind: str
    status: int
    then: str | None
    interrupted: bool
    names_ranks: bool
    """Whether the message names the rank that it is about."""

    dead: Sequence[int]
    """Ranks that gave no sign of life."""


def distributed() -> Any:  # noqa: ANN401 - its parts are not typed
    """Return torch.distributed, which a single process does not import."""
    return import_module("torch.distributed")


class ConnectedRanks(Ranks):
    """Several processes, as one of them sees them; from `joined`.

    Parameters
    ----------
    store
        Store that all ranks reach.
    prefix
        Beginning of all keys of this group.
    told
        Numbers of this process.
    hosts
        Whether the store ends with this process.
    """

    def __init__(self, store: Any, prefix: str, told: Ranks, *, hosts: bool) -> None:  # noqa: ANN401
        dist = distributed()
        self.rank, self.size = told.rank, told.size
        self.local_rank, self.local_size = told.local_rank, told.local_size
        self.sent_bytes = 0
        self._root, self._hosts = store, hosts
        self._store: Any = dist.PrefixStore(prefix, store)
        self._gathered = 0
        self._channels = 0
        self._passed: dict[int, int] = {}
        self._pending: dict[int, tuple[list[Any], list[Tensor]]] = {}
        self._failed: BaseException | None = None
        self.names = [str(number) for number in range(self.size)]
        self._heartbeat = Heartbeat(
            dist.PrefixStore(prefix, store.clone()), self.rank, self.size
        )
        self._heartbeat.start()
        try:
            host = socket.gethostname()
            found = self.gather((host, os.getpid()))
            self.names = [
                f"{number} ({name}, process {pid})" for number, (name, pid) in enumerate(found)
            ]
            with self._transferring(0):
                self._gloo: Any = dist.ProcessGroupGloo(
                    dist.PrefixStore("gloo", self._store),
                    self.rank,
                    self.size,
                    timeout=timedelta(seconds=JOIN_SECONDS),
                )
            self.gather(None)  # who ends sooner would end the connecting of others
        except BaseException:
            self._heartbeat.stop()
            raise

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Return the values of all ranks in their order; none goes on before all have come."""
        return [json.loads(data) for data in self._gather(json.dumps(value).encode())]

    def gather_tensors(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return small tensors of all ranks, in the order of ranks, on the processor."""
        from safetensors.torch import load, save

        named = {f"{place:06d}": each.cpu().contiguous() for place, each in enumerate(tensors)}
        found = map(load, self._gather(save(named)))
        return [[each[name] for name in sorted(each)] for each in found]

    def _gather(self, data: bytes) -> list[bytes]:
        number, self._gathered = self._gathered, self._gathered + 1
        self._set(f"gather/{number}/{self.rank}", data)
        found = []
        for rank in range(self.size):
            key = f"gather/{number}/{rank}"
            self._wait(key)
            with self._at_store():
                found.append(self._store.get(key))
        if number > 1:  # all have come to the next, so all have read it
            with self._at_store():
                self._store.delete_key(f"gather/{number - 2}/{self.rank}")
        return found

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401
        """Return the value of rank 0; those of the others do not matter."""
        return self.gather(value if self.is_first else None)[0]

    def broadcast_tensors(self, tensors: Sequence[Tensor], source: int) -> None:
        """Overwrite tensors with those of rank `source`."""
        self.gather(None)
        self._settle()
        options = distributed().BroadcastOptions()
        options.rootRank = source
        for piece, back in byte_pieces(tensors, fill=self.rank == source):
            with self._transferring(source):
                self._gloo.broadcast([piece], options).wait()
            if self.rank == source:
                self.sent_bytes += piece.numel() * (self.size - 1)
            else:
                back()

    def agree(self, what: str, value: object) -> None:
        """Make sure that all ranks came to the same value."""
        found = self.gather(hashlib.sha256(repr(value).encode()).hexdigest())
        others = [self.names[rank] for rank, each in enumerate(found) if each != found[0]]
        if others:
            raise RankError(
                f"{what}: rank {', rank '.join(others)} came to something else than rank "
                f"{self.names[0]}; machines must have the same processors or GPUs, the same "
                "versions and number of threads"
            )

    def channel(self) -> int:
        """Return the number of a new channel; what is sent on one arrives in order."""
        self._channels += 1
        return self._channels

    def send(self, tensors: Sequence[Tensor], target: int, channel: int) -> None:
        """Send tensors, which must not change before they are received again."""
        works, kept = [], []
        for piece, _ in byte_pieces(tensors, fill=True):
            with self._transferring(target):
                works.append(self._gloo.send([piece], target, channel))
            kept.append(piece)
            self.sent_bytes += piece.numel()
        self._pending[tensors[0].data_ptr()] = works, kept
        self._set(f"sent/{target}/{channel}/{self._next(-channel)}", b"")

    def receive(self, tensors: Sequence[Tensor], source: int, channel: int) -> None:
        """Overwrite tensors with those that rank `source` sent."""
        key = f"sent/{self.rank}/{channel}/{self._next(channel)}"
        self._wait(key)
        with self._at_store():
            self._store.delete_key(key)
        # has been received, as what comes now was made of it: no wait for a rank that hangs
        self._sent(tensors[0].data_ptr(), source)
        for piece, back in byte_pieces(tensors, fill=False):
            with self._transferring(source):
                self._gloo.recv([piece], source, channel).wait()
            back()

    def tell_end(self, error: BaseException) -> None:
        """Tell the others why this rank ends, unless another did before."""
        self._failed = error
        known = error if isinstance(error, ReamStreamError) else None
        if known is None and isinstance(error, Exception):
            known = of_system(error)
        told = _End(
            rank=self.rank,
            message=str(known or f"{type(error).__name__}: {error}"),
            kind=type(known or error).__name__,
            status=known.exit_status if known else 1,
            then=known.then if known else None,
            interrupted=isinstance(error, InterruptedRunError),
            names_ranks=isinstance(error, RankError),
            dead=error.dead if isinstance(error, RankError) else (),
        )
        with suppress(Exception):  # whoever cannot be told finds out by itself
            self._store.set(f"ended/{self.rank}", b"")
            self._store.compare_set("end", "", json.dumps(asdict(told)))
            if known is not None and not self.is_first and 0 not in told.dead:
                known.told = True

    def dead_before(self, error: BaseException) -> RankError | None:
        """Return which rank died, if this one was stopped since that had; None if none did.

        Launchers stop the others when one dies, which is told before they find it out.
        """
        if not isinstance(error, InterruptedRunError) or error.told:
            return None
        with suppress(Exception):
            watch = self._heartbeat.watch()
            until = time.monotonic() + SILENT_SECONDS + 2 * BEAT_SECONDS
            keys = [f"ended/{rank}" for rank in range(self.size)]
            while not self._store.check(keys) and time.monotonic() < until:
                silent = [r for r in watch.silent() if not self._store.check([keys[r]])]
                if silent:
                    return self._dead(silent)
                time.sleep(BEAT_SECONDS / 4)
        return None

    def leave(self) -> None:
        """Part from the others; who hosts the store waits until they have heard all."""
        with suppress(Exception):
            if self._failed is None:
                self._settle()
        self._gloo = None
        self._heartbeat.stop()
        with suppress(Exception):
            self._store.set(f"left/{self.rank}", b"")
            if self._hosts:
                until = time.monotonic() + _LEAVE_SECONDS
                dead = getattr(self._failed, "dead", ())
                keys = [f"left/{rank}" for rank in range(self.size) if rank not in dead]
                while not self._store.check(keys) and time.monotonic() < until:
                    time.sleep(0.05)
        self._store = self._root = None  # its port is free for the next group

    def _set(self, key: str, value: bytes) -> None:
        with self._at_store():
            self._store.set(key, value)

    @contextmanager
    def _at_store(self) -> Iterator[None]:
        """Say that the store is lost if what the block asks of it fails."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost_store() from error

    def _wait(self, key: str) -> None:
        """Wait until another rank has set a key.

        Raises
        ------
        RankError
            A rank ended or died meanwhile.
        """
        watch, pause = self._heartbeat.watch(), _SHORTEST_PAUSE
        look = time.monotonic() + BEAT_SECONDS
        try:
            # a wait of the store itself writes a warning each time that it ends
            while not self._store.check([key]):
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE, 1.5 * pause)
                if time.monotonic() > look:
                    self._check(watch)
                    look = time.monotonic() + BEAT_SECONDS
        except RuntimeError as error:
            raise self._lost_store() from error

    def _check(self, watch: SilenceWatch) -> None:
        """Raise why another rank ended, if one did."""
        try:
            told = self._store.check(["end"])
            silent = watch.silent()
        except RuntimeError as error:
            raise self._lost_store() from error
        if told:
            raise self._ended(_End(**json.loads(self._store.get("end"))))
        if silent:
            raise self._dead(silent)

    def _ended(self, end: _End) -> ReamStreamError:
        if end.interrupted:
            told = InterruptedRunError(
                end.message, then=end.then, signal_number=end.status - 128
            )
            told.told = not self.is_first
            return told
        message = end.message
        return RankError(
            message if end.names_ranks else f"rank {self.names[end.rank]} ended: {message}",
            then=end.then,
            exit_status=end.status,
            kind=end.kind,
            told=not self.is_first or end.rank == self.rank or bool(end.dead),
        )

    def _dead(self, silent: Sequence[int]) -> RankError:
        names = ", rank ".join(self.names[rank] for rank in silent)
        return RankError(
            f"rank {names} gave no sign of life for {SILENT_SECONDS:.0f} s: it was killed, or "
            f"its machine or network failed; {_GO_ON}",
            dead=silent,
        )

    def _lost_store(self) -> RankError:
        return RankError(
            f"rank {self.names[self.rank]} has lost the store of the ranks: rank "
            f"{self.names[0]} or its launcher ended, or the network failed; {_GO_ON}",
        )

    @contextmanager
    def _transferring(self, other: int) -> Iterator[None]:
        """Say which rank ended if a transfer fails."""
        try:
            yield
        except RuntimeError as error:
            watch = self._heartbeat.watch()
            until = time.monotonic() + SILENT_SECONDS + 2 * BEAT_SECONDS
            while time.monotonic() < until:
                self._check(watch)
                time.sleep(BEAT_SECONDS / 4)
            reason = " ".join(str(error).split())[:200]
            raise RankError(
                f"a transfer between rank {self.names[self.rank]} and rank {self.names[other]} "
                f"failed ({reason}); {_GO_ON}"
            ) from error

    def _next(self, way: int) -> int:
        """Return how many messages went a way before: on a channel, or negative, from it."""
        number = self._passed.get(way, 0)
        self._passed[way] = number + 1
        return number

    def _sent(self, key: int, other: int) -> None:
        """Wait until what was sent of some tensors is gone."""
        works, _ = self._pending.pop(key, ([], []))
        for work in works:
            with self._transferring(other):
                work.wait()

    def _settle(self) -> None:
        for key in list(self._pending):
            self._sent(key, (self.rank + 1) % self.size)
