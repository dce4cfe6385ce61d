"""The machine's processors: the only module that speaks of CUDA."""

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError


def choose_device(name: str) -> torch.device:
    """Return the device of ``--device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.

    Raises
    ------
    UsageError
        There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # noqa: TID251
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is no device; use auto, cpu or cuda") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def is_here(device: torch.device) -> bool:
    """Tell whether a device is one of this machine's."""
    return device.type == "cpu" or torch.cuda.is_available()  # noqa: TID251


def free_bytes(device: torch.device) -> int:
    """Return 90% of what a GPU has free: libraries take some of their own."""
    free, _ = torch.cuda.mem_get_info(device)  # noqa: TID251
    return free * 9 // 10


def release(device: torch.device) -> None:
    """Give back what torch keeps of a GPU's memory without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # noqa: TID251


def restart_peak(device: torch.device) -> None:
    """Begin a new `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # noqa: TID251


def peak_bytes(device: torch.device) -> int:
    """Return the most that torch held of a GPU since `restart_peak`; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.max_memory_reserved(device))  # noqa: TID251


class TransferLanes:
    """Brings tensors to a device beside what it computes, two loads in turn.

    The processor is far ahead of a GPU that it gives work to: while products of one load
    wait for the GPU, the next load is read into page-locked memory and copied by a stream
    of its own. A load lasts until the one after the next begins.

    Parameters
    ----------
    device
        Where to.
    nbytes
        Of a load at most, each tensor rounded up to `ALIGNMENT`.
    """

    COUNT = 2
    ALIGNMENT = 256
    """Alignment of a tensor in page-locked memory: enough for any dtype and for cache lines."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        # torch.cpu has the same names, and does everything at once
        self._module: Any = torch.get_device_module(device)
        self._device = device
        self._stream = self._module.Stream(device)
        locked = device.type == "cuda"
        self._locked = [
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=locked) for _ in range(self.COUNT)
        ]
        self._copied = [self._module.Event() for _ in range(self.COUNT)]
        self._free = [self._module.Event() for _ in range(self.COUNT)]
        self._turn = 0
        for event in self._free:
            event.record(self._module.current_stream(device))

    @contextmanager
    def load(self, *, fresh: bool) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
        """Begin a load; what the device is given in the block it does beside other work.

        Parameters
        ----------
        fresh
            Whether it goes into memory that was just allocated, which work before may
            still use, and not into what this lane had the last time.

        Yields
        ------
        tuple
            The lane, 0 or 1, and a function that brings a tensor of the host to the device.
        """
        self._turn = lane = (self._turn + 1) % self.COUNT
        products = self._module.current_stream(self._device)
        # of the other lane all products are queued by now, of this one they were a load ago
        self._free[1 - lane].record(products)
        self._copied[lane].synchronize()
        taken = 0

        def send(tensor: Tensor) -> Tensor:
            nonlocal taken
            start, taken = taken, taken + _round_up(tensor.nbytes, self.ALIGNMENT)
            locked = self._locked[lane][start : start + tensor.nbytes].view(tensor.dtype)
            locked = locked.view(tensor.shape).copy_(tensor)
            return locked.to(self._device, non_blocking=True)

        with self._module.stream(self._stream):
            self._stream.wait_event(self._free[1 - lane if fresh else lane])
            yield lane, send
            self._copied[lane].record(self._stream)
        products.wait_event(self._copied[lane])

    @classmethod
    def room(cls, tensors: Iterable[int]) -> int:
        """Return the bytes of a load of tensors of so many bytes."""
        return sum(_round_up(nbytes, cls.ALIGNMENT) for nbytes in tensors)

    @classmethod
    def host_bytes(cls, nbytes: int) -> int:
        """Return what loads of so many bytes take of the host: torch locks powers of two."""
        return cls.COUNT * (1 << (nbytes - 1).bit_length())


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def has_bf16_products(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 matrices faster than float32 ones.

    True for GPUs, and for CPUs with AMX or AVX512-BF16: there one core does
    bf16 products at 2-3 times its float32 rate, elsewhere at a quarter of it.
    """
    if device.type != "cpu":
        return True
    if platform.system() != "Linux":
        return False
    words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("processor", 2)
    flags = set(words[1].split()) if len(words) > 1 else set()
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def compute_dtype(
    name: str, checkpoint_dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """Return the dtype of ``--compute-dtype``: ``auto``, ``checkpoint`` or ``float32``."""
    if name == "float32" or (name == "auto" and not has_bf16_products(device)):
        return torch.float32
    return checkpoint_dtype
