"""One expert of a layer, and what can be done to its neurons without changing it.

Letters in shapes: H hidden, I inner width (neurons) of the expert.
"""

from typing import NamedTuple

from torch import Tensor


class Expert(NamedTuple):
    """The matrices of ``f(x) = down @ (act(gate @ x) * (up @ x))``."""

    gate_IH: Tensor
    """Rows that the activation function is applied to."""

    up_IH: Tensor
    """Rows that multiply the activated gate."""

    down_HI: Tensor
    """Columns that carry the neurons back to the hidden size."""


def reorder(expert: Expert, order_I: Tensor) -> Expert:
    """Return the same function with neuron ``order_I[q]`` at place q."""
    order_I = order_I.to(expert.gate_IH.device)
    return Expert(
        gate_IH=expert.gate_IH.index_select(0, order_I),
        up_IH=expert.up_IH.index_select(0, order_I),
        down_HI=expert.down_HI.index_select(1, order_I),
    )
