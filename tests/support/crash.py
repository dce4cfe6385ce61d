"""Kills a job at a chosen durable step, and tells what is on the disk then.

The job runs in a forked child of the warm test process: a fork takes
milliseconds, importing torch seconds. In the child the primitives of `files` are wrapped:
each call is a step, and the child sends
itself SIGKILL before step k, halfway through it (what is written is cut to half), or after.
Nothing in the product knows of this.
"""

import hashlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from ream_stream import files as durable

Moment = Literal["before", "halfway", "after"]
WRITES = ("fill", "put")
SECONDS = 120
"""After which a child counts as hung."""


class JobFailedError(AssertionError):
    """The job raised an error instead of finishing; the message is its traceback."""


@dataclass(frozen=True)
class Step:
    """One call of a primitive."""

    kind: str
    """fill, put, sync, replace, unlink, make or remove_empty."""
    path: str
    """What it is done to; of a replace, the new name."""
    old: str | None
    """Of a replace, the old name."""
    idle: bool
    """The deletion of what is not there."""
    committed: list[str]
    """What the journal named just before."""


@dataclass(frozen=True)
class Kill:
    step: int
    moment: Moment
    error: int | None = None
    """Instead of the kill, an error of the disk with this number."""


@dataclass(frozen=True)
class Ending:
    finished: bool
    """False if it killed itself."""
    steps: list[Step]
    """Of a job that finished."""
    value: Any
    """What the job returned, through JSON."""
    failure: str = ""
    """The traceback, of a job that failed as it was made to."""


def run_in_child(
    job: Callable[[], Any],
    report: Path,
    *,
    kill: Kill | None = None,
    committed: Callable[[], list[str]] = list,
) -> Ending:
    """Run a job in a forked child.

    Parameters
    ----------
    job
        What to do; its result must be JSON.
    report
        A file for what the child has to tell, outside of what the job writes.
    kill
        Where the child kills itself; None to let it finish.
    committed
        Called before each step: the paths that the journal names.
    """
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        status = 1
        try:
            steps = _wrap_primitives(kill, committed)
            value = job()
            told = {"steps": [vars(step) for step in steps], "value": value}
            report.write_text(json.dumps(told), encoding="utf-8")
            status = 0
        except BaseException:  # noqa: BLE001 - the child must not return into pytest
            report.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and kill is not None:
        return Ending(finished=False, steps=[], value=None)
    if status != 0 and kill is not None and kill.error is not None and report.exists():
        return Ending(False, [], None, report.read_text(encoding="utf-8"))
    if status != 0:
        text = report.read_text(encoding="utf-8") if report.exists() else "it told nothing"
        raise JobFailedError(f"the child ended with status {status}:\n{text}")
    told = json.loads(report.read_text(encoding="utf-8"))
    steps = [Step(**step) for step in told["steps"]]
    return Ending(finished=True, steps=steps, value=told["value"])


def wrap_primitives(kill: Kill) -> None:
    """Let this process kill itself at a durable step."""
    _wrap_primitives(kill, list)


def kill_with(pids: list[int]) -> None:
    """Let other processes die just before this one kills itself."""
    end = _end

    def with_others(error: int | None) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        end(error)

    globals()["_end"] = with_others


def kills(steps: list[Step], *, thin: bool = False) -> list[Kill]:
    """Return every kill that leaves a disk of its own.

    Before step k is after step k - 1, and a sync changes nothing that SIGKILL
    could show: `unsynced` is the test for those.

    Parameters
    ----------
    steps
        Of a clean run.
    thin
        Of pieces that fill one file in a row, and of deletions in a row, take the last.
    """
    found = [Kill(0, "before")]
    for number, step in enumerate(steps):
        following = steps[number + 1] if number + 1 < len(steps) else None
        if thin and following is not None and _alike(step, following):
            continue
        if step.kind in WRITES:
            found.append(Kill(number, "halfway"))
        if step.kind != "sync" and not step.idle:
            found.append(Kill(number, "after"))
    return found


def unsynced(steps: list[Step]) -> Iterator[str]:
    """Yield each rename that a power cut could tear: what it publishes, or itself, not synced.

    Stands in for power loss, which SIGKILL does not show.
    """
    for number, step in enumerate(steps):
        if step.kind != "replace":
            continue
        before, after = steps[:number], steps[number + 1 :]
        files = {s.path for s in before if s.kind in WRITES and _within(s.path, step.old)}
        for path in sorted(files):
            last_write = max(i for i, s in enumerate(before) if s.path == path and _writes(s))
            if not any(s.kind == "sync" and s.path == path for s in before[last_write:]):
                yield f"{step.path}: {path} was not synced before the rename"
        folder = str(Path(step.path).parent)
        if not after or (after[0].kind, after[0].path) != ("sync", folder):
            yield f"{step.path}: {folder} was not synced after the rename"


def overwritten(steps: list[Step]) -> Iterator[str]:
    """Yield each step that changes or deletes what the journal names at that moment.

    Replacing the journal itself is the one change that is meant.
    """
    for step in steps:
        touched = set() if step.kind == "sync" or step.idle else {step.path, step.old}
        for name in step.committed:
            if any(path is not None and _within(path, name) for path in touched):
                yield f"{step.kind} of {step.path} while the journal names {name}"


def digests(root: Path) -> dict[str, str]:
    """Return digest and permissions of every file below a folder; lock and log aside."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.name in {"lock", "log.jsonl"}:
            continue
        mode = oct(path.stat().st_mode)
        data = path.read_bytes() if path.is_file() else b"folder"
        if path.name in {"journal.json", "run.json"}:
            data = _whatever_the_run(data)
        found[str(path.relative_to(root))] = f"{mode} {hashlib.sha256(data).hexdigest()}"
    return found


def _whatever_the_run(data: bytes) -> bytes:
    """Return a file of ours without what no output depends on: which run it is, and where."""
    try:
        value = json.loads(data)
    except ValueError:
        return data
    for name in ("sha256", "run", "output", "inode", "work"):
        value.pop(name, None)
    return json.dumps(value).encode()


def _wrap_primitives(kill: Kill | None, committed: Callable[[], list[str]]) -> list[Step]:
    """Wrap, in this process, all that changes a disk; return the list that fills with steps."""
    steps: list[Step] = []
    counting = threading.Lock()  # threads read and write states beside the run

    def die_at(number: int, moment: Moment) -> None:
        if kill is not None and (kill.step, kill.moment) == (number, moment):
            _end(kill.error)

    def wrap(module, name, kind, describe, halfway=None):
        original = getattr(module, name)

        @wraps(original)
        def step(*args, **kwargs):
            old, path = describe(*args)
            # in a clean run only: reading the journal at every step takes time
            named = committed() if kill is None else []
            idle = kind == "unlink" and not os.path.lexists(path)
            with counting:
                number = len(steps)
                steps.append(Step(kind, path, old, idle, named))
            die_at(number, "before")
            if halfway is not None and kill == Kill(number, "halfway"):
                halfway(*args)
                die_at(number, "halfway")
            result = original(*args, **kwargs)
            if kind == "fill":
                args[0].flush()  # or the kernel would not have what a later step counts on
            die_at(number, "after")
            return result

        setattr(module, name, step)

    def half_fill(file, piece, *_):
        file.write(piece[: len(piece) // 2])
        file.flush()

    def half_put(path, pieces):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join(pieces)
        path.write_bytes(data[: len(data) // 2])

    def first(path, *_):
        return None, str(path)

    wrap(durable, "_fill", "fill", lambda file, *_: (None, file.name), half_fill)
    wrap(
        durable, "_sync", "sync", lambda fd: (None, str(Path(f"/proc/self/fd/{fd}").readlink()))
    )
    wrap(durable, "_replace", "replace", lambda old, new: (str(old), str(new)))
    wrap(durable, "_unlink", "unlink", first)
    wrap(durable, "_make", "make", first)
    wrap(durable, "_remove_empty", "remove_empty", first)
    wrap(durable, "_put", "put", first, half_put)
    return steps


def _end(error: int | None) -> None:
    """Die, or fail as a disk does."""
    if error is not None:
        raise OSError(error, os.strerror(error))
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(SECONDS)  # a thread that writes need not be the one to die


def _alike(step: Step, following: Step) -> bool:
    deletes = ("unlink", "remove_empty")
    same = (step.kind, step.path) == (following.kind, following.path)
    return same or (step.kind in deletes and following.kind in deletes)


def _writes(step: Step) -> bool:
    return step.kind in WRITES


def _within(path: str, folder: str | None) -> bool:
    return folder is not None and (path == folder or path.startswith(folder + "/"))
