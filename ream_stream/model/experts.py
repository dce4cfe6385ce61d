"""The experts of a layer, run one by one from mapped tensors.

`StreamedExperts` takes the place of a layer's ``experts`` module. It is called
as every family calls it, ``(hidden_states, top_k_index, top_k_weights)``, and
gives the bits of transformers' grouped product, but holds the weights of one
expert at a time instead of a fused copy of all of them.

Letters in shapes: T tokens, K experts a token, E experts, R rows routed to one
expert, S = T * K slots, H hidden, I inner.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ream_stream.checkpoint.expert_stack import ExpertStack, Send, Tensors, stay
from ream_stream.model.device import TransferLanes

from .expert_rows import round_up, slots_by_expert
from .llama4 import EXPERTS

MAX_ROWS = 1024
"""Most tokens that an expert processes at once.

A router may send all tokens of a batch to one expert, and a promise about memory has to
count that: with a bound it is a small part of a large batch. More rows are no faster.
"""


WITHOUT_FLAGS = frozenset({EXPERTS, "Step3p7Experts"})
"""Classes of experts with their own forward, without transformers' grouped product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """Inputs and outputs of one layer's experts for one batch."""

    hidden_TH: Tensor
    """Hidden states that enter the experts."""

    index_TK: Tensor
    """Indices of the experts of each token."""

    weight_TK: Tensor
    """Router coefficients that the model multiplies the expert outputs by."""

    norm_TK: Tensor
    """L2 norms of the expert outputs before the router coefficients, float32."""


@dataclass(kw_only=True, slots=True)
class BlockState:
    """Partial sums and norms of one batch, carried from one block of experts to the next."""

    experts: range
    """Experts of the block; others are skipped."""

    is_last: bool = True
    """Whether this is the last block: then the listener is called and the sum is complete."""

    norm_S: Tensor | None = None
    """Norms of expert outputs up to this block; None before the first block."""

    sum_TH: Tensor | None = None
    """Weighted sum of expert outputs up to this block, float32; None before the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a family's experts module uses its weights; flags of transformers."""

    is_gated: bool = True
    """Whether experts have a gate projection in addition to the up projection."""

    is_interleaved: bool = False
    """Whether gate and up rows alternate; otherwise all gate rows come first."""

    is_transposed: bool = False
    """Whether weights have inputs as rows, which decides the last bits of products."""

    has_bias: bool = False
    """Whether both products have biases."""

    adds_in_turn: bool = False
    """Whether expert outputs are added one after another in the model's dtype."""

    @classmethod
    def of(cls, module: nn.Module) -> "Form":
        """Return the form of an experts module."""
        name = type(module).__name__
        if name in WITHOUT_FLAGS:
            return cls(is_transposed=name == EXPERTS, adds_in_turn=name != EXPERTS)
        return cls(
            is_gated=bool(getattr(module, "has_gate", True)),
            is_interleaved=not getattr(module, "is_concatenated", True),
            is_transposed=bool(getattr(module, "is_transposed", False)),
            has_bias=bool(getattr(module, "has_bias", False)),
        )


class Loaded(NamedTuple):
    """The weights of one expert."""

    gate_up: Tensor
    """Gate and up projection, (2I, H); without a gate (I, H)."""

    down_HI: Tensor
    """Down projection, (H, I)."""

    gate_up_bias: Tensor | None = None
    """Bias of the gate and up product; None if the family has no biases."""

    down_bias_H: Tensor | None = None
    """Bias of the down product; None if the family has no biases."""


class ExpertWeights:
    """Weights of single experts in the dtype and on the device of their forward pass.

    Buffers are reused: `load` overwrites the weights that the previous `load` returned.

    Parameters
    ----------
    tensors, stack
        Tensors of the layer, and the layout of its experts.
    dtype, device
        Dtype and device of the forward pass.
    form
        How the family's module uses the weights.
    beside
        Whether an expert is loaded during the products of the previous one; by default on
        devices that compute asynchronously.
    """

    def __init__(
        self,
        tensors: Tensors,
        stack: ExpertStack,
        dtype: torch.dtype,
        device: torch.device,
        form: Form | None = None,
        *,
        beside: bool | None = None,
    ) -> None:
        self.stack = stack
        self.dtype, self.device = dtype, device
        self._tensors = tensors
        self.form = form or Form()
        self.resident = 0
        """Whole experts that there is room for; of down projections alone thrice as many."""
        self._only: str | None = None
        self._loaded = stack
        self._kept: dict[int, Loaded] = {}
        beside = device.type != "cpu" if beside is None else beside
        self._shared = [self._buffers() for _ in range(TransferLanes.COUNT if beside else 1)]
        self._lanes = TransferLanes(device, TransferLanes.room(stack.sizes)) if beside else None

    def _buffers(self) -> tuple[Loaded, dict[str, Tensor]]:
        """Return buffers for the weights of one expert, whole and by part."""
        stack, form, dtype, device = self.stack, self.form, self.dtype, self.device
        rows = stack.inner * (2 if form.is_gated else 1)

        def empty(outputs: int, inputs: int) -> Tensor:
            shape = (inputs, outputs) if form.is_transposed else (outputs, inputs)
            matrix = torch.empty(shape, dtype=dtype, device=device)
            return matrix.T if form.is_transposed else matrix

        def bias(length: int) -> Tensor | None:
            return torch.empty(length, dtype=dtype, device=device) if form.has_bias else None

        loaded = Loaded(
            empty(rows if self._loads("up") else 0, stack.hidden),
            empty(stack.hidden, stack.inner if self._loads("down") else 0),
            bias(rows),
            bias(stack.hidden),
        )
        parts = {"down": loaded.down_HI}
        for suffix, both in (("", loaded.gate_up), ("_bias", loaded.gate_up_bias)):
            if both is not None:
                gate, up = (both[0::2], both[1::2]) if form.is_interleaved else both.chunk(2)
                split = {"gate": gate, "up": up} if form.is_gated else {"up": both}
                parts |= {part + suffix: value for part, value in split.items()}
        if loaded.down_bias_H is not None:
            parts["down_bias"] = loaded.down_bias_H
        return loaded, parts

    def _loading(self, *, fresh: bool) -> AbstractContextManager[tuple[int, Send]]:
        """Return the index of the buffers and a function that sends tensors to the device."""
        if self._lanes is None:
            return nullcontext((0, stay))
        return self._lanes.load(fresh=fresh)

    def _loads(self, part: str) -> bool:
        """Tell whether a part of an expert, or its bias, is loaded."""
        return self._only is None or part.startswith("down") == (self._only == "down")

    def turn_to(self, experts: range, only: str | None = None) -> None:
        """Drop all resident experts that are not in the block.

        Parameters
        ----------
        experts
            The block.
        only
            ``gate_up`` or ``down`` to load these projections alone from now on; None for all.
        """
        if only != self._only:
            self._only, self._kept = only, {}
            matrices = tuple(m for m in self.stack.matrices if self._loads(m.parts[0]))
            self._loaded = replace(self.stack, matrices=matrices)
        self._kept = {e: loaded for e, loaded in self._kept.items() if e in experts}

    def load(self, expert: int) -> Loaded:
        """Return the weights of an expert; the first `resident` experts of a block are kept."""
        if expert in self._kept:
            return self._kept[expert]
        keeps = len(self._kept) < self.resident * (3 if self._only == "down" else 1)
        fresh = self._buffers() if keeps else None
        with self._loading(fresh=keeps) as (lane, send):
            loaded, parts = fresh or self._shared[lane]
            for matrix in self._loaded.matrices:
                found = matrix.read(self._tensors, expert, self.dtype, send)
                for part, value in found.items():
                    # copied even if the dtype is right: the last bits of a product with one
                    # row depend on the weights' alignment, which is arbitrary in a mapped file
                    parts[part].copy_(value)
        if keeps:
            self._kept[expert] = loaded
        if expert + 1 < self.stack.count:
            self._tensors.ahead(self._loaded, expert + 1)
        return loaded


InnerListener = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with an expert, inputs of its down projection (R, I), the rows of the batch that they
are of (R,), and their router coefficients (R,)."""


class StreamedExperts(nn.Module):
    """Replaces the ``experts`` module of one layer."""

    def __init__(self, original: nn.Module, weights: ExpertWeights) -> None:
        super().__init__()
        self.weights = weights
        self.listener: Callable[[Routed], None] | None = None
        self.inner_listener: InnerListener | None = None
        self.captures_only = False
        self.part: BlockState | None = None
        self.dispatch: Callable[[Tensor, int], Iterable[tuple[int, Tensor]]] = slots_by_expert
        # another library makes float32 products on the CPU, and it compiles no kernels
        self._rounds_up = weights.device.type == "cpu" and weights.dtype != torch.float32
        form = weights.form
        self._activate: Any = _activation(original, form)

    def inner(self, hidden_RH: Tensor, loaded: Loaded) -> Tensor:
        """Return act(gate) * up, (R, I), the input of the down projection."""
        product = functional.linear(hidden_RH, loaded.gate_up)
        if loaded.gate_up_bias is not None:
            product.add_(loaded.gate_up_bias)
        inner_RI: Tensor = self._activate(product)
        return inner_RI

    def _run(self, expert: int, hidden_TH: Tensor, token_R: Tensor, weight_R: Tensor) -> Tensor:
        """Return one expert's outputs (R, H) for the given rows of the batch."""
        loaded = self.weights.load(expert)
        padded_R = round_up(token_R) if self._rounds_up else token_R
        inner_RI = self.inner(hidden_TH.index_select(0, padded_R), loaded)
        if self.inner_listener is not None:
            self.inner_listener(expert, inner_RI[: len(token_R)], token_R, weight_R)
        output_RH = functional.linear(inner_RI, loaded.down_HI)[: len(token_R)]
        return output_RH if loaded.down_bias_H is None else output_RH.add_(loaded.down_bias_H)

    @property
    def count(self) -> int:
        """Number of experts in the layer."""
        return self.weights.stack.count

    def activations(self, loaded: Loaded, hidden_TH: Tensor, token_R: Tensor) -> Tensor:
        """Return `inner` of one expert for the given rows of the batch.

        If the number of rows is rounded up, the additional rows are zeros.
        """
        padded_R = round_up(token_R) if self._rounds_up else token_R
        inner_RI = torch.cat(
            [
                self.inner(hidden_TH.index_select(0, part_R), loaded)
                for part_R in padded_R.chunk(-(-len(padded_R) // MAX_ROWS))
            ]
        )
        inner_RI[len(token_R) :] = 0
        return inner_RI

    def _outputs(self, hidden_TH: Tensor, weight_TK: Tensor) -> "_Slots | _Sums | None":
        """Return the accumulator of expert outputs; None if only capturing."""
        if self.captures_only:
            return None
        if self.part is not None:
            return _Sums(hidden_TH, weight_TK.shape[1], self.part)
        if not self.weights.form.adds_in_turn:
            return _Slots(hidden_TH, weight_TK)
        part = BlockState(experts=range(self.count), sum_TH=torch.zeros_like(hidden_TH))
        return _Sums(hidden_TH, weight_TK.shape[1], part)

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (T, H); zeros if only capturing.

        The order of all operations is that of transformers' grouped product:
        each weighted output goes to the slot it was routed through, and the
        slots of a token are summed at once. If experts run in blocks, or if the
        family's own code does so, outputs are added expert after expert, which may
        change the last bits.
        """
        tokens, top_k = index_TK.shape
        part = self.part or BlockState(experts=range(self.count))
        weight_S = weight_TK.reshape(-1)
        if part.norm_S is None:
            part.norm_S = hidden_TH.new_zeros(tokens * top_k, dtype=torch.float32)
        self.weights.turn_to(part.experts)
        norm_S, outputs = part.norm_S, self._outputs(hidden_TH, weight_TK)
        for expert, slots in self.dispatch(index_TK, self.count):
            if expert not in part.experts:
                continue
            # equal sizes: a product of a single remaining row would have other last bits
            for slot_R in slots.chunk(-(-len(slots) // MAX_ROWS)):
                weight_R = weight_S[slot_R]
                output_RH = self._run(expert, hidden_TH, slot_R // top_k, weight_R)
                if self.listener is not None:
                    norm_R = torch.linalg.vector_norm(output_RH, dim=1, dtype=torch.float32)
                    norm_S.index_copy_(0, slot_R, norm_R)
                if outputs is not None:
                    outputs.add(slot_R, output_RH * weight_R[:, None])
        if self.listener is not None and part.is_last:
            self.listener(
                Routed(
                    hidden_TH=hidden_TH,
                    index_TK=index_TK,
                    weight_TK=weight_TK,
                    norm_TK=norm_S.view(tokens, top_k),
                )
            )
        if outputs is None:
            return torch.zeros_like(hidden_TH)
        return outputs.total().to(hidden_TH.dtype)


class _Slots:
    """Weighted outputs in the slots of their tokens; the slots are summed at once."""

    def __init__(self, hidden_TH: Tensor, weight_TK: Tensor) -> None:
        (_, hidden), (tokens, top_k) = hidden_TH.shape, weight_TK.shape
        dtype = torch.promote_types(hidden_TH.dtype, weight_TK.dtype)
        self._slots_TKH = hidden_TH.new_empty(tokens, top_k, hidden, dtype=dtype)

    def add(self, slot_R: Tensor, weighted_RH: Tensor) -> None:
        self._slots_TKH.view(-1, weighted_RH.shape[1]).index_copy_(0, slot_R, weighted_RH)

    def total(self) -> Tensor:
        return self._slots_TKH.sum(dim=1)


class _Sums:
    """Sum of weighted outputs, expert after expert; in float32 unless a sum is given."""

    def __init__(self, hidden_TH: Tensor, top_k: int, part: BlockState) -> None:
        if part.sum_TH is None:
            part.sum_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        self._sum_TH, self._top_k = part.sum_TH, top_k

    def add(self, slot_R: Tensor, weighted_RH: Tensor) -> None:
        # an expert has each token once, so the order of additions is the order of experts
        weighted_RH = weighted_RH.to(self._sum_TH.dtype)
        self._sum_TH.index_add_(0, slot_R // self._top_k, weighted_RH)

    def total(self) -> Tensor:
        return self._sum_TH


def _activation(original: Any, form: Form) -> Callable[[Tensor], Tensor]:  # noqa: ANN401
    """Return the function from the first product, (R, 2I) or (R, I), to `inner`, (R, I)."""
    own = getattr(original, "_apply_gate", None)

    def activate(product: Tensor) -> Tensor:
        if form.is_gated and own is None:
            gate_RI, up_RI = product.chunk(2, dim=-1)
            gated_RI: Tensor = original.act_fn(gate_RI) * up_RI
            return gated_RI
        inner_RI: Tensor = own(product) if own and form.is_gated else original.act_fn(product)
        return inner_RI

    return activate
