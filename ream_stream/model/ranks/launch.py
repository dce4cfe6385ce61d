"""Joins the processes that torchrun started, by the variables that it sets."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from ream_stream.errors import RankError, UsageError

from .group import ALONE, Ranks

if TYPE_CHECKING:
    from .connected import ConnectedRanks


def expected(environment: Mapping[str, str] | None = None) -> Ranks:
    """Return the processes that `joined` would join, which are not connected.

    Raises
    ------
    UsageError
        Variables are missing or no numbers.
    """
    known = os.environ if environment is None else environment
    ranks = Ranks()
    if known.get("WORLD_SIZE", "1") != "1":
        ranks.rank, ranks.size = _number(known, "RANK"), _number(known, "WORLD_SIZE")
        ranks.local_rank = _number(known, "LOCAL_RANK", "0")
        ranks.local_size = _number(known, "LOCAL_WORLD_SIZE", "1")
        if ranks.rank >= ranks.size:
            raise UsageError(
                f"RANK is {ranks.rank} and WORLD_SIZE {ranks.size}: ranks go from 0 to "
                f"{ranks.size - 1}"
            )
    return ranks


def _number(known: Mapping[str, str], name: str, default: str = "") -> int:
    value = known.get(name, default)
    if not value.isdecimal():
        raise UsageError(
            f"WORLD_SIZE is {known['WORLD_SIZE']!r} and {name} is {value!r}: start all "
            "processes with torchrun, or set its variables"
        )
    return int(value)


@contextmanager
def joined(environment: Mapping[str, str] | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun, or whoever sets its variables, started.

    An error of the block is told to the others, which end with it.

    Parameters
    ----------
    environment
        Variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT;
        None for those of this process.

    Yields
    ------
    Ranks
        `ALONE` where WORLD_SIZE is absent or 1.

    Raises
    ------
    UsageError
        Variables are missing or no numbers.
    RankError
        Not all ranks came, or one died; the message names it.
    """
    known = os.environ if environment is None else environment
    if known.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    ranks = _connect(known)
    try:
        yield ranks
        ranks.gather(None)
    except BaseException as error:
        ranks.tell_end(error)
        if (dead := ranks.dead_before(error)) is not None:
            raise dead from error
        raise
    finally:
        ranks.leave()


def _connect(known: Mapping[str, str]) -> "ConnectedRanks":
    """Connect to the store and to all ranks."""
    from .connected import JOIN_SECONDS, ConnectedRanks, distributed

    told, port = expected(known), _number(known, "MASTER_PORT")
    address = known.get("MASTER_ADDR", "127.0.0.1")
    # torchrun's agent has one; else it is in the process of rank 0
    hosts = told.is_first and known.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = distributed().TCPStore(
            address,
            port,
            told.size,
            hosts,
            timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as error:
        raise RankError(
            f"rank {told.rank} of {told.size} ({socket.gethostname()}) reaches no store at "
            f"{address}:{port}: is rank 0 running there, and is the port free?"
        ) from error
    start = (
        f"{known.get('TORCHELASTIC_RUN_ID', '')}/{known.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    )
    # each group of one process has names of its own
    session = store.add(f"ream-stream/{start}/{told.rank}", 1)
    return ConnectedRanks(store, f"ream-stream/{start}/{session}/", told, hosts=hosts)
