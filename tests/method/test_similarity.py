import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import FLOAT64, bound

from ream_stream.method.similarity import (
    SIMILARITIES,
    LogitGram,
    MeanActivations,
    distance,
    distances_of_directions,
    expert_similarity,
    gate_similarity,
)

CPU = torch.device("cpu")
seeds = st.integers(0, 2**32 - 1)


def means(similarity, inner=2, num_experts=2):
    return MeanActivations(num_experts, inner, similarity=similarity, device=CPU)


@pytest.mark.parametrize(
    ("similarity", "mean", "weight"),
    [
        ("gated", [(0.5 * 1 + 0.25 * 3) / 2, (0.5 * 2 + 0.25 * 4) / 2], (0.5 + 0.25) / 2),
        ("plain", [(1 + 3) / 2, (2 + 4) / 2], 1),
    ],
)
def test_mean_activations_by_hand(similarity, mean, weight):
    sums = means(similarity)
    sums.add(1, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, 0.25]))
    assert sums.mean_EI().tolist() == [[0, 0], mean]
    assert sums.mean_weight_E().tolist() == [0, weight]


@given(seeds, st.lists(st.integers(1, 31), max_size=4, unique=True))
def test_means_do_not_depend_on_how_tokens_are_cut_into_batches(seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    activation_TI = torch.randn(32, 5, generator=generator)
    score_T = torch.rand(32, generator=generator)
    for similarity in SIMILARITIES:
        whole, parts = means(similarity, inner=5), means(similarity, inner=5)
        whole.add(0, activation_TI, score_T)
        for start, stop in itertools.pairwise([0, *sorted(cuts), 32]):
            parts.add(0, activation_TI[start:stop], score_T[start:stop])
        apart_I = (parts.mean_EI() - whole.mean_EI())[0].abs()
        weight_T = score_T if similarity == "gated" else torch.ones(32)
        # the mean of 32 products, made in float32 twice
        assert (apart_I <= 2 * bound(32, weight_T @ activation_TI.abs() / 32)).all()


@given(seeds)
def test_the_mean_output_is_the_down_projection_of_the_mean_activation(seed):
    generator = torch.Generator().manual_seed(seed)
    activation_TI = torch.randn(32, 5, generator=generator)
    score_T = torch.rand(32, generator=generator)
    down_HI = torch.randn(3, 5, generator=generator)
    bias_H = torch.randn(3, generator=generator)
    sums = means("gated", inner=5)
    sums.add(0, activation_TI, score_T)
    mean_H = down_HI.double() @ sums.mean_EI()[0] + bias_H * sums.mean_weight_E()[0]
    output_TH = activation_TI.double() @ down_HI.T.double() + bias_H
    wanted_H = (score_T.double()[:, None] * output_TH).mean(dim=0)
    # means of 32 products in float32, multiplied in float64
    near_H = bound(32, down_HI.abs() @ (score_T @ activation_TI.abs() / 32))
    assert ((mean_H - wanted_H).abs() <= near_H + 1e-12).all()


def test_half_precision_activations_are_not_summed_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    # rows enough for two blocks
    activation_TI = torch.randn(5000, 1024, generator=generator).bfloat16()
    score_T = torch.rand(5000, generator=generator)
    sums = means("gated", inner=1024)
    sums.add(0, activation_TI, score_T)
    exact_I = score_T.double() @ activation_TI.double() / 5000
    error = (sums.mean_EI()[0] - exact_I).norm() / exact_I.norm()
    assert error < 1e-5  # the product in bfloat16 is off by 2e-3


def test_gate_similarity_by_hand():
    gram = LogitGram(3, device=CPU)
    # columns (1, 0), (0, 5) and (-2, 0): their lengths must not matter
    gram.update(torch.tensor([[1.0, 0.0, -2.0]]))
    gram.update(torch.tensor([[0.0, 5.0, 0.0]]))
    half = math.sqrt(2) / 2  # of the largest distance, 2
    torch.testing.assert_close(
        gate_similarity(gram.gram_EE),
        torch.tensor([[1, 1 - half, 0], [1 - half, 1, 1 - half], [0, 1 - half, 1]]).double(),
    )


@given(seeds, st.integers(2, 6), st.integers(1, 40))
def test_distances_from_inner_products_are_those_of_the_normalized_columns(
    seed, experts, tokens
):
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    logits_TE[:, 0] *= 0  # a router column that never fires
    gram = LogitGram(experts, device=CPU)
    for batch in logits_TE.split(7):
        gram.update(batch)
    columns = torch.nn.functional.normalize(logits_TE.double(), dim=0).T
    torch.testing.assert_close(
        distances_of_directions(gram.gram_EE),
        (columns[:, None] - columns).norm(dim=2),
        rtol=0,
        # near zero the root of the error of 1 + 1 - 2 cos, a sum of 40 products and 3 roundings
        atol=bound(2 * 43, 1, FLOAT64) ** 0.5,
    )


def test_equal_columns_are_wholly_similar():
    gram = LogitGram(2, device=CPU)
    gram.update(torch.ones(4, 2))
    assert gate_similarity(gram.gram_EE).tolist() == [[1, 1], [1, 1]]


def test_expert_similarity_by_hand():
    mean_EH = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-1.0, 0.0], [0.0, 0.0]])
    assert expert_similarity(mean_EH).tolist() == [
        [1, 0.5, 0, 0.5],
        [0.5, 1, 0.5, 0.5],
        [0, 0.5, 1, 0.5],
        [0.5, 0.5, 0.5, 1],
    ]


def test_distance_by_hand():
    expert_EE = torch.tensor([[1.0, 0.75], [0.75, 1.0]], dtype=torch.float64)
    gate_EE = torch.tensor([[1.0, 0.25], [0.25, 1.0]], dtype=torch.float64)
    assert distance(expert_EE, None).tolist() == [[0, 0.25], [0.25, 0]]
    assert distance(expert_EE, gate_EE).tolist() == [[0, 0.5], [0.5, 0]]


@given(seeds, st.integers(1, 8))
def test_distances_are_symmetric_in_the_unit_interval_and_zero_for_an_expert_itself(
    seed, experts
):
    generator = torch.Generator().manual_seed(seed)
    gram = LogitGram(experts, device=CPU)
    gram.update(torch.randn(16, experts, generator=generator))
    mean_EH = torch.randn(experts, 4, generator=generator)
    far_EE = distance(expert_similarity(mean_EH), gate_similarity(gram.gram_EE))
    assert far_EE.dtype == torch.float64
    assert far_EE.diagonal().eq(0).all()
    assert ((far_EE >= 0) & (far_EE <= 1)).all()
    torch.testing.assert_close(far_EE, far_EE.T, rtol=0, atol=1e-12)


def test_numbers_that_are_not_finite_are_not_hidden():
    gram = LogitGram(3, device=CPU)
    gram.update(torch.tensor([[1.0, float("inf"), 2.0]]))
    assert gate_similarity(gram.gram_EE).isnan().any()
    mean_EH = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.0, 1.0]])
    assert expert_similarity(mean_EH).isnan().any()
