"""What a long run meets, one fault after the other: the exit status, the file's name, and the
bytes of an undisturbed run once the fault is gone.

A fault is planted before a run, or when its first layer is committed. Errors of the disk are
raised where Python opens a file, and where `files` writes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import importlib
import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import compression
from crash import Kill, digests
from killed_runs import VARIANTS, Runs, check_what_is_left
from reports import when_a_layer_is_committed

from ream_stream import files
from ream_stream.__main__ import main
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.cli import console
from ream_stream.compression import event_log
from ream_stream.compression.file_lock import lock
from ream_stream.errors import InterruptedRunError
from ream_stream.planning.planner import make_plan

# a verb has the name of the module
REPORT = importlib.import_module("ream_stream.cli.run")


@dataclass
class Case:
    """A run that meets a fault."""

    source: Path
    output: Path
    tokens: Path
    patch: pytest.MonkeyPatch
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What mends the fault."""

    @property
    def work(self):
        return self.output / ".ream-stream"

    def run(self, *more):
        """Run the command line; return its status."""
        return main(self.words(*more))

    def words(self, *more):
        return compression(self.source, self.output, self.tokens, *more)

    def shard(self):
        """Return a source shard that the second layer is read from."""
        (path,) = {
            entry.path
            for name, entry in open_checkpoint(self.source).entries.items()
            if name == "model.layers.1.mlp.up_proj.weight"
        }
        return path

    def stop(self):
        """Make a run that is stopped after its first layer."""

        def interrupt():
            raise InterruptedRunError("stopped for the test")

        with pytest.MonkeyPatch.context() as patch:
            when_a_layer_is_committed(patch, interrupt)
            assert self.run() == 130

    def keep(self, path):
        """Bring a file back, times and all, when the fault is mended."""
        data, status = path.read_bytes(), path.stat()

        def restore():
            path.write_bytes(data)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

        self.undo.callback(restore)
        return path


def reads_fail(patch, name, number):
    """Let reads of files with this name, that are opened from now on, fail."""
    opened = io.open

    class Failing(io.FileIO):
        def readinto(self, *_):
            raise OSError(number, os.strerror(number))

        read = readall = readinto

    def fail(file, mode="r", *rest, **options):
        if not isinstance(file, int) and name in str(file) and "r" in mode and "+" not in mode:
            return Failing(file)
        return opened(file, mode, *rest, **options)

    patch.setattr(io, "open", fail)


def opens_fail(patch, name):
    """Let files with this name not be opened, as their permissions would."""
    opened = io.open

    def fail(file, *rest, **options):
        if not isinstance(file, int) and name in str(file):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(file, *rest, **options)

    patch.setattr(io, "open", fail)


def writes_fail(patch, name, number):
    """Let writes to files with this name fail."""
    fill, put = files._fill, files._put

    def failing_fill(file, *rest):
        if name in file.name:
            raise OSError(number, os.strerror(number))
        fill(file, *rest)

    def failing_put(path, pieces):
        if name in str(path):
            raise OSError(number, os.strerror(number))
        put(path, pieces)

    patch.setattr(files, "_fill", failing_fill)
    patch.setattr(files, "_put", failing_put)


# --- faults: each plants itself in a case


def during(act):
    """Plant something when the first layer is committed."""
    return lambda case: when_a_layer_is_committed(case.patch, lambda: act(case))


def begun(act):
    """Plant something in a run that was stopped after its first layer."""

    def plant(case):
        case.stop()
        act(case)

    return plant


def read(name, number=errno.EIO):
    return lambda case: reads_fail(case.patch, name, number)


def write(name, number):
    return lambda case: writes_fail(case.patch, name, number)


def full_log(case):
    writes_fail(case.patch, "log.jsonl", errno.ENOSPC)


def no_permission(case):
    case.patch.setattr(os, "access", lambda path, _: not case.output.is_relative_to(path))


def read_only_disk(case):
    before = os.statvfs
    case.patch.setattr(
        os,
        "statvfs",
        lambda path: SimpleNamespace(f_flag=before(path).f_flag | os.ST_RDONLY),
    )


def replaces_fail(case):
    def fail(partial, path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(partial), None, str(path))

    case.patch.setattr(files, "_replace", fail)


def longer(case):
    path = case.keep(case.shard())
    path.write_bytes(path.read_bytes() + b"\0")


def touched(case):
    os.utime(case.keep(case.shard()), ns=(0, 0))


def other_header(case):
    """Swap two letters of a name: same size, same time."""
    path = case.keep(case.shard())
    data, times = path.read_bytes(), path.stat()
    path.write_bytes(data.replace(b"gate_proj", b"gate_porj"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def gone(case):
    case.keep(case.shard()).unlink()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def flipped(pattern):
    def act(case):
        path = next(path for path in sorted(case.output.rglob(pattern)) if path.is_file())
        flip(case.keep(path))

    return act


def cut(pattern):
    def act(case):
        path = case.keep(next(iter(sorted(case.output.rglob(pattern)))))
        path.write_bytes(path.read_bytes()[:-1])

    return act


def lost(pattern):
    def act(case):
        case.keep(next(iter(sorted(case.output.rglob(pattern))))).unlink()

    return act


def clock(jump):
    """Let the wall clock go wrong in the middle of a run."""

    class Jumped(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + jump

    return during(lambda case: case.patch.setattr(event_log, "datetime", Jumped))


def held(case):
    files.make_directory(case.work)
    case.undo.enter_context(lock(case.work / "lock"))


def left_behind(case):
    (case.work / "lock").write_text("process 4711 on elsewhere\n", encoding="utf-8")


def no_locks(case):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    case.patch.setattr(fcntl, "flock", fail)


def silent(number):
    """Let nobody read what the run says."""

    def act(case):
        stream = SimpleNamespace(write=fail, flush=fail, encoding="utf-8", isatty=lambda: False)
        case.patch.setattr(console, "sys", SimpleNamespace(stderr=stream, stdout=sys.stdout))

    def fail(*_):
        raise OSError(number, os.strerror(number))

    return act


@dataclass(frozen=True)
class Fault:
    plant: Callable[[Case], None]
    status: int
    words: str
    """In the message; SHARD stands for the name of the source shard."""
    mend: tuple[str, ...] = ()
    """What the command that goes on has more."""


FAULTS = {
    "a source shard cannot be read for the plan": Fault(
        read("model-00001"), 1, ".safetensors: Input/output error"
    ),
    "a source shard cannot be read during the run": Fault(
        during(lambda case: reads_fail(case.patch, case.shard().name, errno.EIO)),
        1,
        "SHARD: Input/output error",
    ),
    "the index cannot be read": Fault(read("index.json"), 1, "index.json: Input/output error"),
    "the config cannot be read": Fault(
        read("config.json"), 1, "config.json: Input/output error"
    ),
    "a hidden chunk cannot be read": Fault(
        during(read("hidden-00001/c/")), 1, "hidden-00001: Input/output error"
    ),
    "the journal cannot be read": Fault(
        begun(read("journal.json")), 1, "journal.json: Input/output error"
    ),
    "a source shard may not be opened": Fault(
        lambda case: opens_fail(case.patch, case.shard().name), 1, "SHARD: Permission denied"
    ),
    "a source shard may not be opened any more": Fault(
        during(lambda case: opens_fail(case.patch, case.shard().name)),
        1,
        "SHARD: Permission denied",
    ),
    "nothing may be written": Fault(no_permission, 2, "written to: permission denied"),
    "the disk is read-only": Fault(read_only_disk, 2, "its file system is read-only"),
    "the disk becomes read-only": Fault(during(replaces_fail), 1, "Read-only file system"),
    "a shard cannot be written": Fault(
        write("model-00002", errno.EIO), 1, "model-00002-of-00004.safetensors: Input/output"
    ),
    "a hidden chunk cannot be written": Fault(
        write("hidden-00001", errno.EIO), 1, "hidden-00001: Input/output error"
    ),
    "the disk is full at a shard": Fault(
        write("model-00002", errno.ENOSPC), 12, "no space left for"
    ),
    "the quota is used up at a shard": Fault(
        write("model-00002", errno.EDQUOT), 12, "no space left for"
    ),
    "the disk is full at a hidden chunk": Fault(
        write("hidden-00001", errno.ENOSPC), 12, "no space left for"
    ),
    "the disk is full at the journal": Fault(
        write("journal.json", errno.ENOSPC), 12, "no space left for"
    ),
    "the disk is full at the index": Fault(
        write("index.json", errno.ENOSPC), 12, "no space left for"
    ),
    "the disk is full at the log": Fault(full_log, 12, "log.jsonl"),
    "a source shard grows": Fault(during(longer), 3, "SHARD was changed while"),
    "a source shard is written to": Fault(during(touched), 3, "SHARD was changed while"),
    "a source shard gets another header": Fault(
        during(other_header), 3, "its header is another"
    ),
    "a source shard goes away": Fault(during(gone), 3, "SHARD was changed while"),
    "a byte of a hidden chunk flips": Fault(
        begun(flipped("hidden-00001/c/0/0/*")), 3, "hidden-00001: batch 0 is damaged"
    ),
    "a hidden chunk is lost": Fault(
        begun(lost("hidden-00001/c/0/0/*")), 3, "hidden-00001 lacks hidden states"
    ),
    "a byte of the journal flips": Fault(
        begun(lambda case: flip_digit(case.keep(case.work / "journal.json"))),
        3,
        "journal.json is damaged",
    ),
    "a committed shard is cut": Fault(
        begun(cut("model-00001*")), 3, "model-00001-of-00004.safetensors has"
    ),
    "a committed shard is lost": Fault(
        begun(lost("model-00001*")), 3, "model-00001-of-00004.safetensors is missing"
    ),
    "committed statistics are cut": Fault(
        begun(cut("statistics-*")), 3, "statistics-00000.safetensors has"
    ),
    "the clock jumps back": Fault(clock(timedelta(days=-400)), 0, ""),
    "the clock jumps ahead": Fault(clock(timedelta(days=400)), 0, ""),
    "a living run holds the lock": Fault(
        held, 11, f"process {os.getpid()} on {socket.gethostname()}"
    ),
    "a dead run left its lock": Fault(begun(left_behind), 0, "taking over from process 4711"),
    "the file system has no locks": Fault(no_locks, 2, "has no locks"),
    "the terminal goes away": Fault(silent(errno.EIO), 0, ""),
    "the reader of a pipe goes away": Fault(silent(errno.EPIPE), 0, ""),
}
"""Kinds of faults; docs/concepts/reliability.md tells their number."""


def flip_digit(path):
    """Change a digit of a digest in the journal: what is left is a journal all the same."""
    text = path.read_text(encoding="utf-8")
    start = text.index('"calibration": "') + len('"calibration": "')
    other = "0" if text[start] != "0" else "1"
    path.write_text(text[:start] + other + text[start + 1 :], encoding="utf-8")


@pytest.fixture(scope="module")
def tokens(token_file):
    return token_file


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Plan once: what a layer needs is worked out by running it, and is the same each time."""
    planned = []

    def plan_once(checkpoint, *rest, **options):
        if not planned:
            planned.append(make_plan(checkpoint, *rest, **options))
        return dataclasses.replace(planned[0], source=checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ream_stream.compression.candidate_plans.make_plan", plan_once)
        patch.setattr("ream_stream.compression.job.forecast", lambda *_, **__: None)
        patch.setattr(REPORT, "say_start", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def undisturbed(checkpoints, tokens, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "output"
    assert Case(checkpoints("qwen3_moe"), output, tokens, None).run() == 0
    return outcome(output)


def outcome(output):
    """Return digests of all files but the journal, which has the times of the source's."""
    return {name: of for name, of in digests(output).items() if "journal.json" not in name}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_status_and_once_mended_the_run_ends_in_the_same_bytes(
    name, checkpoints, tokens, undisturbed, tmp_path, capsys
):
    fault = FAULTS[name]
    source = shutil.copytree(checkpoints("qwen3_moe"), tmp_path / checkpoints("qwen3_moe").name)
    with pytest.MonkeyPatch.context() as patch:
        case = Case(source, tmp_path / "output", tokens, patch)
        shard = case.shard().name
        fault.plant(case)
        capsys.readouterr()
        status = case.run()
    said = capsys.readouterr().err
    assert (status, fault.words.replace("SHARD", shard) in said) == (fault.status, True), said
    assert "Traceback" not in said
    case.undo.close()
    assert case.run(*fault.mend) == 0, capsys.readouterr().err
    assert outcome(case.output) == undisturbed


def test_verify_names_a_committed_shard_with_a_flipped_byte(
    checkpoints, tokens, tmp_path, capsys
):
    case = Case(checkpoints("qwen3_moe"), tmp_path / "output", tokens, None)
    case.stop()
    flip(next(iter(sorted(case.output.glob("model-00001*")))))
    assert case.run() == 0
    assert main(["verify", str(case.output)]) == 3
    assert "model-00001-of-00004.safetensors has SHA-256" in capsys.readouterr().out


def test_stdout_without_a_reader_does_not_end_the_run(
    checkpoints, tokens, undisturbed, tmp_path, monkeypatch
):
    case = Case(checkpoints("qwen3_moe"), tmp_path / "output", tokens, monkeypatch)
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        # the result could not be told, but it is there
        assert case.run("--json") == 1
    assert outcome(case.output) == undisturbed


@pytest.mark.slow
def test_of_two_runs_started_at_once_one_does_all_and_the_other_is_refused(
    checkpoints, tokens, undisturbed, tmp_path
):
    case = Case(checkpoints("qwen3_moe"), tmp_path / "output", tokens, None)
    command = [sys.executable, "-m", "ream_stream", *case.words("--threads", 1)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [each.communicate()[1] for each in both]
    statuses = sorted(each.returncode for each in both)
    # the second may also come when the first is done, and find nothing left to do
    assert statuses in ([0, 11], [0, 0]), said
    assert outcome(case.output) == undisturbed


@pytest.mark.crash
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "OverBudgetError"),
        pytest.param(errno.EIO, "Input/output error", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_at_any_write_costs_nothing_that_is_committed(
    number,
    said,
    crash_source,
    tmp_path,
):
    runs = Runs(crash_source, VARIANTS["ream"], tmp_path)
    control = runs.control()
    changing = ("fill", "put", "make", "replace", "sync")
    steps = [n for n, step in enumerate(control.ending.steps) if step.kind in changing]
    for step in steps[:: 24 if number == errno.EIO else 16]:
        output = tmp_path / f"{step}"
        ending = runs.run(output, Kill(step, "before", error=number))
        assert said in ending.failure, control.ending.steps[step]
        check_what_is_left(output, control)
        runs.run(output)
        assert digests(output) == control.output, control.ending.steps[step]
        shutil.rmtree(output)
