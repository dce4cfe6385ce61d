"""Evaluations on several ranks: the numbers of one process."""

import pytest
from rank_runs import on_ranks
from tiny_runs import CPU, some_tokens
from torch import float32

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.evaluation.evaluate import evaluate


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_measure_what_one_does(size, checkpoints, tmp_path):
    checkpoint = open_checkpoint(checkpoints("qwen3_moe"))
    tokens = some_tokens(3, padded=True)

    def job(ranks):
        return evaluate(
            checkpoint,
            tokens,
            tmp_path / f"work-{ranks.size}",
            dtype=float32,
            device=CPU,
            original=checkpoint,
            batch_sequences=1,
            ranks=ranks,
        ).facts()

    (one,) = on_ranks(1, job, tmp_path / "one")
    found = on_ranks(size, job, tmp_path / "several")
    assert [ending.error for ending in found] == [""] * size
    assert [ending.value for ending in found] == [one.value] * size
    assert one.value["effective_rank"] > 1
    assert list((tmp_path / f"work-{size}").iterdir()) == []
