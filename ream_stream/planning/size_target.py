"""What an output is to take at most, on disk or where it is served, and what it does take."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ream_stream.units import format_size

from .kv_cache import cache_bytes
from .model_size import context_length, model_size
from .plan import Plan
from .serving_limits import CONTEXT


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeTarget:
    """Bytes that an output is to take at most."""

    option: str
    """Option of the command line that gave it."""

    num_bytes: int
    """Most bytes."""

    serves: bool = False
    """Whether they are of memory, in which a key-value cache is beside the weights."""

    context: int | None = None
    """Tokens in the cache; None for `CONTEXT`, or the model's longest if that is less."""

    bits: float | None = None
    """Bits of a parameter in memory; None if weights stay as they are written."""

    def tokens(self, plan: Plan) -> int:
        """Return the tokens in the cache."""
        longest = context_length(plan.source.config) or CONTEXT
        return (self.context or min(CONTEXT, longest)) if self.serves else 0

    def cache(self, plan: Plan) -> int:
        """Return the bytes of the cache; 0 if only weights count.

        Raises
        ------
        UsageError
            It is not known.
        """
        return cache_bytes(plan.source_model, self.tokens(plan)) if self.serves else 0

    def weights(self, plan: Plan) -> int:
        """Return the bytes of the output's weights."""
        if self.bits is None:
            return plan.output_bytes
        parameters = model_size(plan.output_model.checkpoint).total
        return -int(-Fraction(self.bits) * parameters // 8)

    def needed(self, plan: Plan) -> int:
        """Return the bytes that the output takes: weights and cache."""
        return self.weights(plan) + self.cache(plan)

    def expert_bytes(self, plan: Plan) -> Fraction:
        """Return what one expert more in every layer adds, its router rows counted."""
        if self.bits is not None:
            size = model_size(plan.output_model.checkpoint)
            one = size.routers + sum(each for _, each in size.experts)
            return Fraction(self.bits) * one / 8
        total = 0
        for layer in plan.moe_layers:
            assert layer.stack is not None
            counted = {*layer.stack.slots(), *layer.routers}
            total += sum(t.nbytes for s in layer.shards for t in s.tensors if t.name in counted)
        return Fraction(total, plan.settings.experts)

    def share(self, plan: Plan) -> Fraction:
        """Return the share of routed experts that there is room for: below 0 if for none."""
        one = self.expert_bytes(plan)
        fixed = self.needed(plan) - one * plan.settings.experts
        source, output = plan.experts
        all_of_them = one * source.count * Fraction(source.inner, output.inner)
        return (self.num_bytes - fixed) / all_of_them

    def facts(self, plan: Plan) -> dict[str, Any]:
        """Return what was asked for and what it came to, as JSON can hold it."""
        source, output = plan.experts
        share = Fraction(output.count * output.inner, source.count * source.inner)
        weights, cache = self.weights(plan), self.cache(plan)
        facts = {
            "option": self.option,
            "bytes": self.num_bytes,
            "bits": self.bits,
            "context": self.tokens(plan) or None,
            "weights_bytes": weights,
            "cache_bytes": cache,
            "share": float(share),
        }
        at = "" if self.bits is None else f" at {self.bits:g} bits"
        beside = (
            f" and {format_size(cache)} of KV cache for {facts['context']} tokens"
            if self.serves
            else ""
        )
        sentence = (
            f"{self.option} {format_size(self.num_bytes)} has room for {float(share):.1%} of "
            f"the routed experts: {format_size(weights)} of weights{at}{beside}"
        )
        return {**facts, "sentence": sentence}
