"""Anonymous memory of this process: what is ours, without mapped files.

Resident size counts mapped pages too, which the kernel takes back whenever it
likes; RssAnon does not. docs/concepts/memory.md explains the words.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_MEMBERSHIP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
_VERSION_2 = ("memory.max", "memory.current", "file")
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def anonymous_bytes() -> int:
    """Return RssAnon, or the unique set size where the kernel does not tell it."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_full_info().uss)


def available_bytes() -> int:
    """Return what the machine could give without swapping, or a container of it."""
    return min([int(psutil.virtual_memory().available), *cgroup_rooms(_MEMBERSHIP, _CGROUPS)])


def cgroup_rooms(membership: Path, root: Path) -> list[int]:
    """Return what the limits of this process's control groups leave, of both versions.

    Cached files count as used there and are given back when memory is asked for.
    """
    if not membership.exists():
        return []
    rooms = []
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names = (root / "memory", _VERSION_1) if controllers else (root, _VERSION_2)
        inner = base / path.lstrip("/")
        for folder in [inner, *inner.parents]:
            if folder.is_relative_to(base):
                rooms += _room(folder, *names)
    return rooms


def _room(folder: Path, limit: str, usage: str, cached: str) -> list[int]:
    """Return what one group's limit leaves; nothing if it has none."""
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        used = int((folder / usage).read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return []
    files = sum(int(line.split()[1]) for line in lines if line.split()[0] == cached)
    return [] if most == "max" else [max(0, int(most) - used + files)]


def trim() -> None:
    """Give freed memory back to the kernel.

    glibc keeps freed blocks under 32 MiB in its heap, which is the size of an
    expert's matrices: without this, memory creeps up layer by layer.
    """
    # None is what is linked already: looking for the library by name runs ldconfig each time
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def bound_kernel_caches() -> None:
    """Let oneDNN and torch keep few of the kernels they make for products in bf16.

    They make one for each number of rows, and experts see a new number at each
    call: 0.6 MB each, up to 600 MB with the 1024 that both keep by default. With
    16 it is 10 MB and no slower. Read at the first product, so to be called before.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")


def return_freed_memory() -> None:
    """Let every freed block of a megabyte or more go back to the kernel at once.

    By default glibc raises that limit to 32 MiB as blocks are freed, and keeps smaller
    ones in its heap, where a third more may be held than is in use.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


class Gauge:
    """The highest anonymous memory, since the start and since the last `restart`."""

    def __init__(self) -> None:
        self.highest = self.peak = anonymous_bytes()

    def sample(self) -> None:
        """Measure once."""
        self.peak = max(self.peak, anonymous_bytes())
        self.highest = max(self.highest, self.peak)

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = anonymous_bytes()


@contextmanager
def gauge(interval: float = 0.02) -> Iterator[Gauge]:
    """Sample anonymous memory in the background for the length of the block."""
    meter, stop = Gauge(), threading.Event()

    def watch() -> None:
        while not stop.wait(interval):
            meter.sample()

    thread = threading.Thread(target=watch, name="memory gauge", daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        stop.set()
        thread.join()
        meter.sample()
