"""The machine's processors: the only module that speaks of CUDA."""

import platform
from pathlib import Path

import torch

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
