"""Jobs on several ranks: processes forked from the warm test process, connected by gloo."""

import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ream_stream.model.ranks.group import Ranks
from ream_stream.model.ranks.launch import joined

SECONDS = 100
"""After which a rank counts as hung."""


@dataclass(frozen=True)
class RankEnding:
    """How a rank ended."""

    value: Any
    """What its job returned, through JSON; None if it failed."""
    error: str
    """Name of the class and message of the error, if it failed."""
    status: int
    """Exit status that the error has; minus the number of a signal that killed it."""
    seconds: float
    """Seconds from the start."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set, without its agent."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def on_ranks(
    size: int,
    job: Callable[[Ranks], Any],
    folder: Path,
    *,
    beside: Callable[[Sequence[int]], None] | None = None,
) -> list[RankEnding]:
    """Run a job on ranks, each in a forked child; return how they ended.

    Parameters
    ----------
    size, job
        Number of ranks; what each does, whose result must be JSON.
    folder
        For what the children have to tell, outside of what the job writes.
    beside
        Called with the processes' numbers while they run.
    """
    port, start = free_port(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    pids = []
    for rank in range(size):
        (folder / f"{rank}.json").unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            signal.alarm(SECONDS)
            told: dict[str, Any] = {}
            try:
                with joined(environment(rank, size, port)) as ranks:
                    told = {"value": job(ranks)}
            except BaseException as error:  # noqa: BLE001 - the child must not return into pytest
                told = {
                    "error": f"{type(error).__name__}: {error}",
                    "status": getattr(error, "exit_status", 1),
                    "trace": traceback.format_exc(),
                }
            finally:
                told["seconds"] = time.monotonic() - start
                (folder / f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")
                os._exit(0)
        pids.append(pid)
    if beside is not None:
        beside(pids)
    endings = []
    for rank, pid in enumerate(pids):
        _, status = os.waitpid(pid, 0)
        path = folder / f"{rank}.json"
        told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        endings.append(
            RankEnding(
                value=told.get("value"),
                error=told.get("error", ""),
                status=-os.WTERMSIG(status)
                if os.WIFSIGNALED(status)
                else told.get("status", 0),
                seconds=told.get("seconds", 0.0),
            )
        )
        if "trace" in told:
            print(told["trace"])
    return endings
