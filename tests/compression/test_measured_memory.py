"""Anonymous memory of whole runs, each in a process of its own.

Resident size counts the mapped pages of the checkpoint, which the kernel takes
back at will; limits on address space count them too. So RssAnon is measured.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import load_tensors

import ream_stream
from ream_stream.checkpoint.reader import MappedTensors, open_checkpoint
from ream_stream.errors import OverBudgetError
from ream_stream.planning import memory
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Budgets
from ream_stream.settings import Method, Settings
from ream_stream.units import parse_size, size_option

pytestmark = [
    pytest.mark.memory,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no RssAnon here"),
]

EXPERTS, HIDDEN, INNER, VOCABULARY = 32, 256, 512, 64
LAYER_BYTES = EXPERTS * 3 * HIDDEN * INNER * 2
"""25 MB of experts in bf16."""

ROOMS = (74_000_000, 103_000_000, 144_000_000)
"""Of three budgets, what is above the interpreter's own: for half of the tokens at once,
for all of them, and to keep what attention gives as well."""

SCRIPT = Path(__file__).parents[1] / "support" / "measure.py"
UNTUNED = {
    **os.environ,
    "PYTHONPATH": str(Path(ream_stream.__file__).parent.parent),
    "OMP_NUM_THREADS": "1",
}
ENVIRONMENT = {
    **UNTUNED,
    # freed blocks under 32 MiB would stay in the heap of glibc, more or less by chance
    "MALLOC_MMAP_THRESHOLD_": "1048576",
}

CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def write_checkpoint(folder, layers, experts=EXPERTS, dtype=torch.bfloat16):
    """Write a checkpoint layer by layer."""
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    folder.mkdir()
    weight_map = {}

    def write(name, tensors):
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    norm_H = torch.ones(HIDDEN, dtype=dtype)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {
            "input_layernorm.weight": norm_H.clone(),
            "post_attention_layernorm.weight": norm_H.clone(),
            "self_attn.q_norm.weight": norm_H[:64].clone(),
            "self_attn.k_norm.weight": norm_H[:64].clone(),
            "self_attn.q_proj.weight": matrix(256, HIDDEN),
            "self_attn.k_proj.weight": matrix(128, HIDDEN),
            "self_attn.v_proj.weight": matrix(128, HIDDEN),
            "self_attn.o_proj.weight": matrix(HIDDEN, 256),
            "mlp.gate.weight": matrix(experts, HIDDEN),
        }
        for expert in range(experts):
            tensors |= {
                f"mlp.experts.{expert}.gate_proj.weight": matrix(INNER, HIDDEN),
                f"mlp.experts.{expert}.up_proj.weight": matrix(INNER, HIDDEN),
                f"mlp.experts.{expert}.down_proj.weight": matrix(HIDDEN, INNER),
            }
        named = {prefix + name: tensor for name, tensor in tensors.items()}
        write(f"layer-{layer:02d}.safetensors", named)
    outside = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": norm_H,
    }
    write("outside.safetensors", outside)
    config = {**CONFIG, "num_hidden_layers": layers, "num_experts": experts}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measure a run, once for each kind."""
    root = tmp_path_factory.mktemp("memory")

    @cache
    def source(layers, experts, dtype):
        folder = root / f"source-{layers}-{experts}-{dtype}"
        write_checkpoint(folder, layers, experts, dtype)
        return folder

    @cache
    def run(layers, experts, stored, dtype, *options):
        words = map(str, [layers, experts, stored, dtype, *options])
        output = root / "-".join(["output", *words])
        command = [sys.executable, SCRIPT, source(layers, experts, stored), output, dtype]
        done = subprocess.run(
            [*command, *map(str, options)],
            env=ENVIRONMENT if "--room" not in options else UNTUNED,
            stdout=subprocess.PIPE,
            check=True,
        )
        return {**json.loads(done.stdout), "output": output}

    def measure(layers, dtype, *options, experts=EXPERTS, stored=torch.bfloat16):
        return run(layers, experts, stored, dtype, *options)

    return measure


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(measured):
    few, many = measured(4, "float32"), measured(16, "float32")
    assert abs(many["peak"] - few["peak"]) < LAYER_BYTES, (few, many)
    # nor from layer to layer, once libraries have what they load when first used
    assert max(many["layers"][10:]) - max(many["layers"][4:10]) < LAYER_BYTES / 4, many


@pytest.mark.parametrize(
    ("layers", "experts", "dtype"),
    [
        pytest.param(4, 32, "float32", marks=pytest.mark.slow),
        pytest.param(16, 32, "float32", marks=pytest.mark.slow),
        # products in bf16 take ten times as long where the processor has none
        pytest.param(4, 128, "bfloat16", marks=pytest.mark.slow),
        pytest.param(64, 8, "bfloat16", marks=pytest.mark.slow),
        pytest.param(16, 128, "float32", marks=pytest.mark.slow),
    ],
)
def test_memory_stays_within_the_plan(layers, experts, dtype, measured):
    told = measured(layers, dtype, experts=experts)
    assert told["peak"] <= told["planned"], told
    # the plan is a promise, not an excuse: what it is made for is really taken
    working = max(size for part, size in told["parts"].items() if part.startswith("work: "))
    assert told["peak"] - told["base"] > working / 2, told


@pytest.mark.slow
def test_memory_stays_within_the_plan_of_a_refit(measured):
    told = measured(4, "bfloat16", "--refit", "layer")
    assert told["parts"]["activations for the refit"] > 0
    assert told["peak"] <= told["planned"], told


@pytest.mark.slow
@pytest.mark.parametrize("room", [None, 144_000_000])
def test_memory_stays_within_the_plan_of_slices(room, measured):
    # in a budget the products of activations of 32 experts, 34 MB, go to the disk
    words = () if room is None else ("--room", room)
    told = measured(4, "float32", "--slices", "--refit", "trajectory", *words)
    assert told["peak"] <= told["planned"], told
    assert told["parts"]["products of activations"] > 0


def with_budgets(measured, layers=2, experts=8):
    """Runs in float32 throughout, with a budget so many bytes above what Python takes."""
    return [
        measured(layers, "float32", "--room", room, experts=experts, stored=torch.float32)
        for room in ROOMS
    ]


def test_memory_stays_within_a_plan_within_a_budget(measured):
    for told in with_budgets(measured):
        assert told["trims_heap"], told
        assert told["peak"] <= told["planned"] <= told["ram"], told


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "experts"), [(16, 8), (4, 128)])
def test_memory_stays_within_a_plan_within_a_budget_for_more(layers, experts, measured):
    for told in with_budgets(measured, layers, experts):
        assert told["peak"] <= told["planned"] <= told["ram"], told


def test_a_budget_decides_the_batch_and_not_what_comes_out(measured):
    small, medium, large = with_budgets(measured)
    assert small["batch"] < medium["batch"] == large["batch"]
    assert 0 == medium["parts"]["attention outputs"] < large["parts"]["attention outputs"]
    layers, tensors = _decided(large["output"]), load_tensors(large["output"])
    for told in (small, medium):
        for got, wanted in zip(_decided(told["output"]), layers, strict=True):
            assert got["groups"] == wanted["groups"]
        for name, got in load_tensors(told["output"]).items():
            wanted = tensors[name]
            assert (got - wanted).norm() <= 1e-6 * wanted.norm(), name


def _decided(output):
    return json.loads((output / "ream_stream.json").read_text(encoding="utf-8"))["layers"]


@pytest.fixture
def planner(tmp_path, monkeypatch):
    """Plan a run with a memory, in a process whose own memory seems not to change."""
    write_checkpoint(tmp_path / "source", 2, 8)
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 300_000_000)

    def plan(ram, grouping="ream"):
        method = Method(grouping=grouping, similarity_tokens=64, alignment_tokens=64)
        wanted = Settings(experts=6, method=method)
        return make_plan(
            open_checkpoint(tmp_path / "source"), wanted, 64, 128, budgets=Budgets.of(ram)
        )

    return plan


def test_a_budget_too_small_is_refused_before_anything_is_read(planner, monkeypatch):
    def read(_tensors, name):
        pytest.fail(f"{name} was read")

    monkeypatch.setattr(MappedTensors, "__getitem__", read)
    with pytest.raises(OverBudgetError, match=r"with one sequence at a time") as refused:
        planner(300_000_000)
    told = re.search(r"Give --ram (\w[\w.]*)", str(refused.value))[1]
    # what is told to be enough is, and nothing less; it has three digits
    least = planner(parse_size(told)).memory_bytes
    assert size_option(least) == told
    with pytest.raises(OverBudgetError):
        planner(least - 1)


def test_the_batch_shrinks_with_the_budget(planner):
    budgets = range(454_000_000, 363_000_000, -15_000_000)
    # where experts are compared, that takes more than a small batch
    plans = [planner(ram, grouping="none") for ram in budgets]
    batches = [plan.schedule.batch_sequences for plan in plans]
    assert batches == sorted(batches, reverse=True)
    assert batches[0] == 64
    assert len(set(batches)) >= 3
    for ram, plan in zip(budgets, plans, strict=True):
        assert sum(plan.memory.values()) == plan.memory_bytes <= ram


def test_attention_is_kept_only_where_there_is_room(planner):
    roomy = planner(500_000_000)
    kept = roomy.memory["attention outputs"]
    assert kept == 64 * 128 * HIDDEN * 4
    tight = planner(roomy.memory_bytes - 1)
    assert tight.schedule.batch_sequences == roomy.schedule.batch_sequences
    assert tight.memory["attention outputs"] == 0


def test_the_reported_peak_is_the_measured_one(measured):
    told = measured(16, "float32")
    assert abs(told["reported"] - told["peak"]) < LAYER_BYTES / 4


@pytest.mark.slow
def test_a_leak_is_seen(measured):
    healthy, leaking = measured(4, "bfloat16"), measured(16, "bfloat16", "--leak")
    assert leaking["peak"] - healthy["peak"] > LAYER_BYTES
    assert max(leaking["layers"][10:]) - max(leaking["layers"][4:10]) > LAYER_BYTES
    assert leaking["peak"] > leaking["planned"]


@pytest.mark.slow
def test_products_of_ever_new_sizes_take_no_more_memory_each():
    code = """
import torch
from ream_stream.host_memory import anonymous_bytes, bound_kernel_caches, trim
bound_kernel_caches()
torch.set_num_threads(1)
weight = torch.ones(1024, 256, dtype=torch.bfloat16)
taken = []
for rows in range(1, 401):
    torch.nn.functional.linear(torch.ones(rows, 256, dtype=torch.bfloat16), weight)
    if rows % 100 == 0:
        trim()
        taken.append(anonymous_bytes())
print(taken[-1] - taken[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, check=True
    )
    # 170 MB with what oneDNN and torch keep by default
    assert int(done.stdout) < 20_000_000
