"""One expert of a layer, and what can be done to its neurons without changing it.

Letters in shapes: H hidden, I inner width (neurons) of the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Expert(NamedTuple):
    """The matrices of ``f(x) = down @ (act(gate @ x) * (up @ x))``."""

    gate_IH: Tensor
    """Gate projection; the activation function is applied to its product."""

    up_IH: Tensor
    """Up projection; its product multiplies the activated gate."""

    down_HI: Tensor
    """Down projection from the neurons to the hidden size."""


_NEURON_AXIS: Mapping[str, int | None] = {
    "gate": 0,
    "up": 0,
    "down": 1,
    "gate_bias": 0,
    "up_bias": 0,
    "down_bias": None,
}


def reorder(expert: Expert, order_I: Tensor) -> Expert:
    """Return the same function with neuron ``order_I[q]`` at place q."""
    gate_IH, up_IH, down_HI = (
        reorder_part(part, value, order_I)
        for part, value in zip(("gate", "up", "down"), expert, strict=True)
    )
    return Expert(gate_IH=gate_IH, up_IH=up_IH, down_HI=down_HI)


def reorder_part(part: str, value: Tensor, order_I: Tensor) -> Tensor:
    """Return one matrix, or bias, of an expert with neuron ``order_I[q]`` at place q."""
    axis = _NEURON_AXIS[part]
    return value if axis is None else value.index_select(axis, order_I.to(value.device))
