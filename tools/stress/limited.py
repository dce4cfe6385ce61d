"""Run a command where the kernel lets it have no more memory than it is given.

    python tools/stress/limited.py 800MB -- ream-stream compress SOURCE OUTPUT --keep 75% ...

A cgroup (version 1 or 2) is made for it if this machine allows that. Its limit counts pages of
files too, but those the kernel takes back: it is what `docker run --memory` does. Otherwise
the command's anonymous memory (RssAnon) is only watched. It says which, and the highest that
was seen; the exit status is the command's, or 137 if it was over the limit.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ream_stream.units import format_size, parse_size

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Files:
    """Where a version of cgroups has what."""

    version: int
    parent: Path
    limit: str
    peak: str
    failed: str


VERSIONS = (
    Files(
        1,
        ROOT / "memory",
        "memory.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.failcnt",
    ),
    Files(2, ROOT, "memory.max", "memory.peak", "memory.events"),
)


@contextlib.contextmanager
def cgroup(limit: int) -> Iterator[tuple[Files, Path] | None]:
    """Make a cgroup with a limit for the length of the block; give None if it may not be."""
    for files in VERSIONS:
        folder = files.parent / f"ream-stream-{os.getpid()}"
        try:
            folder.mkdir()
            try:
                (folder / files.limit).write_text(str(limit), encoding="ascii")
            except OSError:
                folder.rmdir()
                continue
        except OSError:
            continue
        try:
            yield files, folder
        finally:
            folder.rmdir()
        return
    yield None


def watched(child: "subprocess.Popen[bytes]", limit: int) -> int:
    """Return the highest RssAnon of a process; end it if it is over the limit."""
    peak = 0
    while child.poll() is None:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii").splitlines()
            kilobytes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            peak = max([peak, *(1024 * number for number in kilobytes)])
        if peak > limit:
            child.kill()
        time.sleep(0.005)
    return peak


def main() -> int:
    """Run the command; return its exit status."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("limit", type=parse_size)
    options.add_argument("command", nargs="+")
    asked = options.parse_args()
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    with cgroup(asked.limit) as made:
        if made is None:
            child = subprocess.Popen(asked.command, env=environment)
            peak, how = watched(child, asked.limit), "watched by RssAnon, no cgroup may be made"
            times = ""
        else:
            files, folder = made

            def enter() -> None:
                (folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

            child = subprocess.Popen(asked.command, env=environment, preexec_fn=enter)
            child.wait()
            peak = int((folder / files.peak).read_text(encoding="ascii"))
            how = f"in a cgroup of version {files.version}"
            failed = " ".join((folder / files.failed).read_text(encoding="ascii").split())
            times = f", {files.failed} {failed}"
        status = child.returncode
    if status < 0:
        status = 128 + abs(status)
    print(
        f"limit {format_size(asked.limit)}, {how}: highest {format_size(peak)}{times}; "
        f"exit status {status}" + (" (killed)" if status == 128 + signal.SIGKILL else "")
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
