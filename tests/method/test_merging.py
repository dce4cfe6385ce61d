import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import bound

from ream_stream.method.alignment import ALIGNMENTS, Neurons, Pair, align
from ream_stream.method.expert import Expert, reorder
from ream_stream.method.merging import MERGES, merge

HIDDEN, INNER = 6, 5
seeds = st.integers(0, 2**32 - 1)


def random_expert(generator, dtype=torch.float32):
    def matrix(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return Expert(matrix(INNER, HIDDEN), matrix(INNER, HIDDEN), matrix(HIDDEN, INNER))


def filled(value, dtype=torch.float32):
    return Expert(*(torch.full((1, 1), value, dtype=dtype) for _ in range(3)))


def test_shares_by_hand():
    weight_G = torch.tensor([3.0, 1.0])
    assert MERGES["saliency"](weight_G).tolist() == [0.75, 0.25]
    assert MERGES["mean"](weight_G).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", MERGES)
@given(st.lists(st.floats(2**-20, 2**20, width=32), min_size=1, max_size=64))
def test_shares_sum_to_one_in_float64(name, weights):
    share_G = MERGES[name](torch.tensor(weights, dtype=torch.float32))
    assert share_G.dtype == torch.float64
    assert abs(share_G.sum().item() - 1) < 1e-12


def test_merging_by_hand():
    merged = merge([0.75, 0.25], [filled(4.0), filled(8.0)], torch.float32)
    assert [part.item() for part in merged] == [5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(seeds)
def test_a_group_of_one_is_copied_bit_for_bit(dtype, seed):
    expert = random_expert(torch.Generator().manual_seed(seed), dtype)
    expert.gate_IH[0, :2] = torch.tensor([-0.0, 0.0])
    merged = merge([1.0], [expert], dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for ours, original in zip(merged, expert, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours.view(bits), original.view(bits))


@given(seeds, st.lists(st.floats(0.1, 10), min_size=1, max_size=15))
def test_averaging_an_expert_with_its_own_aligned_copies_gives_it_back(seed, weights):
    generator = torch.Generator().manual_seed(seed)
    expert = random_expert(generator, torch.bfloat16)
    copies = [reorder(expert, torch.randperm(INNER, generator=generator)) for _ in weights[1:]]

    def aligned():
        yield expert
        for copy in copies:
            pair = Pair(Neurons(expert, None), Neurons(copy, None))
            yield reorder(copy, align(ALIGNMENTS["weights"], pair))

    share_G = MERGES["saliency"](torch.tensor(weights))
    for ours, original in zip(
        merge(share_G.tolist(), aligned(), torch.bfloat16), expert, strict=True
    ):
        # float32 sums of equal numbers stay within the rounding that returns them
        assert torch.equal(ours, original)


def test_the_sum_is_rounded_once():
    # 256 + 1 is 256 in bfloat16: rounding after each member would lose all the ones
    members = [filled(256.0, torch.bfloat16), *[filled(1.0, torch.bfloat16)] * 8]
    merged = merge([1.0] * 9, members, torch.bfloat16)
    assert merged.gate_IH.item() == 264


@given(seeds, st.integers(2, 16))
def test_merged_weights_are_one_rounding_from_the_exact_average(seed, count):
    generator = torch.Generator().manual_seed(seed)
    members = [random_expert(generator, torch.bfloat16) for _ in range(count)]
    share_G = MERGES["saliency"](torch.rand(count, generator=generator) + 0.01)
    merged = merge(share_G.tolist(), members, torch.bfloat16)
    for place, ours in enumerate(merged):
        exact = sum(
            share * member[place].double()
            for share, member in zip(share_G, members, strict=True)
        )
        absolute = max(member[place].abs().max() for member in members).item()
        near = bound(count + 1, absolute)  # of a float32 sum whose shares sum to one
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=near)


def test_double_precision_members_are_summed_in_double_precision():
    merged = merge(
        [0.5, 0.5], [filled(1.0, torch.float64), filled(1e-12, torch.float64)], torch.float64
    )
    assert merged.up_IH.item() == 0.5 + 0.5e-12


def test_one_member_is_alive_at_a_time_and_none_is_changed():
    alive = weakref.WeakSet()
    most = 0
    values = []

    def loaded():
        nonlocal most
        for _ in range(4):
            # a generator forgets what it yields only if it holds no name for it
            yield load()
            most = max(most, len(alive))

    def load():
        expert = filled(2.0)
        alive.update(expert)
        values.append(expert.gate_IH.numpy())
        return expert

    merge([0.25] * 4, loaded(), torch.float32)
    assert most == 0  # when the next is asked for, the last is gone
    assert [value.item() for value in values] == [2, 2, 2, 2]


@pytest.mark.parametrize(("shares", "members"), [(2, 0), (2, 1), (2, 3), (0, 0)])
def test_there_are_as_many_members_as_shares_and_at_least_one(shares, members):
    with pytest.raises(ValueError, match="members"):
        merge([0.5] * shares, [filled(1.0)] * members, torch.float32)
