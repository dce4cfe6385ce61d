"""Letters in shapes: S sequences, B sequences of a batch, L tokens of a sequence, H hidden."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import zarr
from crash import digests
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from ream_stream import files
from ream_stream.errors import DamagedError, OverBudgetError
from ream_stream.model.chunked_array import ChunkedArray
from ream_stream.model.hidden_states import HiddenStates, HiddenWriter

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SHAPE, BATCH = (5, 3, 4), 2


def states(shape, dtype, seed=0):
    """Return random bits: NaN payloads, infinities and denormals are among them."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(BITS[dtype])
    bits = torch.randint(info.min, info.max, shape, generator=generator).to(BITS[dtype])
    return bits.view(dtype)


def write(path, hidden_SLH, batch):
    writer = HiddenWriter(path, tuple(hidden_SLH.shape), hidden_SLH.dtype, batch)
    for index, hidden_BLH in enumerate(hidden_SLH.split(batch)):
        writer.write(index, hidden_BLH)
    writer.publish()


def write_by_zarr(path, hidden_SLH, batch):
    """Write a store as zarr's own functions do, with the options that the format needs."""
    kind = torch.uint16 if hidden_SLH.dtype.itemsize == 2 else torch.uint32
    array = zarr.create_array(
        LocalStore(path),
        shape=tuple(hidden_SLH.shape),
        chunks=(min(batch, len(hidden_SLH)), *hidden_SLH.shape[1:]),
        dtype=str(kind).removeprefix("torch."),
        compressors=[Crc32cCodec()],
        fill_value=torch.iinfo(kind).max,
        attributes={"dtype": str(hidden_SLH.dtype).removeprefix("torch.")},
        config={"write_empty_chunks": True},
    )
    array[:] = hidden_SLH.view(kind).numpy()


def read(path, shape, dtype, batch):
    store = HiddenStates(path, shape, dtype, batch)
    return torch.cat([store.read(index) for index in range(-(-shape[0] // batch))])


def same_bits(one, other):
    kind = BITS[one.dtype]
    return one.dtype == other.dtype and torch.equal(one.view(kind), other.view(kind))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hidden")


@given(
    dtype=st.sampled_from(sorted(BITS, key=str)),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)),
    batch=st.integers(1, 6),
    smaller=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_every_bit_comes_back_to_batches_of_any_size_and_the_last_may_be_short(
    folder, dtype, shape, batch, smaller, seed
):
    written = states(shape, dtype, seed)
    write(folder / "store", written, batch)
    assert same_bits(read(folder / "store", shape, dtype, batch), written)
    assert same_bits(read(folder / "store", shape, dtype, smaller), written)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_a_store_has_the_bytes_that_zarr_writes_and_zarr_reads_its_values(
    dtype, batch, tmp_path
):
    written = states(SHAPE, dtype)
    write(tmp_path / "ours", written, batch)
    write_by_zarr(tmp_path / "zarr", written, batch)
    ours, theirs = digests(tmp_path / "ours"), digests(tmp_path / "zarr")
    assert ours == theirs
    opened = zarr.open_array(tmp_path / "ours", mode="r")
    assert same_bits(torch.from_numpy(opened[:]).view(dtype), written)
    assert same_bits(read(tmp_path / "zarr", SHAPE, dtype, batch), written)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("fill", [0, -1])
def test_batches_of_nothing_but_the_fill_value_are_stored_like_any_other(fill, dtype, tmp_path):
    # zarr leaves out chunks that equal its fill value unless told not to; -1 is all bits set
    written = torch.full(SHAPE, fill, dtype=BITS[dtype]).view(dtype)
    write(tmp_path / "store", written, BATCH)
    assert len([p for p in (tmp_path / "store" / "c").rglob("*") if p.is_file()]) == 3
    assert same_bits(read(tmp_path / "store", SHAPE, dtype, BATCH), written)


def test_a_view_of_a_larger_tensor_is_stored_as_what_it_shows(tmp_path):
    wide = states((4, 3, 8), torch.bfloat16)
    write(tmp_path / "store", wide[:, :, ::2], BATCH)
    assert same_bits(
        read(tmp_path / "store", (4, 3, 4), torch.bfloat16, BATCH), wide[:, :, ::2]
    )


def test_a_store_has_its_name_only_when_it_is_published(tmp_path):
    writer = HiddenWriter(tmp_path / "store", SHAPE, torch.bfloat16, BATCH)
    writer.write(0, states((2, 3, 4), torch.bfloat16))
    assert [path.name for path in tmp_path.iterdir()] == ["store.partial"]
    with pytest.raises(DamagedError, match="is missing"):
        HiddenStates(tmp_path / "store", SHAPE, torch.bfloat16, BATCH)
    # what a killed run left is thrown away by the next
    write(tmp_path / "store", states(SHAPE, torch.bfloat16), BATCH)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "store", states(SHAPE, torch.bfloat16), BATCH)
    return tmp_path / "store"


def test_a_missing_chunk_is_damaged_and_not_read_as_fill_value(store):
    (store / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(DamagedError, match="lacks hidden states"):
        HiddenStates(store, SHAPE, torch.bfloat16, BATCH)


@pytest.mark.parametrize("position", [0, 17, -1])
def test_a_flipped_byte_is_damaged(position, store):
    chunk = store / "c" / "1" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[position] ^= 1
    chunk.write_bytes(data)
    opened = HiddenStates(store, SHAPE, torch.bfloat16, BATCH)
    opened.read(0)
    with pytest.raises(DamagedError, match="batch 1 is damaged"):
        opened.read(1)


@pytest.mark.parametrize("size", [0, 3, 20])
def test_a_cut_chunk_is_damaged(size, store):
    chunk = store / "c" / "2" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:size])
    with pytest.raises(DamagedError, match="batch 2 is damaged"):
        HiddenStates(store, SHAPE, torch.bfloat16, BATCH).read(2)


def test_a_chunk_that_goes_missing_after_opening_is_damaged(store):
    opened = HiddenStates(store, SHAPE, torch.bfloat16, BATCH)
    (store / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(DamagedError, match="lacks hidden states of batch 1"):
        opened.read(1)


@pytest.mark.parametrize("text", [None, "", "{}", '{"zarr_format": 3', "[]"])
def test_a_store_without_a_readable_description_is_damaged(text, store):
    (store / "zarr.json").unlink()
    if text is not None:
        (store / "zarr.json").write_text(text)
    with pytest.raises(DamagedError, match="store"):
        HiddenStates(store, SHAPE, torch.bfloat16, BATCH)


CHANGED = {
    "codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}],
    "data_type": "uint8",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 3, 8]}},
    "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
    "shape": [10**30, 3, 5],
    "attributes": {"dtype": [None]},
    "node_type": "group",
    "fill_value": -1,
}


@pytest.mark.parametrize("key", CHANGED)
@pytest.mark.parametrize("nonsense", [None, -1, "x", [], {"a": 400 * "["}])
def test_a_description_that_was_changed_is_damaged(key, nonsense, store):
    path = store / "zarr.json"
    described = json.loads(path.read_text())
    for value in (CHANGED[key], nonsense):
        path.write_text(json.dumps({**described, key: value}))
        with pytest.raises(DamagedError, match="store"):
            HiddenStates(store, SHAPE, torch.bfloat16, BATCH).read(0)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 3, 5), torch.bfloat16), (SHAPE, torch.float16)]
)
def test_a_store_of_another_shape_or_dtype_is_damaged(shape, dtype, store):
    with pytest.raises(DamagedError, match="expected"):
        HiddenStates(store, shape, dtype, BATCH)


def test_what_is_dropped_from_the_page_cache_is_read_as_before(tmp_path, monkeypatch):
    dropped, advise = [], os.posix_fadvise

    def noted(descriptor, *rest):
        dropped.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        advise(descriptor, *rest)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    written = states(SHAPE, torch.bfloat16)
    write(tmp_path / "store", written, BATCH)
    chunks = sorted((tmp_path / "store" / "c").glob("*/0/0"))
    begun, dropped[:] = sorted(dropped), []
    assert begun == [
        tmp_path / "store.partial" / c.relative_to(tmp_path / "store") for c in chunks
    ]
    assert same_bits(read(tmp_path / "store", SHAPE, torch.bfloat16, BATCH), written)
    assert not dropped
    store = HiddenStates(tmp_path / "store", SHAPE, torch.bfloat16, BATCH, drop=True)
    assert same_bits(torch.cat(list(store.ahead(range(3)))), written)
    assert sorted(dropped) == chunks


def test_memory_of_a_batch_is_used_again_only_when_no_tensor_refers_to_it(store):
    whole = states(SHAPE, torch.bfloat16)
    batches = HiddenStates(store, SHAPE, torch.bfloat16, BATCH).ahead(range(3))
    kept = [batch[0, 1:].view(-1) for batch in batches]
    for number, part in enumerate(kept):
        assert same_bits(part, whole[BATCH * number, 1:].reshape(-1))
    pool = []
    opened = ChunkedArray.open(store, SHAPE, torch.bfloat16)
    first = opened.read(0, pool=pool)
    row = first[1]
    place = first.data_ptr()
    del first
    assert not pool
    del row
    assert len(pool) == 1
    second = opened.read(1, pool=pool)
    assert second.data_ptr() == place
    assert same_bits(second, whole[2:4])


def test_a_full_disk_is_over_budget(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_put", full)
        with pytest.raises(OverBudgetError, match="no space left"):
            HiddenWriter(tmp_path / "store", SHAPE, torch.bfloat16, BATCH)
    writer = HiddenWriter(tmp_path / "store", SHAPE, torch.bfloat16, BATCH)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_put", full)
        writer.write(0, states((2, 3, 4), torch.bfloat16))
        # it was written beside, so the next call tells
        with pytest.raises(OverBudgetError, match="no space left"):
            writer.write(1, states((2, 3, 4), torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", full)
        with pytest.raises(OverBudgetError, match="no space left"):
            writer.publish()
    assert not (tmp_path / "store").exists()
    write(tmp_path / "store", states(SHAPE, torch.bfloat16), BATCH)
