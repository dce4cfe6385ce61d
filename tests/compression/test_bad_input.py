"""Checkpoints and wishes that cannot be met: one sentence, the right status, nothing written.

Checkpoints come from strangers and from broken downloads, so that a file is never
believed: every lie of a header, an index or a config has its test here.
"""

import json
import os
import re
import shutil
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import load_tensors, save_tensors
from tiny_families import EXPERTS, TINY
from tiny_parameters import families
from tiny_runs import plan_for, run, settings, some_tokens

from ream_stream.checkpoint.header import ITEM_BYTES, MAX_HEADER_BYTES, read_header
from ream_stream.checkpoint.reader import INDEX, SINGLE, open_checkpoint
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import (
    DamagedError,
    OtherRunError,
    OverBudgetError,
    UnsupportedModelError,
    UsageError,
)
from ream_stream.model.families import FAMILIES, REFUSED
from ream_stream.planning import disk
from ream_stream.planning.disk import check_disk
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Budgets


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Give a copy of a family's checkpoint that may be damaged."""

    def give(name="qwen3_moe"):
        return shutil.copytree(checkpoints(name), tmp_path / "source")

    return give


def refused(source, error, words, tmp_path, **wanted):
    """Run, and expect one sentence with these words and an output that does not exist."""
    output = tmp_path / "out"
    with pytest.raises(error, match=words) as caught:
        run(source, output, settings(**wanted))
    assert type(caught.value) is error
    message = str(caught.value)
    assert len(message) < 800
    assert "\n" not in message
    assert not output.exists()


def edit_json(path, change):
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def with_header(path, header, data=b""):
    """Write a safetensors file of any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape=(2, 2), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# Folders and configs


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", UsageError, "nowhere is not a folder", tmp_path)


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / "file", UsageError, "is not a folder", tmp_path)


def test_a_folder_without_config(copy, tmp_path):
    source = copy()
    (source / "config.json").unlink()
    refused(source, UsageError, r"has no config\.json", tmp_path)


def test_a_folder_without_weights(copy, tmp_path):
    source = copy("olmoe")
    (source / SINGLE).rename(source / "pytorch_model.bin")
    refused(source, UsageError, "no safetensors weights", tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1, 2]", b'"qwen3_moe"', b"\xff\xfe\x00", b"[" * 100_000]
)
def test_a_config_that_is_not_a_json_object(copy, tmp_path, text):
    source = copy()
    (source / "config.json").write_bytes(text)
    refused(source, DamagedError, r"config\.json is not", tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "", None, 7, ["qwen3_moe"], {}])
def test_a_family_that_is_not_supported_is_named_beside_those_that_are(
    copy, tmp_path, model_type
):
    source = copy()
    edit_json(source / "config.json", lambda c: c.update(model_type=model_type))
    refused(source, UnsupportedModelError, "is not supported; supported are qwen3", tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        run(source, tmp_path / "out", settings())
    assert repr(model_type) in str(caught.value)
    assert all(family in str(caught.value) for family in FAMILIES)


def test_the_statuses_are_those_promised():
    classes = (UsageError, DamagedError, UnsupportedModelError, OtherRunError, OverBudgetError)
    assert [kind.exit_status for kind in classes] == [2, 3, 10, 11, 12]


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_family_that_is_refused_is_so_with_a_reason(copy, tmp_path, model_type):
    source = copy()
    edit_json(source / "config.json", lambda c: c.update(model_type=model_type))
    refused(source, UnsupportedModelError, re.escape(REFUSED[model_type]), tmp_path)
    assert model_type not in FAMILIES


@pytest.mark.parametrize("described", ["gptq", [1], 4])
def test_a_quantization_config_that_is_no_object(copy, tmp_path, described):
    source = copy()
    edit_json(source / "config.json", lambda c: c.update(quantization_config=described))
    refused(source, DamagedError, "quantization_config", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": "three"},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"hidden_size": None},
        {"hidden_size": 2**70},
        {"hidden_act": "no such function"},
        {"rope_parameters": 5},
        {"num_experts": [8, 8, 8]},
        {"num_experts": None},
    ],
    ids=str,
)
def test_a_config_of_which_no_model_can_be_made(copy, tmp_path, change):
    source = copy()
    edit_json(source / "config.json", lambda c: c.update(change))
    with pytest.raises((UnsupportedModelError, DamagedError)) as caught:
        run(source, tmp_path / "out", settings())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 4}, "lacks model.layers.3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 64}, "has shape"),
        ({"vocab_size": 65}, "embed_tokens.weight has shape|lm_head.weight has shape"),
        ({"moe_intermediate_size": 24}, "experts"),
        ({"num_experts": 16}, "has 8 experts, config.json says 16"),
        ({"mlp_only_layers": []}, "lacks model.layers.1"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_tensors(copy, tmp_path, change, words):
    source = copy()
    edit_json(source / "config.json", lambda c: c.update(change))
    refused(source, DamagedError, words, tmp_path)


def test_a_config_with_fewer_layers_than_the_file_is_not_taken_for_its_model(copy, tmp_path):
    source = copy()
    edit_json(source / "config.json", lambda c: c.update(num_hidden_layers=2))
    refused(
        source, UnsupportedModelError, "experts of a multi-token-prediction layer", tmp_path
    )


# Headers


def test_a_truncated_shard(copy, tmp_path):
    source = copy()
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(source, DamagedError, rf"{shard.name} has \d+ bytes.*truncated", tmp_path)


def test_a_shard_with_more_bytes_than_its_header_describes(copy, tmp_path):
    source = copy("olmoe")
    with (source / SINGLE).open("ab") as file:
        file.write(b"\0")
    refused(source, DamagedError, "truncated or damaged", tmp_path)


def test_a_git_lfs_pointer_in_place_of_a_shard(copy, tmp_path):
    source = copy("olmoe")
    (source / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(source, DamagedError, "not a safetensors file or is cut short", tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (10).to_bytes(8, "little") + b"{}",
        (2**63).to_bytes(8, "little") + b"{}",
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_header_longer_than_its_file(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="cut short"):
        read_header(path)


def test_a_header_over_the_formats_limit_is_refused_unread(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(DamagedError, match="cut short"):
        read_header(path)


HEADERS = {
    "garbage": (b"\x80abc", b"", "header is not valid"),
    "no object": (b"[]", b"", "not a JSON object"),
    "nested": (b"[" * 200_000, b"", "header is not valid"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", b"", "header is not valid"),
    "twice the same name": (
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, '
        b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b"\0",
        "occurs twice",
    ),
    "overlap": ({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24), "overlaps"),
    "same bytes": ({"a": entry(), "b": entry()}, bytes(16), "overlaps"),
    "gap": ({"a": entry(), "b": entry(offsets=(20, 36))}, bytes(36), "leaves a gap"),
    "gap at the start": ({"a": entry(offsets=(4, 20))}, bytes(20), "leaves a gap"),
    "backwards": ({"a": entry(offsets=(16, 0))}, bytes(16), "needs 16 bytes"),
    "negative": ({"a": entry(offsets=(-16, 0))}, bytes(16), "described wrongly"),
    "float offsets": ({"a": entry(offsets=(0, 16.0))}, bytes(16), "described wrongly"),
    "true as a size": ({"a": entry(shape=(True, 4))}, bytes(16), "described wrongly"),
    "three offsets": ({"a": entry(offsets=(0, 8, 16))}, bytes(16), "described wrongly"),
    "shape overflow": ({"a": entry(shape=(2**61, 8, 2**61))}, bytes(16), "offsets give 16"),
    "shape wraps to 16": ({"a": entry(shape=(2**61, 2**5))}, bytes(16), "offsets give 16"),
    "past 62 bits": ({"a": entry(shape=(2**70,))}, bytes(16), "described wrongly"),
    "a million axes": ({"a": entry(shape=(2**61,) * 10**6)}, bytes(16), "1000000 axes"),
    "shape of words": ({"a": entry(shape=("2", "2"))}, bytes(16), "described wrongly"),
    "shape as object": ({"a": {**entry(), "shape": {}}}, bytes(4), "described wrongly"),
    "shape as number": ({"a": {**entry(), "shape": 4}}, bytes(16), "described wrongly"),
    "dtype as list": ({"a": {**entry(), "dtype": ["F32"]}}, bytes(16), "described wrongly"),
    "unknown dtype": ({"a": entry(dtype="F4")}, bytes(16), "unknown dtype 'F4'"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4), "described wrongly"),
    "entry as list": ({"a": [1, 2]}, b"", "described wrongly"),
    "entry as null": ({"a": None}, b"", "described wrongly"),
    "too short": ({"a": entry()}, bytes(15), "truncated"),
    "too long": ({"a": entry()}, bytes(17), "truncated or damaged"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies(tmp_path, what):
    header, data, words = HEADERS[what]
    path = with_header(tmp_path / "x.safetensors", header, data)
    with pytest.raises(DamagedError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_plausible_header_is_read(tmp_path):
    """Empty tensors share an offset; metadata may be anything; padding is allowed."""
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(),
        "empty": entry(shape=(0, 5), offsets=(16, 16)),
        "scalar": entry(shape=(), offsets=(16, 20)),
    }
    raw = json.dumps(header).encode() + b"   "
    entries = read_header(with_header(tmp_path / "x.safetensors", raw, bytes(20)))
    base = 8 + len(raw)
    assert [(e.name, e.start - base, e.stop - base) for e in entries.values()] == [
        ("b", 0, 16),
        ("empty", 16, 16),
        ("scalar", 16, 20),
    ]


def read_or_refuse(path):
    """Read a header in the memory of a few times its file, or refuse it as damaged."""
    tracemalloc.start()
    try:
        entries = read_header(path)
    except DamagedError:
        return
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200_000 + 60 * path.stat().st_size
    # what is accepted can be mapped: every tensor is inside the file, none overlap
    assert sum(e.nbytes for e in entries.values()) <= path.stat().st_size
    for tensor in entries.values():
        assert tensor.nbytes == tensor.num_elements * ITEM_BYTES[tensor.dtype]


@given(data=st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(data)
    read_or_refuse(path)
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    read_or_refuse(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(
    replaced=st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "more"]), VALUES, max_size=2
    ),
    others=st.dictionaries(st.text(max_size=4), VALUES, max_size=2),
    size=st.integers(0, 64),
)
def test_a_header_with_any_json_in_it_is_read_or_refused(
    tmp_path_factory, replaced, others, size
):
    path = tmp_path_factory.getbasetemp() / "json.safetensors"
    with_header(path, {**others, "a": {**entry(), **replaced}}, bytes(size))
    read_or_refuse(path)


@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 10**6),
)
def test_a_file_with_flipped_bytes_or_a_lost_end_is_read_or_refused(
    tmp_path_factory, changes, cut
):
    header = {"a": entry(), "b": entry((3,), (16, 28)), "c": entry((2,), (28, 32), "BF16")}
    path = with_header(tmp_path_factory.getbasetemp() / "cut.safetensors", header, bytes(32))
    data = bytearray(path.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    path.write_bytes(data[: len(data) - cut % 40])
    read_or_refuse(path)


# Indexes


def test_an_index_that_names_a_missing_shard(copy, tmp_path):
    source = copy()
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.unlink()
    refused(source, DamagedError, f"lacks {shard.name}, which its index names", tmp_path)


def test_an_index_that_names_a_missing_tensor(copy, tmp_path):
    source = copy()

    def add(index):
        index["weight_map"]["model.extra"] = sorted(index["weight_map"].values())[0]

    edit_json(source / INDEX, add)
    refused(source, DamagedError, r"puts tensor 'model\.extra' in .*, which lacks it", tmp_path)


def test_a_tensor_that_the_index_does_not_name(copy, tmp_path):
    source = copy()
    edit_json(source / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    refused(source, DamagedError, r"'model\.norm\.weight' .* the index names no file", tmp_path)


def test_a_tensor_that_is_in_two_shards(copy, tmp_path):
    source = copy()
    tensors = load_tensors(source)
    save_tensors(source, tensors)
    shutil.copy(source / SINGLE, source / "second.safetensors")
    names = sorted(tensors)
    weight_map = dict.fromkeys(names[1:], SINGLE) | {names[0]: "second.safetensors"}
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    refused(source, DamagedError, r"is in model\.safetensors(,| and)", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/secret.safetensors",
        "..",
        "",
        ".",
        "config.json",
        "nul\0.safetensors",
        "\ud800.safetensors",
        "long" * 2000 + ".safetensors",
    ],
)
def test_an_index_that_names_a_file_outside_the_folder(copy, tmp_path, name):
    source = copy()
    for place in (tmp_path / "secret.safetensors", source / "secret.safetensors"):
        shutil.copy(sorted(source.glob("model-*"))[0], place)

    def add(index):
        index["weight_map"]["model.extra"] = name

    edit_json(source / INDEX, add)
    with pytest.raises(DamagedError, match="index"):
        open_checkpoint(source)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map(copy, tmp_path, index):
    source = copy()
    (source / INDEX).write_text(json.dumps(index), encoding="utf-8")
    refused(source, DamagedError, "has no weight_map|is not a JSON object", tmp_path)


def test_an_empty_index(copy, tmp_path):
    source = copy()
    (source / INDEX).write_text('{"weight_map": {}}', encoding="utf-8")
    refused(source, DamagedError, "holds no tensor", tmp_path)


def test_links_out_of_the_folder_are_followed_as_the_hubs_cache_has_them(copy, tmp_path):
    cache = tmp_path / "models--org--name"
    source, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    shutil.copytree(copy("qwen3_moe"), source)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), source))
    done = run(source, tmp_path / "out", settings())
    assert not any(path.is_symlink() for path in done.output.iterdir())
    assert (done.output / "tokenizer.json").is_file()


# Experts


def change_tensors(source, change):
    tensors = load_tensors(source)
    change(tensors)
    save_tensors(source, tensors)


BLOCK = "model.layers.2.mlp"


def test_a_gap_in_the_expert_numbers(copy, tmp_path):
    source = copy()

    def drop(tensors):
        for part in ("gate", "up", "down"):
            del tensors[f"{BLOCK}.experts.3.{part}_proj.weight"]

    change_tensors(source, drop)
    refused(source, DamagedError, r"mlp\.experts: expert numbers have gaps: 3", tmp_path)


def test_the_last_expert_missing(copy, tmp_path):
    source = copy()

    def drop(tensors):
        for part in ("gate", "up", "down"):
            del tensors[f"{BLOCK}.experts.7.{part}_proj.weight"]

    change_tensors(source, drop)
    refused(source, DamagedError, "has 7 experts, config.json says 8", tmp_path)


def test_an_expert_number_of_astronomic_size(copy, tmp_path):
    source = copy()

    def add(tensors):
        for part in ("gate", "up", "down"):
            old = tensors.pop(f"{BLOCK}.experts.7.{part}_proj.weight")
            tensors[f"{BLOCK}.experts.999999999999.{part}_proj.weight"] = old

    change_tensors(source, add)
    refused(source, DamagedError, "expert numbers have gaps", tmp_path)


def test_a_part_of_an_expert_missing(copy, tmp_path):
    source = copy()
    change_tensors(source, lambda tensors: tensors.pop(f"{BLOCK}.experts.2.up_proj.weight"))
    refused(source, DamagedError, r"experts\.2 lacks one of gate, up and down", tmp_path)


def test_an_expert_of_another_shape(copy, tmp_path):
    source, key = copy(), f"{BLOCK}.experts.2.up_proj.weight"
    change_tensors(source, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    refused(source, DamagedError, r"experts\.2\.up_proj\.weight is BF16 \(15, 32\)", tmp_path)


def test_an_expert_of_another_dtype(copy, tmp_path):
    source, key = copy(), f"{BLOCK}.experts.2.up_proj.weight"
    change_tensors(source, lambda tensors: tensors.update({key: tensors[key].float()}))
    refused(source, DamagedError, r"experts\.2\.up_proj\.weight is F32", tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_experts_of_a_quantized_dtype_without_a_quantization_config(copy, tmp_path, dtype):
    source = copy()

    def cast(tensors):
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = tensors[key].to(dtype)

    change_tensors(source, cast)
    refused(source, UnsupportedModelError, "not stored in a scheme", tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("experts.gate_up_proj", DamagedError, "lacks one of"),
        ("experts.fc1.weight", UnsupportedModelError, "not of a layout that is known"),
        ("experts.0.gate_proj.weight_scale_inv", UnsupportedModelError, "not stored in a"),
        ("experts.3.gate_proj.bias", DamagedError, "gate_proj.bias is F32"),
        ("experts.0.gate_proj.qweight", UnsupportedModelError, "AWQ or GPTQ"),
        ("experts.0.fc1.weight", UnsupportedModelError, "not of a layout that is known"),
    ],
)
def test_experts_that_are_stored_in_another_way(copy, tmp_path, name, kind, message):
    source, name = copy(), f"{BLOCK}.{name}"
    change_tensors(source, lambda tensors: tensors.update({name: torch.zeros(4, 4)}))
    refused(source, kind, message, tmp_path)


def test_a_multi_token_prediction_layer_of_experts_alone(copy, tmp_path):
    source = copy("qwen3_next")

    def add(tensors):
        for key in [key for key in tensors if "layers.0.mlp.experts" in key]:
            tensors[key.replace("model.layers.0", "mtp.layers.0")] = tensors[key].clone()

    change_tensors(source, add)
    refused(source, DamagedError, r"lacks model\.layers\.4\..* multi-token", tmp_path)


def test_a_multi_token_prediction_layer_without_its_projection(copy, tmp_path):
    source = copy("deepseek_v3")

    def add(tensors):
        for key in [key for key in tensors if "layers.2." in key]:
            tensors[key.replace("layers.2.", "layers.3.")] = tensors[key].clone()

    change_tensors(source, add)
    refused(source, DamagedError, r"lacks model\.layers\.3\.next_token\..* multi", tmp_path)


def test_experts_outside_the_decoder(copy, tmp_path):
    source = copy("qwen3_next")

    def add(tensors):
        for key in [key for key in tensors if "layers.0.mlp.experts" in key]:
            tensors[key.replace("model.layers.0", "audio.layers.0")] = tensors[key].clone()

    change_tensors(source, add)
    refused(source, UnsupportedModelError, r"audio\.layers\.0.* outside the decoder", tmp_path)


def test_a_dense_model_of_a_supported_family(copy, tmp_path):
    source = copy("qwen3_moe")
    edit_json(source / "config.json", lambda c: c.update(mlp_only_layers=[0, 1, 2]))

    def make_dense(tensors):
        for key in [key for key in tensors if ".mlp." in key and "layers.1." not in key]:
            del tensors[key]
        for key in [key for key in tensors if "layers.1.mlp." in key]:
            for layer in "02":
                tensors[key.replace("layers.1", f"layers.{layer}")] = tensors[key].clone()

    change_tensors(source, make_dense)
    refused(source, UnsupportedModelError, "is a dense model: it has no experts", tmp_path)


@pytest.mark.parametrize("name", families())
def test_a_router_missing(copy, tmp_path, name):
    source, last = copy(name), 3 if name == "qwen3_next" else 2
    for suffix in TINY[name].routers:
        key = f"{TINY[name].path}.{last}.{suffix}"
        change_tensors(source, lambda t, key=key: t.pop(key))
    refused(
        source, DamagedError, rf"lacks model\.layers\.{last}\..*(gate|router|bias)", tmp_path
    )


@pytest.mark.parametrize(("expert", "told"), [(EXPERTS, "0 to 8"), (-1, "-1 to 7")])
def test_a_table_that_names_an_expert_that_is_not_there(copy, tmp_path, expert, told):
    source = copy("deepseek_v4")

    def name_it(tensors):
        tensors["layers.0.ffn.gate.tid2eid"][40, 1] = expert

    change_tensors(source, name_it)
    words = rf"layers\.0\.ffn\.gate\.tid2eid .* names experts {told}, the layer has 0 to 7"
    with pytest.raises(DamagedError, match=words):
        run(source, tmp_path / "out", settings(6))


# What was asked for


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"experts": 9}, "--experts 9: the source has 8 experts a layer"),
        ({"experts": 2}, "--experts 2: the router sends each token to 3 experts"),
        ({"experts": 0}, "--experts 0"),
        ({"experts": -1}, "--experts -1"),
        ({"experts": 3, "group_size": 2}, "3 groups of at most 2 .* use 3 or more"),
        ({"experts": 6, "group_size": 1}, "--group-size 1"),
    ],
    ids=str,
)
def test_counts_that_do_not_work(checkpoints, tmp_path, wanted, words):
    refused(checkpoints("olmoe"), UsageError, words, tmp_path, **wanted)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        (7, "multiple of 2"),
        (5, "multiple of 2"),
        # tokens go to 3 experts of one of the groups, and each group would have 2
        (4, "3 experts of 1 in 2 groups, which would have 2"),
    ],
)
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_counts_that_do_not_fit_the_routers_groups(checkpoints, tmp_path, name, experts, words):
    refused(checkpoints(name), UsageError, words, tmp_path, experts=experts)


def test_a_group_size_that_is_not_used_is_not_looked_at(checkpoints, tmp_path):
    done = run(
        checkpoints("olmoe"), tmp_path / "out", settings(3, group_size=2, grouping="none")
    )
    assert done.manifest["experts"]["after"] == 3


# Outputs and budgets


def test_an_output_that_holds_something_else(checkpoints, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(OtherRunError, match=r"is not empty .*thesis\.tex") as caught:
        run(checkpoints("olmoe"), output, settings())
    assert caught.value.exit_status == 11
    assert (output / "thesis.tex").read_text(encoding="utf-8") == "years of work"
    assert not list(output.glob("*.safetensors"))


def test_an_output_that_is_the_source(checkpoints, copy):
    source = copy()
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    with pytest.raises(OtherRunError, match="is not empty"):
        run(source, source, settings())
    assert before == {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}


def test_an_output_that_is_a_file(checkpoints, tmp_path):
    output = tmp_path / "out"
    output.write_text("not a folder", encoding="utf-8")
    workspace = Workspace(output=output, work=tmp_path / "work")
    with pytest.raises(OtherRunError, match="is a file"):
        workspace.begun()
    assert output.read_text(encoding="utf-8") == "not a folder"


@pytest.mark.parametrize(
    "changed",
    [
        {"experts": 5},
        {"saliency": "ean"},
        {"seed": 1},
        {"sequential": False},
        {"max_shard_bytes": 10**6},
    ],
    ids=str,
)
def test_an_output_of_another_run(checkpoints, tmp_path, changed):
    source, output = checkpoints("olmoe"), tmp_path / "out"
    done = run(source, output, settings())
    before = done.files()
    with pytest.raises(OtherRunError, match=rf"{next(iter(changed))}: .* then, .* now"):
        run(source, output, settings(**changed))
    assert done.files() == before


def test_an_output_of_other_tokens_or_another_source(checkpoints, tmp_path):
    output = tmp_path / "out"
    run(checkpoints("olmoe"), output, settings())
    with pytest.raises(OtherRunError, match="calibration: "):
        run(checkpoints("olmoe"), output, settings(), some_tokens(seed=9))
    with pytest.raises(OtherRunError, match="source: "):
        run(checkpoints("olmoe", torch.float32), output, settings())


def test_a_disk_that_is_too_small(checkpoints, tmp_path, monkeypatch):
    plan = plan_for(checkpoints("olmoe"), some_tokens(), settings())
    monkeypatch.setattr(disk, "free_bytes", lambda _path: plan.disk_bytes)
    check_disk(plan, tmp_path / "out")
    monkeypatch.setattr(disk, "free_bytes", lambda _path: plan.disk_bytes - 1)
    with pytest.raises(OverBudgetError, match=r"needs .* on the disk of .* are free"):
        check_disk(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_memory_budget_that_is_too_small(checkpoints):
    source, tokens = open_checkpoint(checkpoints("olmoe")), some_tokens()
    fits = make_plan(source, settings(), 4, 12)
    needed = fits.memory_bytes - fits.memory["attention outputs"]
    with pytest.raises(OverBudgetError, match=r"needs .* of memory .*, the budget is 1\.00 MB"):
        make_plan(source, settings(), 4, 12, budgets=Budgets.of(1_000_000))
    # with just enough, what is kept only to save time is left out
    roomy = make_plan(source, settings(), 4, 12, budgets=Budgets.of(needed + 200_000_000))
    assert roomy.memory["attention outputs"] == fits.memory["attention outputs"] > 0
    assert tokens.num_tokens == 48
