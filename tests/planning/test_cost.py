"""What a plan says is read, written and computed, against runs and counts by hand."""

import itertools
from dataclasses import fields, replace

import pytest
import quantized
import torch
from tiny_families import TOP_K
from tiny_parameters import families
from tiny_runs import plan_for, run_plan, scheduled, settings, some_tokens

from ream_stream.checkpoint.formats import Fp8Block
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.events import LayerDone
from ream_stream.planning.cost import cost_of
from ream_stream.planning.phase_cost import PHASES, Cost, total
from ream_stream.planning.planner import make_plan
from ream_stream.planning.refit_memory import ACTIVATIONS
from ream_stream.planning.throughput import UNCOUNTED, Throughput, forecast

PLENTY = 1 << 40
EXPERT = 3 * 16 * 32
"""Numbers of an expert of the tiny checkpoints."""


@pytest.fixture
def plan_of(checkpoints):
    def give(name="qwen3_moe", experts=6, **fields):
        checkpoint = open_checkpoint(checkpoints(name))
        return make_plan(checkpoint, settings(experts, **fields), 4, 12)

    return give


def test_the_bytes_written_are_those_of_shards_and_hidden_states(plan_of):
    plan = plan_of()
    work = cost_of(plan, cache_bytes=PLENTY)
    written = plan.output_bytes + (len(plan.layers) - 1) * plan.hidden_bytes
    assert total(work.values()).written_bytes == written
    assert tuple(work) == PHASES


def test_what_is_read_anew_is_each_tensor_of_a_layer_once_and_the_states_once(plan_of):
    plan = plan_of()
    everything = total(cost_of(plan, cache_bytes=PLENTY).values())
    anew = everything.read_bytes - everything.cached_bytes
    # what is outside the layers is looked at first and copied last
    outside = sum(tensor.nbytes for shard in plan.outside for tensor in shard.tensors)
    assert anew == plan.source_bytes + outside + (len(plan.layers) - 1) * plan.hidden_bytes


def test_a_layer_that_memory_cannot_hold_is_read_for_each_batch(plan_of):
    plan = plan_of()
    scarce, plenty = (cost_of(plan, cache_bytes=size) for size in (0, PLENTY))
    assert total(scarce.values()).cached_bytes == 0
    assert scarce["observe"].read_bytes >= plenty["observe"].read_bytes
    assert {name: work.flop for name, work in scarce.items()} == {
        name: work.flop for name, work in plenty.items()
    }


def test_experts_are_read_for_each_batch_if_neither_cache_nor_device_keeps_them(plan_of):
    plan = scheduled(plan_of(), batch_sequences=1)
    entries, stacks = plan.source.entries, [layer.keys.stack for layer in plan.moe_layers]
    layers = [sum(entries[name].nbytes for name in stack.slots()) for stack in stacks]
    [each] = set(layers)

    def read(cache_bytes, resident=0):
        kept = scheduled(plan, resident_experts=resident)
        observe = cost_of(kept, cache_bytes=cache_bytes)["observe"]
        assert not observe.cached_bytes
        return observe.read_bytes

    # half of the cache is for what passes through it
    once = read(2 * each)
    assert read(2 * each - 1) == once + 3 * sum(layers)
    assert read(2 * each - 1, resident=2) == once + 3 * sum(layers) * 6 // 8
    assert read(0, resident=8) == once


def test_operations_of_experts_are_those_of_routed_tokens(plan_of):
    work = cost_of(plan_of(), cache_bytes=PLENTY)
    tokens, moe = 4 * 12, 2
    routed = 2 * EXPERT * tokens * TOP_K
    assert work["observe"].expert_flop == moe * routed
    # the last layer leads to no other; the dense one in the middle has no experts
    assert work["propagate"].expert_flop == routed
    # gate and up of every expert on all tokens, which are fewer than the sample
    assert work["compare"].product_flop == moe * 8 * tokens * 2 * EXPERT * 2 // 3
    assert work["align"].matchings == moe * 2


def test_pruning_neither_compares_nor_aligns_nor_merges(plan_of):
    work = cost_of(plan_of(grouping="none"), cache_bytes=PLENTY)
    assert work["compare"] == work["align"] == Cost()
    assert work["write"].merged_numbers == 0


def test_without_sequential_calibration_experts_run_once(plan_of):
    work = cost_of(plan_of(sequential=False), cache_bytes=PLENTY)
    assert work["propagate"].expert_flop == 0
    assert work["observe"].written_bytes > 0


@pytest.mark.parametrize("name", families())
def test_every_family_has_work_and_less_once_layers_are_committed(plan_of, name):
    plan = plan_of(name)
    left = [
        total(cost_of(plan, cache_bytes=PLENTY, committed=done).values())
        for done in range(len(plan.layers) + 1)
    ]
    for before, after in itertools.pairwise(left):
        assert after.read_bytes < before.read_bytes
        assert after.flop < before.flop
    assert left[-1].flop == 0


def test_a_sum_has_all_fields():
    one = Cost(**{field.name: 1 for field in fields(Cost)})
    assert total([one, one]) == Cost(**{field.name: 2 for field in fields(Cost)})


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "qwen3_moe"])
def test_the_machine_is_measured_on_experts_of_every_layout(plan_of, name):
    """With biases, stacked and turned, and one by one."""
    rates = forecast(plan_of(name), torch.device("cpu")).throughput
    assert rates.expert > 0
    assert rates.product > 0


def test_times_of_phases_follow_from_rates(plan_of):
    rates = Throughput(
        expert=100.0,
        product=200.0,
        float32=50.0,
        matching=1.0,
        merge=10.0,
        read=5.0,
        read_measured=True,
        digest=20.0,
    )
    assert rates.seconds(Cost(read_bytes=15, cached_bytes=5)) == 2.0
    assert rates.seconds(Cost(written_bytes=20)) == 4.0 + 1.0
    assert rates.seconds(Cost(expert_flop=100, product_flop=200)) == 2.0 * UNCOUNTED
    assert rates.seconds(Cost(float32_flop=100)) == 2.0
    assert rates.seconds(Cost(matchings=2, merged_numbers=10)) == 3.0


@pytest.mark.parametrize(
    ("dtype_out", "refit"), [("keep", "none"), ("bf16", "none"), ("keep", "down")]
)
def test_numbers_coded_are_those_that_a_run_codes(tmp_path, monkeypatch, dtype_out, refit):
    coded, _ = quantized.write(tmp_path, "deepseek_v3-fp8", torch.bfloat16)
    counted = {"decode": 0, "encode": 0}

    def counting(name):
        method = getattr(Fp8Block, name)

        def called(codec, coded, *rest):
            found = method(codec, coded, *rest)
            counted[name] += (found if name == "decode" else coded).numel()
            return found

        monkeypatch.setattr(Fp8Block, name, called)

    tokens = some_tokens(16, 12)  # so many that every expert is sent some
    wanted = settings(grouping="none", dtype_out=dtype_out, refit=refit)
    plan = plan_for(coded, tokens, wanted)
    counting("decode")
    counting("encode")
    done = run_plan(plan, tokens, tmp_path / "out")
    assert plan.num_batches == 1
    work = total(cost_of(plan, cache_bytes=PLENTY).values())
    assert work.decoded_numbers == counted["decode"]
    assert work.encoded_numbers == counted["encode"]
    refits = [each.refitted for each in done.events if isinstance(each, LayerDone)]
    # a plan takes it that all of them help
    assert (refit == "down") == all(each and each.penalty for each in refits[1:])


def test_merged_experts_are_encoded_and_stacks_once_for_codes_and_once_for_scales(tmp_path):
    coded, _ = quantized.write(tmp_path, "gpt_oss-mxfp4", torch.bfloat16)
    plan = plan_for(coded, some_tokens(), settings(6, alignment="weights"))
    work = cost_of(scheduled(plan, batch_sequences=1), cache_bytes=PLENTY)
    expert = 3 * 32 * 32
    numbers = {
        name: (each.decoded_numbers, each.encoded_numbers) for name, each in work.items()
    }
    # three layers, four batches; two of eight experts join two others
    assert numbers["observe"] == (3 * expert * 8 * 4, 0)
    assert numbers["compare"] == (3 * expert * 8, 0)
    assert numbers["align"] == (3 * expert * 4, 0)
    assert numbers["write"] == (3 * expert * 4 * 2, 3 * expert * 2 * 2)
    assert numbers["propagate"] == (2 * expert * 6 * 4, 0)
    known = forecast(plan, torch.device("cpu"))
    assert known.throughput.decode
    assert known.throughput.encode
    faster = replace(known.throughput, decode=2 * known.throughput.decode, encode=None)
    assert faster.seconds(work["write"]) < known.throughput.seconds(work["write"])


def test_a_forecast_measures_the_machine_in_every_dtype(plan_of):
    for dtype in ("float32", "bfloat16"):
        known = forecast(plan_of(dtype=dtype), torch.device("cpu"))
        assert set(known.seconds) == set(PHASES)
        assert all(time >= 0 for time in known.seconds.values())
        assert known.total == total(known.costs.values())


def test_a_refit_is_counted_and_costs_more_with_more_iterations(checkpoints):
    source, tokens = checkpoints("qwen3_moe"), some_tokens(20, 12)
    counted = []
    for iterations in (1, 2):
        wanted = settings(
            6, grouping="none", refit="down", refit_iterations=iterations, dtype="bfloat16"
        )
        plan = plan_for(source, tokens, wanted)
        # passes: what is gathered costs by the width of all experts
        plan = scheduled(plan, solver=replace(plan.schedule.solver, gathered=False))
        counted.append(cost_of(plan, cache_bytes=1 << 30)["refit"])
    stack = plan.moe_layers[0].keys.stack
    slots = tokens.num_tokens * plan.top_k * len(plan.moe_layers)
    more = counted[1].product_flop - counted[0].product_flop
    assert more == slots * 4 * stack.hidden * stack.inner
    assert counted[0].written_bytes == sum(
        shard.nbytes for layer in plan.moe_layers for shard in layer.shards
    )
    plain = plan_for(source, tokens, settings(6, grouping="none"))
    without = cost_of(plain, cache_bytes=1 << 30)
    assert without["refit"] == without["follow"] == Cost()
    # of three projections one is new to activations that were kept
    again = replace(plan, memory={**plan.memory, ACTIVATIONS: 0})
    for each, share in ((plan, 3), (again, 1)):
        found = cost_of(each, cache_bytes=1 << 30)["propagate"].expert_flop
        assert found == without["propagate"].expert_flop // share


def test_following_the_original_is_a_run_of_every_layer_more(checkpoints):
    source, tokens = checkpoints("qwen3_moe"), some_tokens(20, 12)
    wanted = settings(6, grouping="none", refit="down", refit_target="trajectory")
    plan = plan_for(source, tokens, wanted)
    counted = cost_of(plan, cache_bytes=1 << 30)
    assert counted["follow"].expert_flop == counted["observe"].expert_flop
    assert counted["follow"].written_bytes == (len(plan.layers) - 1) * plan.hidden_bytes
