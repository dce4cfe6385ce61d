"""Tables of experts by token id, after experts went: by hand, and in general."""

import plain_method
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ream_stream.method.hash_routing import renumbered

ROWS_EH = torch.tensor([[0.0], [1.0], [10.0], [11.0], [5.0]])
"""Of five experts: 1 is near 0, 3 is near 2, and 4 is between them."""

PRUNED = [[0], [2], [4]]
MERGED = [[0, 3], [2], [4, 1]]


@pytest.mark.parametrize(
    ("groups", "old", "new"),
    [
        pytest.param(PRUNED, [2, 0], [1, 0], id="kept experts have their new numbers"),
        pytest.param(PRUNED, [3, 1], [1, 0], id="others become the nearest"),
        pytest.param(PRUNED, [1, 0], [2, 0], id="or the next, if the token has it"),
        pytest.param(PRUNED, [3, 2], [2, 1], id="kept ones come first"),
        pytest.param(PRUNED, [1, 0, 3], [2, 0, 1], id="each once, of three"),
        pytest.param(MERGED, [3, 2], [0, 1], id="merged ones are where they were merged"),
        pytest.param(MERGED, [3, 0], [1, 0], id="or the nearest, if the token has that"),
        pytest.param(MERGED, [1, 4, 3], [1, 2, 0], id="no other's place before it was asked"),
    ],
)
def test_what_experts_of_a_token_become(groups, old, new):
    assert renumbered(torch.tensor([old]), ROWS_EH, groups).tolist() == [new]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_keeping_all_changes_nothing(dtype):
    table_VK = torch.tensor([[4, 0, 2], [1, 3, 0], [2, 1, 4]], dtype=dtype)
    same = renumbered(table_VK, ROWS_EH, [[expert] for expert in range(5)])
    assert same.dtype == dtype
    assert torch.equal(same, table_VK)


def test_experts_the_router_cannot_tell_apart_are_taken_in_order():
    rows_EH = torch.zeros(5, 3)
    table_VK = torch.tensor([[3, 4], [4, 3]])
    assert renumbered(table_VK, rows_EH, PRUNED).tolist() == [[0, 2], [2, 0]]


@given(seed=st.integers(0, 2**16), kept=st.integers(3, 9), merges=st.booleans())
def test_experts_of_a_token_stay_different_and_agree_with_loops(seed, kept, merges):
    draw = torch.Generator().manual_seed(seed)
    rows_EH = torch.randn(9, 4, generator=draw)
    order = torch.randperm(9, generator=draw).tolist()
    groups = [[expert] for expert in sorted(order[:kept])]
    for expert in order[kept:] if merges else []:
        groups[int(torch.randint(kept, (), generator=draw))].append(expert)
    table_VK = torch.rand(20, 9, generator=draw).argsort(dim=1)[:, :3]
    new_VK = renumbered(table_VK, rows_EH, groups)
    assert all(len(set(row)) == 3 for row in new_VK.tolist())
    want = plain_method.renumber(table_VK.tolist(), rows_EH.double().numpy(), groups)
    assert new_VK.tolist() == want
