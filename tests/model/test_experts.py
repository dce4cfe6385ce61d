"""Experts run one by one give the bits of transformers' grouped product."""

import os
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ream_stream.checkpoint import read_ahead
from ream_stream.checkpoint.expert_layouts import find_experts
from ream_stream.checkpoint.header import read_header
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.file_access import FileRange
from ream_stream.model.expert_rows import slots_by_expert
from ream_stream.model.experts import ExpertWeights, StreamedExperts

CPU = torch.device("cpu")
PREFIX = "model.layers.0.mlp.experts"

# experts, top k, tokens, hidden, inner
SIZES = [
    (1, 1, 1, 16, 16),
    (8, 8, 1, 32, 16),
    (8, 8, 70, 32, 16),
    (8, 3, 300, 128, 48),
    (16, 8, 64, 64, 24),
    (64, 8, 200, 64, 32),
    (128, 8, 5, 32, 16),
    (6, 2, 33, 40, 24),  # transformers itself refuses rows of other than 16 bytes' multiples
    (5, 4, 17, 8, 8),
    (4, 2, 1000, 256, 128),
    # every expert has all tokens: more than are run at once
    (2, 2, 1025, 64, 32),
    (2, 2, 3000, 128, 64),
    (2, 2, 2049, 512, 256),
]
SIZES_IN = [
    # the largest products take seconds in bf16 where the processor has none
    pytest.param(sizes, dtype, marks=pytest.mark.slow if sizes[-1] == 256 and bf16 else ())
    for dtype, bf16 in ((torch.float32, False), (torch.bfloat16, True))
    for sizes in SIZES
]


class Pair:
    """transformers' experts, and ours over a file of the same weights."""

    def __init__(self, path, sizes, dtype, seed=0):
        num_experts, self.top_k, self.tokens, self.hidden, inner = sizes
        self.num_experts = num_experts
        self.draw = torch.Generator().manual_seed(seed)
        config = Qwen3MoeConfig(
            hidden_size=self.hidden,
            moe_intermediate_size=inner,
            num_experts=num_experts,
            num_experts_per_tok=self.top_k,
        )
        config._experts_implementation = "grouped_mm"
        self.theirs = Qwen3MoeExperts(config).to(dtype)
        tensors = {}
        with torch.no_grad():
            for fused in (self.theirs.gate_up_proj, self.theirs.down_proj):
                fused.copy_(torch.randn(fused.shape, generator=self.draw) * 0.1)
            for expert in range(num_experts):
                gate, up = self.theirs.gate_up_proj[expert].chunk(2)
                down = self.theirs.down_proj[expert]
                for part, tensor in (("gate", gate), ("up", up), ("down", down)):
                    tensors[f"{PREFIX}.{expert}.{part}_proj.weight"] = tensor.clone()
        save_file(tensors, path)
        entries = read_header(path)
        self.checkpoint = Checkpoint(folder=path.parent, config={}, entries=entries)
        self.stack = find_experts(entries)[PREFIX]
        self.dtype = dtype

    def batch(self, unused=()):
        """Draw inputs, distinct experts of each token, and their weights."""
        hidden_TH = torch.randn(self.tokens, self.hidden, generator=self.draw).to(self.dtype)
        logits_TE = torch.randn(self.tokens, self.num_experts, generator=self.draw)
        logits_TE[:, list(unused)] = float("-inf")
        top = logits_TE.topk(self.top_k)
        return hidden_TH, top.indices, top.values.softmax(dim=1)

    def ours(self, batch, listener=None, *, captures_only=False, beside=False):
        with self.checkpoint.open() as tensors, torch.no_grad():
            weights = ExpertWeights(tensors, self.stack, self.dtype, CPU, beside=beside)
            experts = StreamedExperts(self.theirs, weights)
            experts.listener, experts.captures_only = listener, captures_only
            return experts(*batch)

    @torch.no_grad()
    def whole(self, batch):
        return self.theirs(*batch)


@pytest.mark.parametrize(("sizes", "dtype"), SIZES_IN, ids=str)
def test_streamed_experts_have_the_bits_of_the_grouped_product(tmp_path, sizes, dtype):
    pair = Pair(tmp_path / "x.safetensors", sizes, dtype)
    for seed in range(3):
        pair.draw.manual_seed(seed)
        hidden_TH, index_TK, weight_TK = pair.batch()
        # families give weights in their own dtype, or in float32
        for weight in (weight_TK, weight_TK.to(dtype)):
            batch = hidden_TH, index_TK, weight
            assert torch.equal(pair.ours(batch), pair.whole(batch))
            # as on a device, where the next is loaded while products of the last are made
            assert torch.equal(pair.ours(batch, beside=True), pair.whole(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("unused", [(0,), (7,), (0, 1, 2, 6, 7), (1, 3, 5, 7)], ids=str)
def test_experts_without_tokens_are_passed_over(tmp_path, unused, dtype):
    pair = Pair(tmp_path / "x.safetensors", (8, 3, 50, 32, 16), dtype)
    batch = pair.batch(unused)
    assert not set(unused) & set(batch[1].unique().tolist())
    assert torch.equal(pair.ours(batch), pair.whole(batch))


def test_a_changed_weight_or_order_of_experts_is_seen(tmp_path):
    pair = Pair(tmp_path / "x.safetensors", (8, 3, 50, 32, 16), torch.float32)
    hidden_TH, index_TK, weight_TK = batch = pair.batch()
    want = pair.whole(batch)
    assert not torch.equal(pair.ours((hidden_TH, index_TK, weight_TK * 1.001)), want)
    assert not torch.equal(pair.ours((hidden_TH, index_TK.flip(1), weight_TK)), want)
    assert not torch.equal(pair.ours((hidden_TH.flip(0), index_TK, weight_TK)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_listener_gets_norms_of_outputs_before_they_are_weighted(tmp_path, dtype):
    pair = Pair(tmp_path / "x.safetensors", (8, 3, 40, 32, 16), dtype)
    hidden_TH, index_TK, weight_TK = batch = pair.batch((2,))
    heard = []
    outputs = pair.ours(batch, heard.append)
    assert torch.equal(outputs, pair.whole(batch))
    (routed,) = heard
    assert torch.equal(routed.hidden_TH, hidden_TH)
    assert torch.equal(routed.index_TK, index_TK)
    assert torch.equal(routed.weight_TK, weight_TK)
    assert routed.norm_TK.dtype == torch.float32
    for token, slot in product(range(40), range(3)):
        expert = index_TK[token, slot]
        gate, up = pair.theirs.gate_up_proj[expert].detach().double().chunk(2)
        x = hidden_TH[token].double()
        inner = torch.nn.functional.silu(gate @ x) * (up @ x)
        want = (pair.theirs.down_proj[expert].detach().double() @ inner).norm()
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        assert float(routed.norm_TK[token, slot]) == pytest.approx(float(want), rel=rounding)


def test_only_listening_gives_zeros_and_the_same_norms(tmp_path):
    pair = Pair(tmp_path / "x.safetensors", (8, 3, 40, 32, 16), torch.bfloat16)
    batch, heard = pair.batch(), []
    pair.ours(batch, heard.append)
    outputs = pair.ours(batch, heard.append, captures_only=True)
    assert not outputs.any()
    assert outputs.shape == batch[0].shape
    assert torch.equal(heard[0].norm_TK, heard[1].norm_TK)


def test_running_experts_does_not_change_the_mapped_file(tmp_path):
    pair = Pair(tmp_path / "x.safetensors", (4, 2, 20, 32, 16), torch.float32)
    before = (tmp_path / "x.safetensors").read_bytes()
    with pair.checkpoint.open() as tensors:
        weights = ExpertWeights(tensors, pair.stack, torch.float32, CPU)
        gate_up_2IH, down_HI, *_ = weights.load(3)
        gate_up_2IH.zero_()
        down_HI.zero_()
        again = weights.load(3).gate_up
        assert torch.equal(again, pair.theirs.gate_up_proj[3])
    assert (tmp_path / "x.safetensors").read_bytes() == before


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 8),
    num_experts=st.integers(1, 20),
)
def test_slots_are_those_a_loop_over_tokens_finds(seed, tokens, top_k, num_experts):
    draw = torch.Generator().manual_seed(seed)
    index_TK = torch.randint(0, num_experts, (tokens, top_k), generator=draw)
    want = {}
    for slot, expert in enumerate(index_TK.flatten().tolist()):
        want.setdefault(expert, []).append(slot)
    found = [
        (expert, slot_R.tolist()) for expert, slot_R in slots_by_expert(index_TK, num_experts)
    ]
    assert [expert for expert, _ in found] == sorted(want)
    assert {expert: sorted(slots) for expert, slots in found} == want


def test_experts_that_are_kept_are_read_once_and_give_the_same_bits(tmp_path):
    pair = Pair(tmp_path / "x.safetensors", (8, 3, 50, 32, 16), torch.bfloat16)
    batch = pair.batch()
    with pair.checkpoint.open() as tensors, torch.no_grad():
        weights = ExpertWeights(tensors, pair.stack, pair.dtype, CPU)
        experts = StreamedExperts(pair.theirs, weights)
        weights.resident = 5
        for _ in range(2):
            assert torch.equal(experts(*batch), pair.whole(batch))
        kept = [weights.load(expert) for expert in range(8)]
        # of the rest, each takes the place of the one before
        assert len({loaded.down_HI.data_ptr() for loaded in kept}) == 5 + 1
        assert weights.load(0) is kept[0]
        weights.turn_to(range(3, 6))
        assert weights.load(3) is kept[3]
        assert weights.load(0) is not kept[0]


def test_projections_are_loaded_alone_and_more_of_them_kept(tmp_path):
    pair = Pair(tmp_path / "x.safetensors", (8, 3, 50, 32, 16), torch.float32)
    with pair.checkpoint.open() as tensors:
        weights = ExpertWeights(tensors, pair.stack, pair.dtype, CPU)
        weights.resident = 2
        weights.turn_to(range(8), "gate_up")
        for expert in range(8):
            loaded = weights.load(expert)
            assert torch.equal(loaded.gate_up, pair.theirs.gate_up_proj[expert])
            assert loaded.down_HI.numel() == 0 or expert >= 2
        weights.turn_to(range(8), "down")
        kept = [weights.load(expert) for expert in range(8)]
        assert all(
            torch.equal(kept[expert].down_HI, pair.theirs.down_proj[expert])
            for expert in range(6)
        )
        assert [weights.load(expert) is kept[expert] for expert in (0, 5)] == [True, True]
        assert kept[0].gate_up.numel() == 0
        weights.turn_to(range(8))
        assert torch.equal(weights.load(0).gate_up, pair.theirs.gate_up_proj[0])


def test_an_expert_loaded_beside_another_leaves_it_as_it_is(tmp_path):
    pair = Pair(tmp_path / "x.safetensors", (4, 2, 20, 32, 16), torch.float32)
    with pair.checkpoint.open() as tensors:
        weights = ExpertWeights(tensors, pair.stack, torch.float32, CPU, beside=True)
        for expert in range(3):
            loaded, after = weights.load(expert), weights.load(expert + 1)
            for one, number in ((loaded, expert), (after, expert + 1)):
                assert torch.equal(one.gate_up, pair.theirs.gate_up_proj[number])
                assert torch.equal(one.down_HI, pair.theirs.down_proj[number])


def test_the_next_expert_is_asked_for_byte_for_byte_and_small_ones_are_not(
    tmp_path, monkeypatch
):
    pair = Pair(tmp_path / "x.safetensors", (3, 1, 4, 64, 32), torch.float32)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, *rest: asked.append(rest))
    for least in (1, 10**9):
        monkeypatch.setattr(read_ahead, "LEAST_BYTES", least)
        with pair.checkpoint.open() as tensors:
            ExpertWeights(tensors, pair.stack, pair.dtype, CPU).load(1)
    found = [pair.checkpoint.entries[name] for name, _ in pair.stack.expert_slots(2)]
    size = 64 * 32 * 4
    assert asked == [(entry.start, size, os.POSIX_FADV_WILLNEED) for entry in found]
    assert len(asked) == 3


def test_a_large_expert_is_asked_for_in_pieces(tmp_path, monkeypatch):
    path, asked = tmp_path / "file", []
    path.write_bytes(bytes(10))
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, *rest: asked.append(rest[:2]))
    reader = read_ahead.ReadAhead()
    reader.ask([FileRange(path=path, start=5, stop=5 + (9 << 19) + 1)])
    reader.close()
    assert asked == [(5 + (n << 20), 1 << 20) for n in range(4)] + [
        (5 + (4 << 20), (1 << 19) + 1)
    ]
