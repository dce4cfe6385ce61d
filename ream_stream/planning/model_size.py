"""How large a model is, in the numbers that people compare models by: from headers alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ream_stream.checkpoint.config_json import find_mtp, text_config
from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.quantized import find_quantized, tensors_of
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.model.families import FAMILIES, TOP_K_KEYS

CONTEXT_KEYS = ("max_position_embeddings", "model_max_length", "max_sequence_length")
"""Keys of config.json for the longest context in tokens."""

BITS = (16, 8, 4)
"""Bits a parameter that sizes are told for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """Parameters of a model, those of multi-token-prediction layers left out."""

    beside: int
    """Parameters beside the routed experts."""

    experts: tuple[tuple[int, int], ...]
    """Number of routed experts of each MoE layer, and parameters of one of them."""

    top_k: int | None
    """Number of experts that the router selects for a token; None if it is not told."""

    routers: int = 0
    """Parameters of `beside` that one expert in every layer accounts for: router rows."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.beside + sum(count * size for count, size in self.experts)

    @property
    def active(self) -> int | None:
        """Parameters that are used for a token; None if `top_k` is not known."""
        if self.top_k is None:
            return None
        return self.beside + sum(min(self.top_k, count) * size for count, size in self.experts)

    def with_experts(
        self, number: int, *, wider: Fraction = Fraction(1), slices: int = 1
    ) -> "ModelSize":
        """Return the size of the same model with another number of experts in each layer.

        They are so many times as wide, and a token is sent to a `slices`-th of them.
        """
        more = number - self.experts[0][0] if self.experts else 0
        return ModelSize(
            beside=self.beside + more * self.routers,
            experts=tuple((number, int(size * wider)) for _, size in self.experts),
            top_k=None if self.top_k is None else self.top_k // slices,
            routers=self.routers,
        )

    def facts(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them; bytes are those of the codes alone."""
        return {
            "total": self.total,
            "active": self.active,
            "bytes_at_bits": {str(bits): self.total * bits // 8 for bits in BITS},
        }


def model_size(checkpoint: Checkpoint) -> ModelSize:
    """Count the parameters of a checkpoint, quantized ones as the floats they stand for.

    Raises
    ------
    UnsupportedModelError
        Tensors are stored in a scheme that is not read.
    DamagedError
        Tensors contradict each other.
    """
    stacks, entries = checkpoint.experts, checkpoint.entries
    inside = {name for stack in stacks.values() for name in stack.slots()}
    mtp = find_mtp(entries, checkpoint.config)
    beside = {n: e for n, e in entries.items() if n not in inside and n not in mtp}
    coded = find_quantized(beside, checkpoint.quantization)
    parts = {name for stored in coded.values() for name in tensors_of(stored)}
    layers = [
        stack
        for prefix, stack in stacks.items()
        if not find_mtp([prefix + "."], checkpoint.config)
    ]
    return ModelSize(
        beside=sum(e.num_elements for name, e in beside.items() if name not in parts)
        + sum((s.count or 1) * s.rows * s.cols for s in coded.values()),
        experts=tuple((stack.count, _expert_size(stack)) for stack in layers),
        top_k=_number(checkpoint.config, TOP_K_KEYS),
        routers=sum(_router_row(checkpoint, stack) for stack in layers),
    )


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the longest context in tokens; None if config.json does not tell it."""
    return _number(config, CONTEXT_KEYS)


def stored_as(checkpoint: Checkpoint) -> str:
    """Return how routed experts are stored, or all tensors of a model without them."""
    schemes = {
        stack.dtype if stack.scheme == "plain" else stack.scheme
        for stack in checkpoint.experts.values()
    }
    return ", ".join(sorted(schemes or {entry.dtype for entry in checkpoint.entries.values()}))


def _expert_size(stack: ExpertStack) -> int:
    return sum(matrix.stored.rows * matrix.stored.cols for matrix in stack.matrices)


def _router_row(checkpoint: Checkpoint, stack: ExpertStack) -> int:
    """Return the parameters of one expert in the router's tensors; 0 of unknown families."""
    family = FAMILIES.get(str(text_config(checkpoint.config).get("model_type")))
    if family is None:
        return 0
    names, _ = family.router_tensors(stack.block, checkpoint.entries)
    shapes = [checkpoint.entries[name].shape for name in names if name in checkpoint.entries]
    return sum(math.prod(shape) for shape in shapes) // stack.count


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Return the first number above 0 under one of the keys; of a list its largest."""
    for part in (text_config(config), config):
        for key in keys:
            value = part.get(key)
            values = value if isinstance(value, list) else [value]
            known = [each for each in values if type(each) is int and each > 0]
            if known:
                return max(known)
    return None
