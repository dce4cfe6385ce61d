"""What a phase of a run reads, writes and computes, as numbers to be added up."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

PHASES = (
    *("check", "observe", "follow", "compare", "align", "cut"),
    *("refit", "write", "propagate", "finish"),
)
"""Phases in the order of their first use; a layer has all except the last."""

DIVIDED = frozenset({"observe", "follow", "compare", "align", "cut", "propagate"})
"""Phases whose work ranks divide evenly; of a refit and of writing they divide a part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Work of one phase or of all phases."""

    read_bytes: int = 0
    """Bytes read from files."""

    cached_bytes: int = 0
    """Part of `read_bytes` that the run touched just before; the page cache should hold it."""

    written_bytes: int = 0
    """Bytes written to files."""

    expert_flop: int = 0
    """Floating-point operations of experts on the tokens routed to them."""

    product_flop: int = 0
    """Floating-point operations of other products, on all tokens or on the sample."""

    float32_flop: int = 0
    """Floating-point operations of float32 products: those of alignments and refits."""

    matchings: int = 0
    """Number of assignments of I neurons to I neurons."""

    merged_numbers: int = 0
    """Numbers in the experts that are merged."""

    decoded_numbers: int = 0
    """Numbers in the quantized matrices that are decoded."""

    encoded_numbers: int = 0
    """Numbers in the merged experts that are encoded."""

    @property
    def flop(self) -> int:
        """All products."""
        return self.expert_flop + self.product_flop + self.float32_flop

    def __add__(self, other: "Cost") -> "Cost":
        names = [field.name for field in fields(self)]
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in names})


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum."""
    return sum(costs, start=Cost())
