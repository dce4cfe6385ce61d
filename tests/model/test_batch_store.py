import errno
import os
import re
import threading
from functools import partial

import pytest
import torch
from tiny_runs import SCHEDULE

from ream_stream import files
from ream_stream.compression.journal import Journal
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import DamagedError, OverBudgetError
from ream_stream.model.batch_store import open_batch_store

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["memory", "disk", "disk, on a thread"])
def opened(request, tmp_path):
    """Return a function that opens a store for so many batches."""
    path = None if request.param == "memory" else tmp_path / "scratch-x"
    return partial(open_batch_store, path, beside="thread" in request.param)


def special(dtype, count):
    """Return numbers that a conversion would change: infinities, NaN, zeros of either sign."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 0.0, 1e-40]).to(dtype)
    values[: len(odd)] = odd
    return values


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_comes_back_bit_for_bit_and_the_last_may_be_smaller(opened, dtype):
    tensors = [special(dtype, 24).view(2, 3, 4), special(dtype, 24).view(2, 3, 4).flip(2)]
    tensors.append(special(dtype, 12).view(1, 3, 4))
    with opened(3) as kept:
        for number, tensor in enumerate(tensors):
            kept.put(number, tensor.clone())
        for _ in range(2):
            for number in (2, 0, 1):
                assert same_bits(kept.get(number), tensors[number])


@pytest.mark.parametrize("in_memory", [0, 2])
@pytest.mark.parametrize("beside", [False, True])
def test_tensors_of_any_size_are_kept_some_of_them_in_memory(tmp_path, in_memory, beside):
    path = tmp_path / "scratch-x"
    tensors = {n: special(torch.bfloat16, 6 + 5 * (n % 3)).view(1, -1) for n in (4, 0, 1, 7)}
    with open_batch_store(path, None, beside=beside, in_memory=in_memory) as kept:
        for number, tensor in tensors.items():
            kept.put(number, tensor)
        for number, tensor in tensors.items():
            assert same_bits(kept.get(number), tensor)
        assert {int(file.name) for file in path.iterdir()} == (
            {4, 7} if in_memory else {0, 1, 4, 7}
        )
        kept.put(4, tensors[1])
        kept.drop(1)
        assert same_bits(kept.get(4), tensors[1])
    assert not path.exists()


def test_sums_grow_in_their_place(opened):
    parts = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0))
    with opened(3) as kept:
        for number in range(3):
            kept.put(number, torch.zeros(5 - number, 2))
        for part in parts:
            for number in range(3):
                kept.put(number, kept.get(number).add_(part[number, number:]))
        for number in range(3):
            want = torch.zeros(5 - number, 2)
            for part in parts:
                want += part[number, number:]
            assert torch.equal(kept.get(number), want)


def test_zeros_are_kept_too(opened):
    with opened(1) as kept:
        kept.put(0, torch.zeros(3))
        assert torch.equal(kept.get(0), torch.zeros(3))


def test_the_folder_is_gone_at_the_end_even_of_a_failure(tmp_path):
    path = tmp_path / "scratch-x"

    def fail():
        with open_batch_store(path, 1) as kept:
            kept.put(0, torch.ones(2))
            assert path.is_dir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not path.exists()
    with open_batch_store(path, 1):
        assert not path.exists(), "nothing was kept"


def test_what_a_killed_run_left_is_replaced(tmp_path):
    path = tmp_path / "scratch-x"
    path.mkdir()
    (path / "junk").write_text("x")
    with open_batch_store(path, 1) as kept:
        kept.put(0, torch.ones(2))
        assert not (path / "junk").exists()


def test_a_flipped_bit_and_a_lost_chunk_are_damage(tmp_path):
    path = tmp_path / "scratch-x"
    with open_batch_store(path, 2) as kept:
        kept.put(0, torch.arange(8.0))
        kept.put(1, torch.arange(8.0))
        chunk = path / "c" / "0" / "0"
        data = bytearray(chunk.read_bytes())
        data[5] ^= 1
        chunk.write_bytes(data)
        with pytest.raises(DamagedError, match="batch 0 is damaged"):
            kept.get(0)
        (path / "c" / "1" / "0").unlink()
        with pytest.raises(DamagedError, match="lost what was kept of batch 1"):
            kept.get(1)


def test_a_write_on_the_thread_that_fails_is_told_and_the_thread_ends(tmp_path, monkeypatch):
    before = set(threading.enumerate())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def keep(use):
        with open_batch_store(tmp_path / "scratch-x", 2, beside=True) as kept:
            kept.put(0, torch.ones(4))
            kept.get(0)
            with monkeypatch.context() as patch:
                patch.setattr(files, "_put", full)
                kept.put(1, torch.ones(4))
                use(kept)

    for use in (lambda kept: kept.put(0, torch.ones(4)), lambda kept: kept.get(1)):
        with pytest.raises(OverBudgetError, match="no space left for"):
            keep(use)
        assert not (tmp_path / "scratch-x").exists()
        assert set(threading.enumerate()) <= before


def test_a_larger_tensor_or_another_dtype_is_refused(tmp_path):
    with open_batch_store(tmp_path / "scratch-x", 2) as kept:
        kept.put(0, torch.ones(4))
        for odd in (torch.ones(5), torch.ones(4).bfloat16()):
            with pytest.raises(ValueError, match=re.escape("at most 4 numbers")):
                kept.put(1, odd)


def test_strays_of_a_killed_run_are_removed_and_look_alikes_stay(tmp_path):
    workspace = Workspace(output=tmp_path / "out", work=tmp_path / "work")
    with workspace.locked():
        workspace.scratch("mixer-0").mkdir()
        (workspace.scratch("mixer-0") / "zarr.json").write_text("{}")
        foreign = workspace.work / "scratch-My notes"
        foreign.mkdir()
        workspace.remove_strays(Journal(fingerprint={}, schedule=SCHEDULE))
        assert not workspace.scratch("mixer-0").exists()
        assert foreign.exists()


def test_tensors_are_let_go_at_the_end_even_if_the_store_is_not():
    # a store in a cycle lives until Python looks for cycles, several layers later
    with open_batch_store(None, 1) as store:
        store.put(0, torch.ones(2))
    with pytest.raises(KeyError):
        store.get(0)
