"""The machine's processors: the only module that uses CUDA."""

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ream_stream.errors import UsageError

_SIGNS_OF_A_GPU = ("proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*")


def choose_device(name: str) -> torch.device:
    """Return the device of ``--device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.

    Raises
    ------
    UsageError
        This machine has no such device.
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


def unused_gpu(system: Path = Path("/")) -> str | None:
    """Return a note if the machine has an NVIDIA GPU that torch cannot use, otherwise None.

    Parameters
    ----------
    system
        Root of the file system that drivers and devices are looked for in.
    """
    if torch.cuda.is_available():  # noqa: TID251
        return None
    signs = [path for sign in _SIGNS_OF_A_GPU for path in sorted(system.glob(sign))]
    if not signs:
        return None
    built = torch.version.cuda
    reason = (
        f"torch {torch.__version__} is built without CUDA; install one that is "
        "(docs/how-to/use-a-gpu.md)"
        if built is None
        else f"torch {torch.__version__} for CUDA {built} finds none; nvidia-smi tells whether "
        "its driver runs, and a container needs --gpus all"
    )
    return f"there is a GPU ({signs[0]}) that is not used: {reason}"


def count() -> int:
    """Return the number of GPUs of this machine."""
    return torch.cuda.device_count()  # noqa: TID251


def kind(device: torch.device) -> str:
    """Return what decides the last bits of products on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)  # noqa: TID251
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def is_here(device: torch.device) -> bool:
    """Tell whether this machine has a device of this kind."""
    return device.type == "cpu" or torch.cuda.is_available()  # noqa: TID251


def free_bytes(device: torch.device) -> int:
    """Return 90% of a GPU's free memory: libraries allocate some themselves."""
    free, _ = torch.cuda.mem_get_info(device)  # noqa: TID251
    return free * 9 // 10


def release(device: torch.device) -> None:
    """Return the GPU memory that torch caches but does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # noqa: TID251


def restart_peak(device: torch.device) -> None:
    """Reset the peak that `peak_bytes` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # noqa: TID251


def peak_bytes(device: torch.device) -> int:
    """Return torch's peak of reserved GPU memory since `restart_peak`; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.max_memory_reserved(device))  # noqa: TID251


def host_empty(shape: Sequence[int], dtype: torch.dtype, *, locked: bool) -> Tensor:
    """Return uninitialized host memory; page-locked for copies to and from a device."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=locked)


def locked_bytes(nbytes: int) -> int:
    """Return the bytes that torch locks for page-locked memory: a power of two."""
    return 1 << (nbytes - 1).bit_length()


def to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Start to copy a tensor to the host; return the copy and what waits until it is there.

    A tensor on the host is its own copy.
    """
    if tensor.device.type == "cpu":
        return tensor, lambda: None
    host = host_empty(tensor.shape, tensor.dtype, locked=True)
    host.copy_(tensor, non_blocking=True)
    module: Any = torch.get_device_module(tensor.device)
    copied = module.Event()
    copied.record(module.current_stream(tensor.device))
    return host, copied.synchronize


class TransferLanes:
    """Copies tensors to a device while it computes, in two alternating lanes.

    The processor queues work far ahead of the GPU: while products of one load wait for
    the GPU, the next load is read into page-locked memory and copied by a stream of its
    own. A load's memory is reused by the second load after it.

    Parameters
    ----------
    device
        Target device.
    nbytes
        Most bytes of a load, each tensor rounded up to `ALIGNMENT`.
    """

    COUNT = 2
    ALIGNMENT = 256
    """Alignment of a tensor in page-locked memory: enough for any dtype and for cache lines."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        # torch.cpu has the same functions; they finish at once
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
        """Begin a load; the device does the work of the block in parallel to its products.

        Parameters
        ----------
        fresh
            Whether the load fills newly allocated memory, which earlier work may still
            use, and not the buffers of this lane's last load.

        Yields
        ------
        tuple
            The lane, 0 or 1, and a function that copies a host tensor to the device.
        """
        self._turn = lane = (self._turn + 1) % self.COUNT
        products = self._module.current_stream(self._device)
        # all products of the other lane are queued by now, those of this lane since one load
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
        """Return the bytes of a load, given the bytes of each tensor."""
        return sum(_round_up(nbytes, cls.ALIGNMENT) for nbytes in tensors)

    @classmethod
    def host_bytes(cls, nbytes: int) -> int:
        """Return the host bytes of all lanes, given a load's."""
        return cls.COUNT * locked_bytes(nbytes)


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def has_bf16_products(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 matrices faster than float32 ones.

    True for GPUs, and for CPUs with AMX or AVX512-BF16: one core of these computes
    bf16 products at 2-3 times its float32 rate, other cores at a quarter of it.
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
