"""Plans for GPUs that are not here, by their data sheets."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import settings

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.errors import UsageError
from ream_stream.evaluation import api
from ream_stream.planning.gpus import EFFICIENCY, GPUS, gpu_named
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import RAM_SHARE, Budgets
from ream_stream.planning.throughput import forecast, told

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(checkpoints):
    checkpoint = open_checkpoint(checkpoints("qwen3_moe"))
    wanted = replace(settings(6), compute_dtype="bfloat16", device_kind="cuda")
    return make_plan(checkpoint, wanted, 4, 12, budgets=Budgets.of(vram=24 << 30))


def scheduled(plan, **changes):
    return replace(plan, schedule=replace(plan.schedule, **changes))


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_has_memory_rates_and_their_source(name):
    gpu = gpu_named(name)
    assert gpu.name == name
    assert 10e9 < gpu.budget_bytes < gpu.memory_bytes
    # memory is read faster than the host is, products of bf16 are faster than those of float32
    assert gpu.link < gpu.bandwidth
    assert gpu.float32 < gpu.bf16
    assert gpu.source.startswith("NVIDIA")


def test_an_unknown_gpu_is_told_with_those_that_there_are():
    with pytest.raises(UsageError, match=r"^--gpu 486: there are rtx-3090, .*; others by --v"):
        gpu_named("486")


def test_an_expert_takes_the_longest_of_copy_memory_and_products(plan):
    known = forecast(plan, CPU).throughput
    stack = plan.moe_layers[0].keys.stack
    numbers = 3 * stack.hidden * stack.inner
    rows = plan.schedule.batch_sequences * 12 * plan.top_k / stack.count
    flop, stored = 2 * numbers * rows, numbers * 2
    gpu = GPUS["rtx-4090"]
    usual = {"link": 1e30, "bandwidth": 1e30, "bf16": 1e30}
    for limit, seconds in (
        ({"link": 1.0}, float(stored)),
        ({"bandwidth": 1.0}, numbers * 2.0),
        ({"bf16": 1.0}, flop),
    ):
        slow = replace(gpu, **{**usual, **limit})
        away = scheduled(plan, resident_experts=0)
        assert told(away, known, slow).expert == pytest.approx(EFFICIENCY * flop / seconds)
    # what stays on the GPU is copied once for all batches
    several = scheduled(plan, resident_experts=stack.count, batch_sequences=1)
    slow, flop = replace(gpu, **{**usual, "link": 1.0}), flop / plan.schedule.batch_sequences
    rate = told(several, known, slow).expert
    assert several.num_batches == 4
    assert rate == pytest.approx(4 * EFFICIENCY * flop / stored)


def test_the_processor_s_own_work_stays_as_it_is_measured(plan):
    known = forecast(plan, CPU).throughput
    rates = told(plan, known, GPUS["h100"])
    for name in ("matching", "merge", "read", "digest", "encode", "decode"):
        assert getattr(rates, name) == getattr(known, name)
    assert rates.product == EFFICIENCY * GPUS["h100"].bf16
    assert rates.float32 == EFFICIENCY * GPUS["h100"].float32


def test_a_budget_for_another_machine_is_the_usual_share_of_what_is_free_there():
    assert Budgets.of(1 << 50, elsewhere=True).available == int((1 << 50) / RAM_SHARE)
    assert Budgets.of(1 << 50).available < 1 << 50


def test_a_plan_for_a_gpu_that_is_not_here_has_its_memory_and_its_rates(source_folder):
    found = api.plan(source_folder, experts=4, gpu="h100", ram="64GB").details
    assert found["device"] == "cuda"
    assert found["settings"]["compute_dtype"] == "bfloat16"
    assert found["device_memory_budget_bytes"] == GPUS["h100"].budget_bytes
    assert found["gpu"]["source"] == GPUS["h100"].source
    assert found["forecast"]["rates"]["product"] == EFFICIENCY * GPUS["h100"].bf16
    smaller = api.plan(source_folder, experts=4, gpu="h100", vram="8GB").details
    assert smaller["device_memory_budget_bytes"] == 8e9


@pytest.fixture
def source_folder(checkpoints):
    return checkpoints("qwen3_moe")


def test_a_gpu_and_the_processor_exclude_each_other(source_folder):
    with pytest.raises(UsageError, match=r"^--gpu h100 and --device cpu exclude each other"):
        api.plan(source_folder, experts=4, gpu="h100", device="cpu")
