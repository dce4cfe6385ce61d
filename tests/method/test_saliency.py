import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ream_stream.method.saliency import SALIENCIES, RoutedSums, merge_weights

EXPERTS, TOKENS, TOP_K = 6, 24, 2


def by_hand():
    """Two tokens to experts 0 and 1, one of them also to 2; expert 3 gets none."""
    sums = RoutedSums(4)
    sums.update(
        topk_TK=torch.tensor([[0, 1], [2, 0]]),
        gate_TK=torch.tensor([[0.75, 0.25], [0.5, 0.5]]),
        score_TK=torch.tensor([[0.5, 0.25], [0.25, 0.25]]),
        norm_TK=torch.tensor([[4.0, 8.0], [2.0, 6.0]]),
    )
    return sums


@pytest.mark.parametrize(
    ("name", "scores"),
    {
        # expert 0 has gates .75, .5, scores .5, .25 and norms 4, 6
        "reap": [(0.75 * 4 + 0.5 * 6) / 2, 0.25 * 8, 0.5 * 2, 0],
        "reap-softmax": [(0.5 * 4 + 0.25 * 6) / 2, 0.25 * 8, 0.25 * 2, 0],
        "reap-squared": [(0.25 * 4 + 0.0625 * 6) / 2, 0.0625 * 8, 0.0625 * 2, 0],
        "reap-sum": [0.75 * 4 + 0.5 * 6, 0.25 * 8, 0.5 * 2, 0],
        "energy": [(3.0**2 + 3.0**2) / 2, 2.0**2 / 2, 1.0**2 / 2, 0],
        "frequency": [2 / 4, 1 / 4, 1 / 4, 0],
        "ean": [(4 + 6) / 2, 8, 2, 0],
    }.items(),
)
def test_saliencies_by_hand(name, scores):
    saliency_E = SALIENCIES[name](by_hand())
    assert saliency_E.tolist() == scores
    assert saliency_E.dtype == torch.float64


def test_every_saliency_is_checked_by_hand():
    [mark] = test_saliencies_by_hand.pytestmark
    assert {name for name, _ in mark.args[1]} == set(SALIENCIES)


@pytest.mark.parametrize("name", SALIENCIES)
def test_without_any_token_all_scores_are_zero(name):
    assert SALIENCIES[name](RoutedSums(3)).tolist() == [0, 0, 0]


def random_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randn(TOKENS, EXPERTS, generator=generator).softmax(dim=1)
    score_TK, topk_TK = score_TE.topk(TOP_K)
    gate_TK = score_TK / score_TK.sum(dim=1, keepdim=True)
    norm_TK = 10 * torch.rand(TOKENS, TOP_K, generator=generator)
    return topk_TK, gate_TK, score_TK, norm_TK


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, TOKENS - 1), max_size=5, unique=True),
    st.randoms(use_true_random=False),
)
def test_scores_do_not_depend_on_how_tokens_are_cut_into_batches_nor_their_order(
    seed, cuts, random
):
    data = random_batch(seed)
    whole, parts = RoutedSums(EXPERTS), RoutedSums(EXPERTS)
    whole.update(*data)
    bounds = list(itertools.pairwise([0, *sorted(cuts), TOKENS]))
    random.shuffle(bounds)
    for start, stop in bounds:
        parts.update(*(tensor[start:stop] for tensor in data))
    for saliency in SALIENCIES.values():
        torch.testing.assert_close(saliency(parts), saliency(whole), rtol=1e-12, atol=0)


def test_sums_of_domains_add_up_to_the_sums_of_all_tokens():
    first, second, both = RoutedSums(EXPERTS), RoutedSums(EXPERTS), RoutedSums(EXPERTS)
    for sums, seed in ((first, 1), (second, 2)):
        sums.update(*random_batch(seed))
        both.update(*random_batch(seed))
    first.add(second)
    for name, tensor in both.tensors().items():
        assert torch.equal(first.tensors()[name], tensor), name
    assert first.tokens == 2 * TOKENS


def test_sums_survive_being_taken_apart():
    sums = by_hand()
    again = RoutedSums.from_tensors(sums.tensors())
    assert {name: tensor.tolist() for name, tensor in again.tensors().items()} == {
        "tokens": 2,
        "count_E": [2, 1, 1, 0],
        "norm_E": [10, 8, 2, 0],
        "gate_norm_E": [6, 2, 1, 0],
        "gate_norm_squared_E": [18, 4, 1, 0],
        "score_norm_E": [3.5, 2, 0.5, 0],
        "score_squared_norm_E": [1.375, 0.5, 0.125, 0],
    }
    again.tokens += 1
    assert sums.tokens == 2  # a copy, not a view


def test_small_terms_are_not_lost_in_a_large_sum():
    sums = RoutedSums(1)
    one = torch.ones(1, 1)
    sums.update(torch.zeros(1, 1, dtype=torch.long), one, one, torch.full((1, 1), 2.0**24))
    for _ in range(4):
        sums.update(torch.zeros(1, 1, dtype=torch.long), one, one, one)
    assert sums.norm_E.item() == 2**24 + 4  # float32 would have stayed at 2**24


@pytest.mark.parametrize(
    ("saliency", "weights"),
    [
        ([2.0, 0.0, 1.0], [2.0, 0.5, 1.0]),  # 0.5 is less than any positive score
        ([2.0, 0.0, 0.25], [2.0, 0.25, 0.25]),
        ([0.0, 0.0], [0.5, 0.5]),
        ([3.0, 1.0], [3.0, 1.0]),
    ],
)
def test_unreached_experts_get_a_small_merge_weight(saliency, weights):
    assert merge_weights(torch.tensor(saliency)).tolist() == weights
