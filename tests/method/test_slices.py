"""Slices of experts: the order in which neurons go, and what stays."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_removal import damped, one_by_one

from ream_stream.method.slices import (
    BIAS_STEP,
    RemovalPath,
    distinct_rows,
    kept_neurons,
    narrowed_down,
    removal_path,
    removal_paths,
    slice_scores,
    slices_kept,
)


def expert(inner, hidden=9, *, seed=0, tokens=300):
    """Return A (I, I) of activations that depend on each other, and a down projection."""
    draw = torch.Generator().manual_seed(seed)
    mixed_II = torch.randn(inner, inner, generator=draw)
    scale_I = torch.rand(inner, generator=draw) ** 2
    inner_TI = torch.randn(tokens, inner, generator=draw) @ mixed_II * scale_I
    return inner_TI.T @ inner_TI, torch.randn(hidden, inner, generator=draw)


@pytest.mark.parametrize("inner", [1, 7, 64, 65, 150])
def test_neurons_removed_in_batches_go_in_the_order_of_one_at_a_time(inner):
    gram_II, down_HI = expert(inner, seed=inner)
    path = removal_path(gram_II, down_HI)
    order, errors = one_by_one(gram_II, down_HI)
    assert path.order_I.tolist() == order
    assert path.error_I.tolist() == pytest.approx(errors, rel=1e-6)


def test_without_correlation_the_least_power_goes_first():
    # A diagonal: eps = |d|^2 (A + l), l = .01 * mean diagonal = .02
    gram_II = torch.diag(torch.tensor([4.0, 1.0, 1.0, 2.0]))
    down_HI = torch.tensor([[1.0, 1.0, 3.0, 1.0]])
    path = removal_path(gram_II, down_HI)
    assert path.order_I.tolist() == [2, 0, 3, 1]
    assert path.error_I.tolist() == pytest.approx([9 * 1.02, 4.02, 2.02, 1.02])


def test_of_two_equal_neurons_one_goes_for_nothing_and_the_other_does_its_work():
    inner_TI = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    inner_TI[:, 2] = inner_TI[:, 0]
    gram_II, down_HI = inner_TI.T @ inner_TI, torch.tensor([[1.0, 1.0, 1.0]])
    path = removal_path(gram_II, down_HI)
    gone = int(path.order_I[-1])
    assert gone in {0, 2}
    assert path.error_I[-1] < 0.03 * path.error_I[-2]
    down_HN = narrowed_down(gram_II, down_HI, torch.tensor([2 - gone, 1]))
    assert down_HN[0, 0] == pytest.approx(2, abs=0.02)


@given(st.integers(2, 40), st.data())
def test_errors_add_up_to_what_the_best_down_projection_of_the_rest_leaves(inner, data):
    gram_II, down_HI = expert(inner, seed=inner)
    path = removal_path(gram_II, down_HI)
    stay = data.draw(st.integers(1, inner))
    neuron_N = path.order_I[:stay]
    new_HI = torch.zeros_like(down_HI, dtype=torch.float64)
    new_HI[:, neuron_N] = narrowed_down(gram_II, down_HI, neuron_N).double()
    change_HI = new_HI - down_HI.double()
    left = (change_HI @ damped(gram_II) * change_HI).sum().item()
    scale = path.error_I.sum().item()
    assert left == pytest.approx(path.error_I[stay:].sum().item(), abs=1e-6 * scale)


def test_an_expert_without_tokens_keeps_its_first_neurons_as_they_are():
    down_HI = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    path = removal_path(torch.zeros(4, 4), down_HI)
    assert path.order_I.tolist() == [0, 1, 2, 3]
    assert not path.error_I.any()
    kept_HN = narrowed_down(torch.zeros(4, 4), down_HI, torch.tensor([0, 1]))
    assert torch.equal(kept_HN, down_HI[:, :2])


def test_activations_that_are_not_finite_are_refused():
    gram_II, down_HI = expert(5)
    gram_II[2, 2] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        removal_path(gram_II, down_HI)
    with pytest.raises(ValueError, match="not finite"):
        narrowed_down(gram_II, down_HI, torch.tensor([0]))


def test_threads_give_the_paths_of_all_experts_in_order():
    experts = [expert(40, seed=seed) for seed in range(5)]
    for path, (gram_II, down_HI) in zip(
        removal_paths(iter(experts), threads=3), experts, strict=True
    ):
        alone = removal_path(gram_II, down_HI)
        assert torch.equal(path.order_I, alone.order_I)
        assert torch.equal(path.error_I, alone.error_I)


def test_scores_of_slices_never_increase_and_leave_out_what_no_slice_holds():
    error_I = torch.tensor([5.0, 1.0, 2.0, 6.0, 1.0, 1.0, 9.0])
    assert slice_scores(error_I, 3, 2).tolist() == [6, 6, 2]


def test_the_best_slices_stay_and_equal_ones_by_number_then_by_expert():
    score_EC = torch.tensor([[3.0, 1.0], [3.0, 3.0], [2.0, 1.0]])
    assert slices_kept(score_EC, 1) == [1, 0, 0]
    assert slices_kept(score_EC, 2) == [1, 1, 0]
    assert slices_kept(score_EC, 3) == [1, 2, 0]
    assert slices_kept(score_EC, 5) == [2, 2, 1]
    grouped = torch.tensor([[9.0, 8.0], [7.0, 6.0], [1.0, 0.5], [0.0, 0.0]])
    assert slices_kept(grouped, 4, routing_groups=2) == [2, 0, 2, 0]
    for keep, groups in ((7, 1), (0, 1), (3, 2)):
        with pytest.raises(ValueError, match="slices"):
            slices_kept(score_EC, keep, routing_groups=groups)


def test_slices_are_cut_by_importance_and_a_whole_expert_stays_in_its_order():
    path = RemovalPath(order_I=torch.tensor([5, 0, 3, 1, 4, 2]), error_I=torch.ones(6))
    assert kept_neurons(path, 2, 2).tolist() == [[0, 5], [1, 3]]
    assert kept_neurons(path, 3, 2).tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_of_later_slices_are_lower_whatever_their_sign(dtype):
    bias_E = torch.tensor([-2.0, -2.0, -2.0, 0.5, 7.0, 7.0], dtype=dtype)
    made_E = distinct_rows(bias_E, [0, 1, 2, 0, 0, 1], additive=True)
    assert made_E.dtype == dtype
    assert made_E[0] > made_E[1] > made_E[2]
    assert made_E[4] > made_E[5]
    assert torch.equal(made_E[[0, 3, 4]], bias_E[[0, 3, 4]])
    largest = max(2 * BIAS_STEP, 4 * 7 * torch.finfo(dtype).eps) + 7 * torch.finfo(dtype).eps
    assert (made_E - bias_E).abs().max() <= largest


def test_rows_without_a_bias_shrink_with_their_number():
    row_EH = torch.tensor([[1.0, -2.0], [1.0, -2.0], [4.0, 4.0]])
    made_EH = distinct_rows(row_EH, [0, 1, 0], additive=False)
    assert torch.allclose(made_EH, torch.tensor([[1.0, -2.0], [0.99, -1.98], [4.0, 4.0]]))
