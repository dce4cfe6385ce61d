"""Known GPUs, with the rates of their data sheets, for plans of machines that are not here."""

from collections.abc import Mapping
from dataclasses import dataclass

from ream_stream.errors import UsageError

EFFICIENCY = 0.5
"""Share of a data sheet's rates that a plan counts on: assumed, not measured."""

_MEMORY_SHARE = 0.9
_PCIE_4, _PCIE_5 = 32e9, 64e9  # 16 lanes, in one direction


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Memory and rates of a GPU, as its vendor tells them: dense, without sparsity."""

    name: str
    """Name of ``--gpu``."""

    memory_bytes: int
    """Bytes of its memory."""

    bf16: float
    """Operations a second of bf16 products that are summed in float32."""

    float32: float
    """Operations a second of float32 products."""

    bandwidth: float
    """Bytes of its memory read or written a second."""

    link: float
    """Bytes copied from the host a second."""

    source: str
    """The publication that the numbers are from."""

    @property
    def budget_bytes(self) -> int:
        """Memory that a plan may use, the share that a free GPU would be given."""
        return int(_MEMORY_SHARE * self.memory_bytes)


def _gpu(
    name: str,
    gigabytes: int,
    tera_bf16: float,
    tera_float32: float,
    giga_bandwidth: int,
    link: float,
    source: str,
) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=gigabytes * 10**9,
        bf16=tera_bf16 * 1e12,
        float32=tera_float32 * 1e12,
        bandwidth=giga_bandwidth * 1e9,
        link=link,
        source=source,
    )


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("rtx-3090", 24, 71, 35.6, 936, _PCIE_4, "NVIDIA Ampere GA102 whitepaper"),
        _gpu("rtx-4090", 24, 165.2, 82.6, 1008, _PCIE_4, "NVIDIA Ada architecture whitepaper"),
        _gpu("rtx-5090", 32, 209.5, 104.8, 1792, _PCIE_5, "NVIDIA RTX Blackwell whitepaper"),
        _gpu("l40s", 48, 362, 91.6, 864, _PCIE_4, "NVIDIA L40S data sheet"),
        _gpu("a100-40gb", 40, 312, 19.5, 1555, _PCIE_4, "NVIDIA A100 data sheet"),
        _gpu("a100-80gb", 80, 312, 19.5, 2039, _PCIE_4, "NVIDIA A100 data sheet, SXM"),
        _gpu("h100", 80, 989, 67, 3350, _PCIE_5, "NVIDIA H100 data sheet, SXM"),
        _gpu("h100-pcie", 80, 756, 51, 2000, _PCIE_5, "NVIDIA H100 data sheet, PCIe"),
        _gpu("h200", 141, 989, 67, 4800, _PCIE_5, "NVIDIA H200 data sheet, SXM"),
    )
}
"""Known GPUs by name; a card differs from its data sheet by its clocks and its slot."""


def gpu_named(name: str) -> Gpu:
    """Return a GPU of the table.

    Raises
    ------
    UsageError
        There is no such name.
    """
    if name not in GPUS:
        raise UsageError(f"--gpu {name}: there are {', '.join(GPUS)}; others by --vram")
    return GPUS[name]
