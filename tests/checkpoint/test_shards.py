import itertools
import json
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from ream_stream.checkpoint.header import ITEM_BYTES, read_header, torch_dtype
from ream_stream.checkpoint.shards import PlannedTensor, Shard, cut, name_shards, write_shard

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
PLANNED = st.lists(
    st.builds(
        PlannedTensor,
        name=st.text('abcxyz.0129\u00e9"', min_size=1, max_size=8),
        dtype=st.sampled_from(sorted(ITEM_BYTES)),
        shape=SHAPES,
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda tensor: tensor.name,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def filled(tensors):
    """Return values for planned tensors: every byte differs from its neighbors."""
    values, position = {}, 0
    for tensor in tensors:
        data = torch.arange(position, position + tensor.nbytes) % 251
        position += tensor.nbytes
        kind = torch_dtype(tensor.dtype)
        data = (data % 2 if tensor.dtype == "BOOL" else data).to(torch.uint8)
        values[tensor.name] = data.view(kind).reshape(tensor.shape)
    return values


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def one_shard(tensors):
    return name_shards([[tensors]])[0][0]


@given(PLANNED)
def test_safetensors_own_reader_reads_what_is_written(folder, tensors):
    shard, values = one_shard(tensors), filled(tensors)
    written = write_shard(folder, shard, values.__getitem__)
    back = load_file(folder / shard.name)
    assert back.keys() == values.keys()
    for name, value in values.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert torch.equal(bits(back[name]), bits(value))
    assert written.size == shard.nbytes == (folder / shard.name).stat().st_size
    with safe_open(folder / shard.name, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@given(PLANNED)
def test_the_layout_is_that_of_safetensors_own_writer(tensors):
    shard, values = one_shard(tensors), filled(tensors)
    data = save(values, metadata={"format": "pt"})
    theirs = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    ours = json.loads(shard.header()[8:])
    # dtypes of one width theirs ranks in a way of its own; ours goes by name there
    solid = sorted((theirs[n]["data_offsets"], n) for n in values if values[n].numel())
    widths = [values[t.name].element_size() for t in shard.tensors if values[t.name].numel()]
    assert [values[name].element_size() for _, name in solid] == widths
    if len({tensor.dtype for tensor in tensors}) == 1:
        assert ours == theirs
        assert len(data) == shard.nbytes


@given(PLANNED)
def test_every_tensor_is_aligned_to_its_elements(folder, tensors):
    shard = one_shard(tensors)
    write_shard(folder, shard, filled(tensors).__getitem__)
    assert len(shard.header()) % 8 == 0
    for entry in read_header(folder / shard.name).values():
        assert entry.start % ITEM_BYTES[entry.dtype] == 0


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 60))
def test_shards_keep_the_order_and_only_a_lone_tensor_exceeds_the_limit(sizes, limit):
    tensors = [
        PlannedTensor(name=str(number), dtype="U8", shape=(size,))
        for number, size in enumerate(sizes)
    ]
    shards = cut(tensors, limit)
    assert [tensor for shard in shards for tensor in shard] == tensors
    assert all(shards)
    for shard in shards:
        assert sum(tensor.nbytes for tensor in shard) <= limit or len(shard) == 1
    for left, right in itertools.pairwise(shards):
        # no shard is begun while there is room in the last
        assert sum(t.nbytes for t in left) + right[0].nbytes > limit


@given(st.lists(st.lists(PLANNED, max_size=3), min_size=1, max_size=4))
def test_names_count_all_shards_of_all_layers(groups):
    named = name_shards(groups)
    count = sum(len(shards) for shards in groups)
    names = [shard.name for shards in named for shard in shards]
    assert names == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    for shards, tensors in zip(named, groups, strict=True):
        for shard, planned in zip(shards, tensors, strict=True):
            assert {t.name for t in shard.tensors} == {t.name for t in planned}


def test_a_source_tensor_is_copied_byte_for_byte(tmp_path):
    value = torch.tensor([float("nan"), -0.0, 1e-40, 3.0])
    save_file({"pad": torch.zeros(3), "old": value}, tmp_path / "source.safetensors")
    entry = read_header(tmp_path / "source.safetensors")["old"]
    shard = one_shard([PlannedTensor(name="new", dtype="F32", shape=(4,))])
    write_shard(tmp_path, shard, lambda _: entry)
    assert torch.equal(bits(load_file(tmp_path / shard.name)["new"]), bits(value))


def test_a_value_that_is_not_as_planned_is_refused_and_leaves_no_shard(tmp_path):
    shard = one_shard([PlannedTensor(name="x", dtype="F32", shape=(2, 2))])
    save_file({"x": torch.zeros(4)}, tmp_path / "source.safetensors")
    entry = read_header(tmp_path / "source.safetensors")["x"]
    for value in (torch.zeros(2, 3), torch.zeros(2, 2).double(), torch.zeros(4), entry):
        with pytest.raises(ValueError, match="planned"):
            write_shard(tmp_path, shard, lambda _, value=value: value)
    assert not (tmp_path / shard.name).exists()


def test_a_transposed_value_is_written_as_it_reads(tmp_path):
    value = torch.arange(6.0).view(2, 3).T
    shard = one_shard([PlannedTensor(name="x", dtype="F32", shape=(3, 2))])
    write_shard(tmp_path, shard, lambda _: value)
    assert torch.equal(load_file(tmp_path / shard.name)["x"], value)


def test_memory_is_that_of_one_tensor_not_of_the_shard(tmp_path):
    tensors = [PlannedTensor(name=f"{n:02d}", dtype="U8", shape=(1000,)) for n in range(20)]
    alive = most = 0

    def freed():
        nonlocal alive
        alive -= 1

    def content(_):
        nonlocal alive, most
        value = torch.zeros(1000, dtype=torch.uint8)
        weakref.finalize(value, freed)
        alive += 1
        most = max(most, alive)
        return value

    write_shard(tmp_path, one_shard(tensors), content)
    assert most <= 2


def test_a_header_is_deterministic_and_does_not_depend_on_the_order_given():
    tensors = [PlannedTensor(name=name, dtype="F32", shape=(2,)) for name in "cab"]
    assert one_shard(tensors).header() == one_shard(tensors[::-1]).header()
    other = Shard(name="s", tensors=(replace(tensors[0], dtype="F16"),))
    assert other.header() != one_shard(tensors).header()
