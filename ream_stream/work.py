"""What a run reads, writes and computes, phase by phase: arithmetic on a plan.

Letters: T calibration tokens, L tokens of a sequence, K experts a token, E experts,
H hidden, I inner. A product of (n, a) with (a, b) is counted as 2 n a b operations.
Norms, activations, routing and softmax are not counted.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from .budget import OUTPUTS
from .checkpoint.stacks import ExpertStack
from .method.alignment import ALIGNMENTS
from .plan import LayerPlan, Plan

PHASES = ("observe", "compare", "align", "write", "propagate", "finish")
"""In the order in which they first occur; a layer has the first five."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is to be done, in one phase or in all."""

    read_bytes: int = 0
    """Read from files; of them"""

    cached_bytes: int = 0
    """are in the page cache, having been read or written a moment before."""

    written_bytes: int = 0
    """Written to files."""

    expert_flop: int = 0
    """Of experts on the tokens that are routed to them."""

    product_flop: int = 0
    """Of other products, on all tokens or on the sample."""

    float32_flop: int = 0
    """Of products that are made in float32 on the processor: the costs of the alignment."""

    matchings: int = 0
    """Assignments of I neurons to I neurons."""

    merged_numbers: int = 0
    """Numbers of the experts that go into merges."""

    @property
    def flop(self) -> int:
        """All products."""
        return self.expert_flop + self.product_flop + self.float32_flop

    def __add__(self, other: "Work") -> "Work":
        names = [field.name for field in fields(self)]
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in names})


def total(works: Iterable[Work]) -> Work:
    """Return the sum."""
    return sum(works, start=Work())


def work_of(plan: Plan, *, cache_bytes: int, committed: int = 0) -> dict[str, Work]:
    """Return the work of a run by phase.

    Parameters
    ----------
    plan
        The run.
    cache_bytes
        Memory that the page cache may take. A layer that does not fit in it is read
        again in each phase, its experts for each batch.
    committed
        Layers that are done already.
    """
    phases = dict.fromkeys(PHASES, Work())
    for layer in plan.layers[committed:]:
        for phase, work in _Layer(plan, layer, cache_bytes).phases().items():
            phases[phase] += work
    outside = sum(tensor.nbytes for shard in plan.outside for tensor in shard.tensors)
    written = sum(shard.nbytes for shard in plan.outside)
    phases["finish"] = Work(read_bytes=outside, written_bytes=written)
    return phases


class _Layer:
    """The work on one layer."""

    def __init__(self, plan: Plan, layer: LayerPlan, cache_bytes: int) -> None:
        self.plan, self.layer, self.stack = plan, layer, layer.keys.stack
        self.is_last = layer.keys.index == len(plan.layers) - 1
        self.tokens = plan.sequences * plan.sequence_length
        entries = plan.source.entries
        self.dense_bytes = sum(entries[name].nbytes for name in layer.keys.dense_tensors())
        self.bytes = sum(entries[name].nbytes for name in layer.keys.names)
        self.output_bytes = sum(shard.nbytes for shard in layer.shards)
        self.entering = plan.hidden_bytes if layer.keys.index else 0
        held = self.bytes + self.output_bytes + 2 * plan.hidden_bytes
        self.fits = held <= cache_bytes

    def phases(self) -> dict[str, Work]:
        """Return its work by phase."""
        if self.stack is None:
            write = Work(read_bytes=self.bytes, written_bytes=self.output_bytes)
            return {"write": write, **self._propagated(self.bytes, mixed=False)}
        experts = self.bytes - self.dense_bytes
        sequential, merges = self.plan.settings.sequential, self._merges()
        passes = 1 if self.fits else self.plan.num_batches
        observe = Work(
            read_bytes=self.dense_bytes + experts * passes + self.entering,
            written_bytes=0 if sequential or self.is_last else self.plan.hidden_bytes,
            expert_flop=self._expert_flop(self.stack),
            product_flop=self._dense_flop(before_experts=sequential),
        )
        phases = {"observe": observe, "write": self._again(self.bytes)}
        phases["write"] += Work(written_bytes=self.output_bytes)
        if merges:
            phases |= self._compared(self.stack, experts)
            phases["write"] += Work(merged_numbers=self._merged() * self._numbers(self.stack))
        if sequential:
            mixed = bool(self.plan.memory[OUTPUTS])
            phases |= self._propagated(self.output_bytes, mixed=mixed)
        return phases

    def _again(self, nbytes: int) -> Work:
        """Return the reading of what was read or written a moment ago."""
        return Work(read_bytes=nbytes, cached_bytes=nbytes if self.fits else 0)

    def _propagated(self, nbytes: int, *, mixed: bool) -> dict[str, Work]:
        """Return the run to the next layer; `mixed` if attention's outputs were kept."""
        if self.is_last:
            return {}
        experts = 0 if self.stack is None else nbytes - self.dense_bytes
        passes = 1 if self.fits else self.plan.num_batches
        dense = self._dense_flop() - (self._dense_flop(before_experts=True) if mixed else 0)
        run = Work(
            written_bytes=self.plan.hidden_bytes,
            expert_flop=0 if self.stack is None else self._expert_flop(self.stack),
            product_flop=dense,
        )
        again = self._again(nbytes + experts * (passes - 1))
        entering = self._again(self.entering)
        if self.stack is None:  # nothing read the states before
            entering = Work(read_bytes=self.entering)
        return {"propagate": run + again + entering}

    def _compared(self, stack: ExpertStack, expert_bytes: int) -> dict[str, Work]:
        method, matrix = self.plan.settings.method, stack.hidden * stack.inner
        sample = min(method.similarity_tokens or self.tokens, self.tokens)
        count = self.plan.num_experts
        pairs, merged = count - self.plan.settings.experts, self._merged()
        compare = Work(product_flop=count * sample * 4 * matrix)
        alignment, align = ALIGNMENTS[method.alignment], Work()
        if alignment.activations:
            rows = min(method.alignment_tokens, sample)
            align += Work(
                product_flop=merged * rows * 4 * matrix,
                float32_flop=pairs * rows * 2 * stack.inner**2,
            )
        if alignment.weights:
            align += Work(float32_flop=pairs * 2 * stack.inner**2 * 3 * stack.hidden)
        if alignment.activations or alignment.weights:
            align += Work(matchings=pairs) + self._again(expert_bytes * merged // count)
        return {"compare": compare + self._again(expert_bytes), "align": align}

    def _merges(self) -> bool:
        settings = self.plan.settings
        return settings.method.grouping != "none" and settings.experts < self.plan.num_experts

    def _merged(self) -> int:
        """Return the experts in groups of two or more, if groups are small."""
        dropped = self.plan.num_experts - self.plan.settings.experts
        return min(self.plan.num_experts, 2 * dropped)

    def _numbers(self, stack: ExpertStack) -> int:
        return 3 * stack.hidden * stack.inner

    def _expert_flop(self, stack: ExpertStack) -> int:
        return 2 * self._numbers(stack) * self.tokens * self.plan.top_k

    def _dense_flop(self, *, before_experts: bool = False) -> int:
        """Return the products beside the experts; or of them, attention and the router."""
        entries, block = self.plan.source.entries, self.stack.block if self.stack else "\0"
        names = [
            name
            for name in self.layer.keys.dense_names()
            if not (before_experts and name.startswith(block))
        ]
        shapes = [self.layer.keys.shape(name, entries) for name in names]
        numbers = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
        return 2 * numbers * self.tokens + self._score_flop()

    def _score_flop(self) -> int:
        """Return the products of queries with keys and of probabilities with values."""
        config: Mapping[str, int | None] = self.plan.source.config
        heads = int(config.get("num_attention_heads") or 1)
        width = int(config.get("head_dim") or self.plan.hidden_size // heads)
        query, value = width, width
        if config.get("kv_lora_rank"):
            value = int(config.get("v_head_dim") or width)
            nope, rope = config.get("qk_nope_head_dim"), config.get("qk_rope_head_dim")
            query = int(nope or 0) + int(rope or 0)
        return 2 * self.tokens * self.plan.sequence_length * heads * (query + value)
