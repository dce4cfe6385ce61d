"""What a run reads, writes, computes and codes, phase by phase: arithmetic on a plan.

Whether a phase is there at all, and what it keeps, is asked of the plan, as the run does.
Letters: T calibration tokens, L tokens of a sequence, K experts a token, E experts,
H hidden, I inner. A product of (n, a) with (a, b) is counted as 2 n a b operations.
Norms, activations, routing and softmax are not counted. An expert that is not kept on the
device is decoded for each batch that it is run on.
"""

import math
from collections.abc import Mapping

from ream_stream.checkpoint.config_json import text_config
from ream_stream.checkpoint.expert_stack import ExpertMatrix, ExpertStack
from ream_stream.method.alignment import ALIGNMENTS, cost_flop
from ream_stream.method.slices import narrowing_flop, removal_flop
from ream_stream.model.expert_blocks import cut_experts
from ream_stream.settings import Method

from .allocation import CACHE_SHARE
from .phase_cost import PHASES, Cost, total
from .plan import GRAMS, OUTPUTS, SUMS, LayerPlan, Plan
from .refit_memory import ACTIVATIONS, HELD_BACK_SHARE, INPUTS, KEPT, refit_memory


def cost_of(plan: Plan, *, cache_bytes: int, committed: int = 0) -> dict[str, Cost]:
    """Return the cost of a run by phase.

    Parameters
    ----------
    plan
        The run.
    cache_bytes
        Memory that the page cache may take. A layer that does not fit in it is read again
        in each phase, and so are states that do not fit beside it; its experts are for each
        batch, if they alone are more than their share of it and a device does not keep them.
    committed
        Layers that are done already.
    """
    phases = dict.fromkeys(PHASES, Cost())
    for layer in plan.layers[committed:]:
        for phase, cost in _Layer(plan, layer, cache_bytes).phases().items():
            phases[phase] += cost
    outside = sum(tensor.nbytes for shard in plan.outside for tensor in shard.tensors)
    if not committed:
        phases["check"] += Cost(read_bytes=outside)
    written = sum(shard.nbytes for shard in plan.outside)
    phases["finish"] = Cost(read_bytes=outside, written_bytes=written)
    return phases


class _Layer:
    """The cost of one layer."""

    def __init__(self, plan: Plan, layer: LayerPlan, cache_bytes: int) -> None:
        self.plan, self.layer, self.stack = plan, layer, layer.keys.stack
        self.tokens = plan.sequences * plan.sequence_length
        entries, keys = plan.source.entries, layer.keys
        self.dense_bytes = sum(entries[name].nbytes for name in keys.dense_tensors())
        self.bytes = sum(entries[name].nbytes for name in keys.names)
        self.output_bytes = sum(shard.nbytes for shard in layer.shards)
        self.entering = plan.hidden_bytes if keys.index else 0
        self.fits = self.bytes + self.output_bytes <= cache_bytes
        self.states_fit = not plan.drops_states(layer, cache_bytes)
        self.stays = self.bytes - self.dense_bytes <= CACHE_SHARE * cache_bytes
        self.coded = sum(s.rows * s.cols * (s.count or 1) for s in keys.quantized.values())
        """Quantized numbers beside the experts in the source."""
        self.still_coded = 0 if self.stack and plan.settings.decodes else self.coded
        """The same in the output."""

    def phases(self) -> dict[str, Cost]:
        """Return its cost by phase."""
        plan, layer = self.plan, self.layer
        phases = {"check": Cost(read_bytes=self.bytes), "write": self._write()}
        if self.stack is not None:
            if plan.settings.runs_layers:
                phases["observe"] = self._observe(self.stack)
            if plan.merges:
                phases["compare"] = self._compare(self.stack)
                phases["align"] = self._align(self.stack)
            if plan.settings.cuts:
                phases["cut"] = self._cut(self.stack)
            if plan.refits:
                phases["refit"] = self._refit(self.stack)
        if plan.tracks_original_through(layer):
            phases["follow"] = self._follow()
        if plan.propagates(layer):
            phases["propagate"] = self._propagate()
        return phases

    def _observe(self, stack: ExpertStack) -> Cost:
        """Run the source layer: up to its experts, unless its outputs go on to the next."""
        plan, sequential = self.plan, self.plan.settings.sequential
        passes = self._passes(stack.count)
        experts = (self.bytes - self.dense_bytes) * self._readings(passes)
        cost = self._again(self.dense_bytes + int(experts)) + Cost(
            read_bytes=self.entering,
            written_bytes=plan.scratch.get(OUTPUTS, 0) if plan.keeps_outputs(self.layer) else 0,
            expert_flop=self._expert_flop(stack),
            product_flop=self._dense_flop(before_experts=sequential),
            decoded_numbers=self._seen(stack),
        )
        cost += self._passed_again(passes - 1)
        if plan.settings.sums_moments:
            cost += self._passed_again(plan.schedule.gram_blocks - 1)
            cost += Cost(product_flop=2 * self.tokens * plan.top_k * stack.inner**2)
        if not sequential and plan.leads_on(self.layer):
            cost += Cost(written_bytes=plan.hidden_bytes) + self._summed(passes)
        elif plan.refits and not plan.tracks_original:  # the sums are its targets
            cost += self._summed(passes)
        return cost

    def _follow(self) -> Cost:
        """Run the source layer in the original model."""
        plan, stack = self.plan, self.stack
        experts = self.bytes - self.dense_bytes if stack else 0
        passes = self._passes(stack.count) if stack else 1
        read = self.bytes + int(experts * (self._readings(passes) - 1))
        again = Cost(
            read_bytes=self.entering, product_flop=self._dense_flop(before_experts=True)
        )
        cost = self._again(read) + self._summed(passes) + total([again] * (passes - 1))
        return cost + Cost(
            read_bytes=self.entering,
            written_bytes=plan.hidden_bytes if plan.leads_on(self.layer) else 0,
            expert_flop=self._expert_flop(stack) if stack else 0,
            product_flop=self._dense_flop(),
            decoded_numbers=self._seen(stack) if stack else self.coded,
        )

    def _compare(self, stack: ExpertStack) -> Cost:
        """Run every expert on the sample, as far as its down projection."""
        return self._again(self.bytes - self.dense_bytes) + Cost(
            product_flop=stack.count * self._sample * 4 * stack.hidden * stack.inner,
            decoded_numbers=_coded_numbers(stack) * stack.count,
        )

    def _align(self, stack: ExpertStack) -> Cost:
        """Run and compare the experts of groups pair by pair, and match their neurons."""
        method, merged = self._method, self._merged
        alignment, matrix = ALIGNMENTS[method.alignment], stack.hidden * stack.inner
        if not alignment.compares:
            return Cost()
        pairs = stack.count - self.plan.settings.experts
        rows = min(method.alignment_tokens, self._sample)
        runs = merged * alignment.activations
        return self._again((self.bytes - self.dense_bytes) * merged // stack.count) + Cost(
            product_flop=runs * rows * 4 * matrix,
            float32_flop=pairs * cost_flop(alignment, rows, stack.hidden, stack.inner),
            matchings=pairs,
            # to be run, and to be compared
            decoded_numbers=_coded_numbers(stack) * (merged + runs),
        )

    def _cut(self, stack: ExpertStack) -> Cost:
        """Find the order in which each expert loses its neurons."""
        kept = written = self.plan.scratch.get(GRAMS, 0)
        if not self.plan.settings.runs_layers:  # they are read from the statistics
            kept, written = 4 * stack.count * stack.inner**2 * self.plan.domains, 0
        # a number of float64 is worth two of float32
        flop = 2 * stack.count * removal_flop(stack.inner, stack.hidden)
        return self._again(self.bytes - self.dense_bytes) + Cost(
            read_bytes=kept,
            written_bytes=written,
            float32_flop=flop,
            decoded_numbers=_coded_numbers(stack) * stack.count,
        )

    def _write(self) -> Cost:
        """Copy or decode what stays, merge the rest, and write the shards."""
        plan, source, output = self.plan, self.stack, self.layer.stack
        if plan.settings.observes:
            kept = plan.scratch.get(GRAMS, 0) if source else 0
            return Cost(read_bytes=kept, written_bytes=self.output_bytes)
        cost = self._again(self.bytes) + Cost(written_bytes=self.output_bytes)
        if source is None or output is None:
            decoded = self.coded if plan.settings.decodes else 0
            return cost + Cost(decoded_numbers=decoded)
        if plan.settings.cuts:
            coded = output.count * sum(
                m.stored.rows * m.stored.cols for m in output.matrices if _is_coded(m)
            )
            return cost + Cost(
                read_bytes=plan.scratch.get(GRAMS, 0),
                float32_flop=2 * source.count * narrowing_flop(source.inner, source.hidden),
                decoded_numbers=_coded_numbers(source) * source.count,
                encoded_numbers=coded,
            )
        merged = self._merged if plan.merges else 0
        made = min(output.count, source.count - output.count) if merged else 0
        decoded, encoded = self.coded - self.still_coded, 0
        for old, new in zip(source.matrices, output.matrices, strict=True):
            numbers = old.stored.rows * old.stored.cols
            # codes and scales that hold all experts are written apart, and merged for each
            times = 1 if new.numbered else len(new.tensors)
            if _is_coded(new):
                encoded += numbers * made * times
                decoded += numbers * merged * times
            elif _is_coded(old):
                alone = 0 if merged == source.count else output.count - made
                decoded += numbers * (merged + alone) * times
        return cost + Cost(
            merged_numbers=merged * 3 * source.hidden * source.inner,
            decoded_numbers=decoded,
            encoded_numbers=encoded,
        )

    def _refit(self, stack: ExpertStack) -> Cost:
        """Refit all experts that stay, with all iterations, from the layer's scratch files."""
        plan, method, solver = self.plan, self._method, self.plan.schedule.solver
        output = self.layer.stack
        assert output is not None
        slots, trials = self.tokens * plan.output_top_k, len(method.refit_lambda)
        inner, matrix, experts = output.inner, output.hidden * output.inner, output.count
        iterations, blocks = method.refit_iterations, solver.column_blocks
        passes = 0 if solver.gathered else iterations
        # the first pass makes activations in any case; the last iteration is half of one
        made = plan.refit_repeats if plan.makes_activations_again else 0.0
        judged = HELD_BACK_SHARE * (trials / blocks + 1)
        products = 2 * matrix * (1 + max(0, 2 * passes - 1) + judged) + 2 * inner**2
        if plan.tracks_original:  # the compressed layer is run to its end
            products += self._flop_after_attention() / slots
        solved = (trials + iterations) * experts * 2 * inner * matrix
        wide = solved + (trials + blocks) * experts * 2 * inner**3
        if solver.gathered:
            refit = refit_memory(plan.settings, stack, plan.top_k, plan.dtype.itemsize)
            wide += refit.gathered_flop(self.tokens)
        expert_bytes = self.output_bytes - self.dense_bytes
        collecting = len(plan.refit_blocks)
        read = (
            expert_bytes if collecting else int(expert_bytes * self._readings(1) * (1 + made))
        )
        loads = self._loads(experts) * (1 + made) + experts
        downs = [m.stored for m in output.matrices if m.parts == ("down",) and _is_coded(m)]
        down = experts * sum(stored.rows * stored.cols for stored in downs)
        # to be judged, and once for each tensor that is written
        times = 1 + sum(len(s.codec.parts(s.rows, s.cols)) for s in downs)
        return (
            Cost(
                written_bytes=self.output_bytes,
                expert_flop=int(slots * (6 * matrix + 4 * matrix * made)),
                product_flop=int(slots * products),
                float32_flop=wide,
                decoded_numbers=int(self.still_coded + _coded_numbers(output) * loads) + down,
                encoded_numbers=down * times,
            )
            + self._passed_again((collecting or 1) + bool(collecting and plan.tracks_original))
            + self._again(self.dense_bytes + read)
            + self._kept_for_refit()
        )

    def _kept_for_refit(self) -> Cost:
        """Write and read what a refit keeps on the disk."""
        plan, scratch = self.plan, self.plan.scratch
        columns, repeats = plan.schedule.solver.column_blocks, plan.refit_repeats
        # activations once for the sums, and again when the layer runs for the next
        inputs, activations = scratch.get(INPUTS, 0), scratch.get(ACTIVATIONS, 0)
        kept = scratch.get(KEPT, 0)
        targets = min(plan.hidden_bytes, kept)
        # each part of the columns but the first of the tokens that are fitted; all columns of
        # those that are held back for each part, and before
        residuals = targets * ((columns - 1) / columns + HELD_BACK_SHARE * (columns + 1))
        results = kept - targets
        read = inputs * repeats + activations * (1 + repeats) + targets + residuals + results
        again = int(targets * (1 if columns > 1 else HELD_BACK_SHARE))
        return Cost(read_bytes=int(read), written_bytes=inputs + activations + kept + again)

    def _propagate(self) -> Cost:
        """Run the layer, as it is in the output, for the next."""
        plan, output = self.plan, self.layer.stack
        if output is None:  # nothing read the states before
            return self._again(self.bytes) + Cost(
                read_bytes=self.entering,
                written_bytes=plan.hidden_bytes,
                product_flop=self._dense_flop(),
                decoded_numbers=self.coded,
            )
        # a refit runs the layer on activations that it kept
        passes = 1 if plan.refits else self._passes(output.count)
        experts_flop = self._expert_flop(output)
        if plan.keeps(ACTIVATIONS):  # only down projections are applied
            experts_flop //= 3
        experts = (self.output_bytes - self.dense_bytes) * (self._readings(passes) - 1)
        stored = bool(plan.refit_blocks)
        if stored:
            experts = (self.output_bytes - self.dense_bytes) * -2 / 3
        return (
            self._again(self.output_bytes + int(experts))
            + self._passed_again(passes)
            + self._summed(passes)
            + Cost(
                read_bytes=plan.scratch.get(ACTIVATIONS, 0),
                written_bytes=plan.hidden_bytes,
                expert_flop=experts_flop,
                product_flop=self._flop_after_attention(),
                decoded_numbers=self.still_coded
                + _coded_numbers(output) * self._loads(output.count) // (3 if stored else 1),
            )
        )

    @property
    def _method(self) -> Method:
        return self.plan.settings.method

    @property
    def _sample(self) -> int:
        """Tokens that all experts are run on."""
        return min(self._method.similarity_tokens or self.tokens, self.tokens)

    @property
    def _merged(self) -> int:
        """Experts in groups of two or more, if groups are small."""
        count = self.plan.num_experts
        return min(count, 2 * (count - self.plan.settings.experts))

    def _passes(self, experts: int) -> int:
        return len(cut_experts(experts, self.plan.schedule.expert_blocks))

    def _loads(self, experts: int) -> int:
        """Return the number of expert loads in the passes of all batches."""
        schedule = self.plan.schedule
        kept = sum(
            min(schedule.resident_experts, len(block))
            for block in cut_experts(experts, schedule.expert_blocks)
        )
        return kept + (experts - kept) * self.plan.num_batches

    def _readings(self, passes: int) -> float:
        """Return the mean number of reads of an expert in the passes of all batches."""
        if self.fits or self.stays or passes > 1:
            return 1.0
        return self._loads(self.plan.num_experts) / self.plan.num_experts

    def _seen(self, stack: ExpertStack) -> int:
        """Return the numbers that are decoded where all batches are run through the source."""
        return self.coded + _coded_numbers(stack) * self._loads(stack.count)

    def _again(self, nbytes: int) -> Cost:
        """Return the reading of what was read or written a moment ago."""
        return Cost(read_bytes=nbytes, cached_bytes=nbytes if self.fits else 0)

    def _passed_again(self, passes: int) -> Cost:
        """Return the cost of passes after the first except experts: states and attention."""
        kept = self.plan.keeps(OUTPUTS)
        once = Cost(
            read_bytes=self.entering + self.plan.scratch.get(OUTPUTS, 0),
            cached_bytes=self.entering if self.states_fit else 0,
            product_flop=0 if kept else self._dense_flop(before_experts=True),
        )
        return total([once] * passes)

    def _summed(self, passes: int) -> Cost:
        """Return the writing and reading of sums over blocks."""
        nbytes = (passes - 1) * self.plan.scratch.get(SUMS, 0)
        return Cost(read_bytes=nbytes, written_bytes=nbytes)

    def _expert_flop(self, stack: ExpertStack) -> int:
        plan = self.plan
        top_k = plan.output_top_k if stack is self.layer.stack else plan.top_k
        return 2 * 3 * stack.hidden * stack.inner * self.tokens * top_k

    def _flop_after_attention(self) -> int:
        return self._dense_flop() - self._dense_flop(before_experts=True)

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


def _is_coded(matrix: ExpertMatrix) -> bool:
    return matrix.stored.codec.scheme != "plain"


def _coded_numbers(stack: ExpertStack) -> int:
    """Return the numbers of an expert's matrices that are quantized."""
    return sum(m.stored.rows * m.stored.cols for m in stack.matrices if _is_coded(m))
