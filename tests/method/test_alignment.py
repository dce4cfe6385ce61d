import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import bound, root_bound
from torch.nn.functional import linear, normalize, silu

from ream_stream.method.alignment import (
    ALIGNMENTS,
    Neurons,
    Pair,
    activation_cost,
    align,
    align_all,
    cost,
    match,
    match_all,
    weight_cost,
)
from ream_stream.method.expert import Expert, reorder

HIDDEN, INNER, TOKENS = 6, 5, 32
seeds = st.integers(0, 2**32 - 1)
with_costs = pytest.mark.parametrize("name", [name for name in ALIGNMENTS if name != "none"])


def random_expert(generator, dtype=torch.float32):
    def matrix(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return Expert(matrix(INNER, HIDDEN), matrix(INNER, HIDDEN), matrix(HIDDEN, INNER))


def activation(expert, x_TH):
    return silu(linear(x_TH, expert.gate_IH)) * linear(x_TH, expert.up_IH)


def neurons(expert, x_TH):
    return Neurons(expert, activation(expert, x_TH))


@given(seeds)
def test_reordering_neurons_leaves_the_function_unchanged(seed):
    generator = torch.Generator().manual_seed(seed)
    expert = Expert(*(part.double() for part in random_expert(generator)))
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    order_I = torch.randperm(INNER, generator=generator)
    moved = reorder(expert, order_I)
    before, after = activation(expert, x_TH), activation(moved, x_TH)
    assert torch.equal(moved.gate_IH[0], expert.gate_IH[order_I[0]])
    torch.testing.assert_close(
        linear(after, moved.down_HI), linear(before, expert.down_HI), rtol=0, atol=1e-12
    )


@with_costs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seeds)
def test_matching_undoes_any_reordering(name, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    expert = random_expert(generator, dtype)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    moved = reorder(expert, torch.randperm(INNER, generator=generator))
    order_I = align(ALIGNMENTS[name], Pair(neurons(expert, x_TH), neurons(moved, x_TH)))
    for ours, original in zip(reorder(moved, order_I), expert, strict=True):
        assert torch.equal(ours, original)


def test_no_alignment_keeps_the_order_and_needs_no_activations():
    expert = random_expert(torch.Generator().manual_seed(0))
    moved = reorder(expert, torch.tensor([4, 3, 2, 1, 0]))
    pair = Pair(Neurons(expert, None), Neurons(moved, None))
    assert align(ALIGNMENTS["none"], pair).tolist() == [0, 1, 2, 3, 4]
    (found,) = align_all(ALIGNMENTS["none"], [pair], threads=2)
    assert found.order_I.tolist() == [0, 1, 2, 3, 4]
    assert math.isnan(found.kept)
    with pytest.raises(ValueError, match="has no cost"):
        cost(ALIGNMENTS["none"], pair)


def test_activations_that_count_must_be_given():
    expert = random_expert(torch.Generator().manual_seed(0))
    pair = Pair(Neurons(expert, torch.ones(2, INNER)), Neurons(expert, None))
    with pytest.raises(ValueError, match="both experts need them"):
        cost(ALIGNMENTS["both"], pair)


def test_activation_cost_by_hand():
    a_nI = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    b_nI = torch.tensor([[5.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    root = 2**0.5
    # neurons of a point right, up, nowhere; of b right, left, nowhere
    torch.testing.assert_close(
        activation_cost(a_nI, b_nI),
        torch.tensor([[0, 2, 1], [root, root, 1], [1, 1, 0]]),
    )


@given(seeds)
def test_costs_are_the_distances_of_normalized_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = random_expert(generator), random_expert(generator)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator)

    def rows(expert):
        return torch.cat([expert.gate_IH, expert.up_IH, expert.down_HI.T], dim=1)

    def far(a_IX, b_IX):
        a_IX, b_IX = (normalize(rows_IX.double(), dim=1) for rows_IX in (a_IX, b_IX))
        return (a_IX[:, None] - b_IX).norm(dim=2).float()

    by_weights = far(rows(a), rows(b))
    by_activations = far(activation(a, x_TH).T, activation(b, x_TH).T)
    pair = Pair(neurons(a, x_TH), neurons(b, x_TH))
    # 1 + 1 - 2 cos is a sum of 3 HIDDEN or TOKENS products, of rows normalized before
    of_weights, of_activations = (
        root_bound(bound(2 * (terms + 6), 1), far_II)
        for terms, far_II in ((3 * HIDDEN, by_weights), (TOKENS, by_activations))
    )
    for found_II, wanted_II, near_II in (
        (weight_cost(a, b), by_weights, of_weights),
        (cost(ALIGNMENTS["weights"], pair), by_weights, of_weights),
        (cost(ALIGNMENTS["activations"], pair), by_activations, of_activations),
        (
            cost(ALIGNMENTS["both"], pair),
            by_weights + by_activations,
            of_weights + of_activations,
        ),
    ):
        assert ((found_II - wanted_II).abs() <= near_II).all()
        assert near_II.max() < 0.1


def test_the_experts_compared_are_left_as_they_were():
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    pair = Pair(*(neurons(random_expert(generator), x_TH) for _ in range(2)))
    tensors = [*pair.centroid.expert, *pair.member.expert, pair.member.activation_nI]
    before = [tensor.clone() for tensor in tensors]
    cost(ALIGNMENTS["both"], pair)
    assert all(map(torch.equal, tensors, before))


def test_the_match_has_the_least_total_cost_not_the_least_each():
    cost_II = torch.tensor([[1.0, 2.0], [1.0, 9.0]])
    assert match(cost_II).tolist() == [1, 0]  # 2 + 1; taking the best for row 0 costs 1 + 9


def test_a_cost_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        match(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))


@pytest.mark.parametrize("threads", [1, 3])
def test_many_pairs_are_matched_in_order_whatever_the_threads(threads):
    generator = torch.Generator().manual_seed(0)
    costs = [torch.rand(40, 40, generator=generator) for _ in range(10)]
    orders = [found.order_I.tolist() for found in match_all(costs, threads=threads)]
    assert orders == [match(cost_II).tolist() for cost_II in costs]


def test_what_a_match_gains_by_hand():
    (found,) = match_all([torch.tensor([[1.0, 2.0], [1.0, 9.0]])], threads=1)
    # 1 + 9 as they are, 2 + 1 matched, over 2 neurons
    assert (found.kept, found.least) == (5.0, 1.5)


@with_costs
def test_aligning_many_pairs_is_aligning_each(name):
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    pairs = [Pair(*(neurons(random_expert(generator), x_TH) for _ in "ab")) for _ in range(5)]
    orders = align_all(ALIGNMENTS[name], iter(pairs), threads=2)
    for pair, found in zip(pairs, orders, strict=True):
        assert torch.equal(found.order_I, align(ALIGNMENTS[name], pair))


def test_few_costs_are_alive_while_many_are_matched():
    alive = weakref.WeakSet()
    most = 0

    def costs():
        nonlocal most
        for _ in range(12):
            cost_II = torch.rand(30, 30)
            alive.add(cost_II)
            most = max(most, len(alive))
            yield cost_II
            del cost_II

    assert len(list(match_all(costs(), threads=2))) == 12
    assert most <= 3
