"""What a run reads, writes and computes, phase by phase: arithmetic on a plan.

Letters: T calibration tokens, L tokens of a sequence, K experts a token, E experts,
H hidden, I inner. A product of (n, a) with (a, b) is counted as 2 n a b operations.
Norms, activations, routing and softmax are not counted.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from ream_stream.checkpoint.config_json import text_config
from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.method.alignment import ALIGNMENTS
from ream_stream.model.expert_blocks import cut_experts

from .allocation import CACHE_SHARE, OUTPUTS, SUMS
from .coding import coding_of, loads, merged_experts
from .plan import LayerPlan, Plan
from .refit_memory import ACTIVATIONS, HELD_BACK_SHARE, KEPT

PHASES = (
    *("check", "observe", "follow", "compare", "align"),
    *("refit", "write", "propagate", "finish"),
)
"""In the order in which they first occur; a layer has all but the last."""


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

    decoded_numbers: int = 0
    """Numbers of quantized matrices that are decoded."""

    encoded_numbers: int = 0
    """Numbers of merged experts that are encoded."""

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
        Memory that the page cache may take. A layer that does not fit in it, with the
        states that pass through, is read again in each phase; its experts for each batch,
        if they alone are more than their share of it and a device does not keep them.
    committed
        Layers that are done already.
    """
    phases = dict.fromkeys(PHASES, Work())
    for layer in plan.layers[committed:]:
        for phase, work in _Layer(plan, layer, cache_bytes).phases().items():
            phases[phase] += work
        for phase, (decoded, encoded) in coding_of(plan, layer).items():
            phases[phase] += Work(decoded_numbers=decoded, encoded_numbers=encoded)
    outside = sum(tensor.nbytes for shard in plan.outside for tensor in shard.tensors)
    if not committed:
        phases["check"] += Work(read_bytes=outside)
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
        held = self.bytes + self.output_bytes + 2 * plan.boundary_bytes
        self.fits = held <= cache_bytes
        self.stays = self.bytes - self.dense_bytes <= CACHE_SHARE * cache_bytes

    def phases(self) -> dict[str, Work]:
        """Return its work by phase."""
        check = Work(read_bytes=self.bytes)
        if self.stack is None:
            write = self._again(self.bytes) + Work(written_bytes=self.output_bytes)
            phases = {"check": check, "write": write}
            phases |= self._propagated(self.bytes, passes=1)
            return phases | self._followed()
        plan, experts = self.plan, self.bytes - self.dense_bytes
        sequential, merges = plan.settings.sequential, self._merges()
        passes = len(cut_experts(plan.num_experts, plan.schedule.expert_blocks))
        observe = self._again(self.dense_bytes + int(experts * self._readings(passes))) + Work(
            read_bytes=self.entering,
            written_bytes=plan.scratch.get(OUTPUTS, 0) if self._records(passes) else 0,
            expert_flop=self._expert_flop(self.stack),
            product_flop=self._dense_flop(before_experts=sequential),
        )
        observe += self._passed_again(passes - 1)
        if not (sequential or self.is_last):
            observe += Work(written_bytes=plan.hidden_bytes) + self._summed(passes)
        phases = {"check": check, "observe": observe, "write": self._again(self.bytes)}
        phases["write"] += Work(written_bytes=self.output_bytes)
        if merges:
            phases |= self._compared(self.stack, experts)
            phases["write"] += Work(
                merged_numbers=merged_experts(self.plan) * self._numbers(self.stack)
            )
        if plan.refits:
            phases["refit"] = self._refitted(self.stack)
        phases |= self._followed()
        if sequential:
            passes = len(cut_experts(plan.settings.experts, plan.schedule.expert_blocks))
            phases |= self._propagated(self.output_bytes, passes=passes)
        return phases

    def _readings(self, passes: int) -> float:
        """Return how often an expert is read in the passes of all batches, in the mean."""
        if self.fits or self.stays or passes > 1:
            return 1.0
        return loads(self.plan, self.plan.num_experts) / self.plan.num_experts

    def _records(self, passes: int) -> bool:
        """Tell whether attention's outputs serve a later pass."""
        return (
            passes > 1
            or self.plan.refits
            or (self.plan.settings.sequential and not self.is_last)
        )

    def _passed_again(self, passes: int) -> Work:
        """Return what passes beyond the first take beside experts: states and attention."""
        read = self._again(self.entering) + Work(read_bytes=self.plan.scratch.get(OUTPUTS, 0))
        kept = self.plan.keeps(OUTPUTS)
        once = Work(product_flop=0 if kept else self._dense_flop(before_experts=True))
        return total([read, once] * passes)

    def _summed(self, passes: int) -> Work:
        """Return the writing and reading of sums over blocks."""
        nbytes = (passes - 1) * self.plan.scratch.get(SUMS, 0)
        return Work(read_bytes=nbytes, written_bytes=nbytes)

    def _again(self, nbytes: int) -> Work:
        """Return the reading of what was read or written a moment ago."""
        return Work(read_bytes=nbytes, cached_bytes=nbytes if self.fits else 0)

    def _propagated(self, nbytes: int, *, passes: int) -> dict[str, Work]:
        """Return the run to the next layer."""
        if self.is_last:
            return {}
        run = Work(written_bytes=self.plan.hidden_bytes)
        if self.stack is None:  # nothing read the states before
            run += Work(read_bytes=self.entering, product_flop=self._dense_flop())
            return {"propagate": run + self._again(nbytes)}
        experts = nbytes - self.dense_bytes
        after_attention = self._dense_flop() - self._dense_flop(before_experts=True)
        experts_flop = self._expert_flop(self.stack)
        if self.plan.memory.get(ACTIVATIONS):  # only down projections are applied
            experts_flop //= 3
        run += Work(expert_flop=experts_flop, product_flop=after_attention)
        run += self._passed_again(passes) + self._summed(passes)
        return {
            "propagate": run + self._again(nbytes + int(experts * (self._readings(passes) - 1)))
        }

    def _followed(self) -> dict[str, Work]:
        """Return the run of the source layer in the original model."""
        plan, readings = self.plan, self._readings(1)
        if not plan.follows or (self.is_last and self.stack is None):
            return {}
        experts = self.bytes - self.dense_bytes if self.stack else 0
        work = self._again(self.bytes + int(experts * (readings - 1))) + Work(
            read_bytes=self.entering,
            written_bytes=0 if self.is_last else plan.hidden_bytes,
            expert_flop=self._expert_flop(self.stack) if self.stack else 0,
            product_flop=self._dense_flop(),
        )
        return {"follow": work}

    def _compared(self, stack: ExpertStack, expert_bytes: int) -> dict[str, Work]:
        method, matrix = self.plan.settings.method, stack.hidden * stack.inner
        sample = min(method.similarity_tokens or self.tokens, self.tokens)
        count = self.plan.num_experts
        pairs, merged = count - self.plan.settings.experts, merged_experts(self.plan)
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

    def _refitted(self, stack: ExpertStack) -> Work:
        """Return the work of a refit of all experts that stay, with all its iterations."""
        plan, method = self.plan, self.plan.settings.method
        solver = plan.schedule.solver
        slots, trials = self.tokens * plan.top_k, len(method.refit_lambda)
        matrix, experts = stack.hidden * stack.inner, plan.settings.experts
        iterations, blocks = method.refit_iterations, solver.column_blocks
        passes = 0 if solver.gathered else iterations
        # the first pass makes activations in any case; the last iteration is half of one
        again = plan.refit_repeats
        judged = HELD_BACK_SHARE * (trials / blocks + 1)
        products = 2 * matrix * (1 + max(0, 2 * passes - 1) + judged) + 2 * stack.inner**2
        solved = (trials + iterations) * experts * 2 * stack.inner * matrix
        factors = (trials + blocks) * experts * 2 * stack.inner**3
        wide = solved + factors
        if solver.gathered:
            width = experts * stack.inner
            wide += slots * (plan.top_k + 1) * stack.inner**2
            wide += iterations * 2 * width**2 * stack.hidden
        if plan.follows:  # the compressed layer is run to its end
            products += (self._dense_flop() - self._dense_flop(before_experts=True)) / slots
        run = Work(
            written_bytes=self.output_bytes,
            expert_flop=int(slots * (6 * matrix + 4 * matrix * again)),
            product_flop=int(slots * products),
            float32_flop=wide,
        )
        kept = plan.scratch.get(KEPT, 0)
        stores = Work(read_bytes=int(kept * (1 + again)), written_bytes=kept)
        expert_bytes = self.output_bytes - self.dense_bytes
        read = self.dense_bytes + int(expert_bytes * self._readings(1) * (1 + again))
        return run + stores + self._passed_again(1) + self._again(read)

    def _merges(self) -> bool:
        settings = self.plan.settings
        return settings.method.grouping != "none" and settings.experts < self.plan.num_experts

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
        config: Mapping[str, int | None] = text_config(self.plan.source.config)
        heads = int(config.get("num_attention_heads") or 1)
        width = int(config.get("head_dim") or self.plan.hidden_size // heads)
        query, value = width, width
        if config.get("kv_lora_rank"):
            value = int(config.get("v_head_dim") or width)
            nope, rope = config.get("qk_nope_head_dim"), config.get("qk_rope_head_dim")
            query = int(nope or 0) + int(rope or 0)
        return 2 * self.tokens * self.plan.sequence_length * heads * (query + value)
