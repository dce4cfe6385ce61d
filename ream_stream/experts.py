"""The experts of a layer, run one by one from mapped tensors.

`StreamedExperts` takes the place of a layer's ``experts`` module. It is called
as every family calls it, ``(hidden_states, top_k_index, top_k_weights)``, and
gives the bits of transformers' grouped product, but holds the weights of one
expert at a time instead of a fused copy of all of them.

Letters in shapes: T tokens, K experts a token, E experts, R rows routed to one
expert, S = T * K slots, H hidden, I inner.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checkpoint.layouts import ExpertStack
from .checkpoint.source import MappedTensors

ROW_MULTIPLE = 64
"""Rows of a bf16 product on the CPU are rounded up to a multiple of this.

oneDNN compiles and keeps a kernel for every number of rows: 6 ms and 0.9 MB
each, a gigabyte after a few layers. Rows do not change each other's bits.
"""


MAX_ROWS = 1024
"""Tokens that an expert is run on at once.

A router may send all tokens of a batch to one expert, and a promise about memory has to
count that: with a bound it is a small part of a large batch. More rows are no faster.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """What the experts of one layer saw and did for one batch."""

    hidden_TH: Tensor
    """Inputs of the experts."""

    index_TK: Tensor
    """Experts of each token."""

    weight_TK: Tensor
    """Coefficients the model multiplies the outputs by."""

    norm_TK: Tensor
    """L2 norms of the outputs before that multiplication, float32."""


class ExpertWeights:
    """Weights of single experts in the dtype and on the device they are run in.

    Buffers are reused: what `load` returned is overwritten by the next `load`.
    """

    def __init__(
        self,
        tensors: MappedTensors,
        stack: ExpertStack,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.stack = stack
        self.dtype, self.device = dtype, device
        self._tensors = tensors
        inner, hidden = stack.inner, stack.hidden
        self._gate_up_2IH = torch.empty(2 * inner, hidden, dtype=dtype, device=device)
        self._down_HI = torch.empty(hidden, inner, dtype=dtype, device=device)

    def load(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return gate above up (2I, H), and down (H, I)."""
        names, inner = self.stack.experts[expert], self.stack.inner
        self._gate_up_2IH[:inner].copy_(self._tensors[names.gate])
        self._gate_up_2IH[inner:].copy_(self._tensors[names.up])
        # copied even where the dtype is right: the last bits of a product with one row
        # depend on the weights' alignment, and in a mapped file that is accidental
        return self._gate_up_2IH, self._down_HI.copy_(self._tensors[names.down])


class StreamedExperts(nn.Module):
    """Stands in for the ``experts`` module of one layer."""

    def __init__(self, original: nn.Module, weights: ExpertWeights) -> None:
        super().__init__()
        self.weights = weights
        self.listener: Callable[[Routed], None] | None = None
        self.only_listening = False
        self.dispatch: Callable[[Tensor, int], Iterable[tuple[int, Tensor]]] = slots_by_expert
        # float32 products on the CPU are of another library, which compiles nothing
        self._rounds_up = weights.device.type == "cpu" and weights.dtype != torch.float32
        self._gate: Any = original._apply_gate

    def inner(self, hidden_RH: Tensor, gate_up_2IH: Tensor) -> Tensor:
        """Return act(gate) * up, (R, I): what the down projection is applied to."""
        inner_RI: Tensor = self._gate(functional.linear(hidden_RH, gate_up_2IH))
        return inner_RI

    def _run(self, expert: int, hidden_TH: Tensor, token_R: Tensor) -> Tensor:
        """Return one expert's outputs (R, H) for some rows of the batch."""
        gate_up_2IH, down_HI = self.weights.load(expert)
        padded_R = _round_up(token_R) if self._rounds_up else token_R
        inner_RI = self.inner(hidden_TH.index_select(0, padded_R), gate_up_2IH)
        return functional.linear(inner_RI, down_HI)[: len(token_R)]

    @property
    def count(self) -> int:
        """Experts of the layer."""
        return len(self.weights.stack.experts)

    def activations(self, expert: int, hidden_TH: Tensor, token_R: Tensor) -> Tensor:
        """Return `inner` (R, I) of one expert for some rows of the batch."""
        gate_up_2IH, _ = self.weights.load(expert)
        found = []
        for part_R in token_R.chunk(-(-len(token_R) // MAX_ROWS)):
            padded_R = _round_up(part_R) if self._rounds_up else part_R
            inner_RI = self.inner(hidden_TH.index_select(0, padded_R), gate_up_2IH)
            found.append(inner_RI[: len(part_R)])
        return torch.cat(found)

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (T, H); zeros if only listening.

        The order of all operations is that of transformers' grouped product:
        each weighted output goes to the slot it was routed through, and the
        slots of a token are summed at once.
        """
        tokens, top_k = index_TK.shape
        weight_S = weight_TK.reshape(-1)
        dtype = torch.promote_types(hidden_TH.dtype, weight_TK.dtype)
        num_slots = 0 if self.only_listening else tokens * top_k
        slots_SH = hidden_TH.new_empty(num_slots, hidden_TH.shape[1], dtype=dtype)
        norm_S = hidden_TH.new_zeros(tokens * top_k, dtype=torch.float32)
        for expert, slots in self.dispatch(index_TK, self.count):
            # of equal size: a product with one row left over would have other last bits
            for slot_R in slots.chunk(-(-len(slots) // MAX_ROWS)):
                output_RH = self._run(expert, hidden_TH, slot_R // top_k)
                if self.listener is not None:
                    norm_R = torch.linalg.vector_norm(output_RH, dim=1, dtype=torch.float32)
                    norm_S.index_copy_(0, slot_R, norm_R)
                if not self.only_listening:
                    weighted_RH = output_RH * weight_S[slot_R, None]
                    slots_SH.index_copy_(0, slot_R, weighted_RH)
        if self.listener is not None:
            self.listener(
                Routed(
                    hidden_TH=hidden_TH,
                    index_TK=index_TK,
                    weight_TK=weight_TK,
                    norm_TK=norm_S.view(tokens, top_k),
                )
            )
        if self.only_listening:
            return torch.zeros_like(hidden_TH)
        return slots_SH.view(tokens, top_k, -1).sum(dim=1).to(hidden_TH.dtype)


def _round_up(token_R: Tensor) -> Tensor:
    """Return the rows with the first repeated up to the next multiple of `ROW_MULTIPLE`."""
    missing = -len(token_R) % ROW_MULTIPLE
    return torch.cat([token_R, token_R[:1].expand(missing)]) if missing else token_R


def slots_by_expert(index_TK: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that has tokens, with the slots t * K + k routed to it."""
    # the same call as transformers': the order of rows decides the last bits of a product
    sorted_S, slot_S = torch.sort(index_TK.reshape(-1))
    bounds = torch.searchsorted(sorted_S, torch.arange(num_experts + 1, device=sorted_S.device))
    for expert, (start, stop) in enumerate(
        zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ):
        if start < stop:
            yield expert, slot_S[start:stop]
