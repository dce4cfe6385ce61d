"""Multi-token-prediction layers in files that the index does not name."""

import json
import shutil

import pytest
from safetensors.torch import save_file
from tiny_checkpoints import (
    INDEX,
    add_mtp,
    load_tensors,
    read_config,
    save_tensors,
    scatter_tensors,
)
from tiny_runs import run, settings

from ream_stream.checkpoint import hub
from ream_stream.checkpoint.config_json import find_mtp
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.plan_facts import notes_of
from ream_stream.errors import DamagedError
from ream_stream.evaluation.source_diff import against
from ream_stream.evaluation.verify import verify

FAMILIES = [
    "glm4_moe",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("deepseek_v4", "glm_moe_dsa", "mellum", "qwen3_next", "qwen3_5_moe_text")
    ),
]
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def without_index(folder, name, files=("mtp.safetensors",)):
    """Give a checkpoint such a layer in files beside the index; return its tensors."""
    added = add_mtp(folder, name)
    tensors = load_tensors(folder)
    kept = {key: tensor for key, tensor in tensors.items() if key not in added}
    scatter_tensors(folder, kept, 2)
    for number, file in enumerate(files):
        part = sorted(added)[number :: len(files)]
        save_file({key: tensors[key] for key in part}, folder / file)
    return added


@pytest.fixture
def source(checkpoints, tmp_path):
    return shutil.copytree(checkpoints("glm4_moe"), tmp_path / "source")


def told(folder):
    return [value for key, value in read_config(folder).items() if key in COUNTS]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_there_is_compressed_and_indexed(checkpoints, tmp_path, name):
    source = shutil.copytree(checkpoints(name), tmp_path / "source")
    added = without_index(source, name)
    done = run(source, tmp_path / "out", settings(6, group_size=2))
    findings = [*verify(done.output, load=True, run=True), *against(done.output, source)]
    assert [finding.message for finding in findings if not finding.ok] == []
    tensors = done.checkpoint.entries
    kept = {key for key in added if ".experts.6." not in key and ".experts.7." not in key}
    assert find_mtp(tensors, done.checkpoint.config) == kept
    assert any(".experts.5." in key for key in kept)
    assert told(done.output) == [1]
    index = json.loads((done.output / INDEX).read_text(encoding="utf-8"))
    assert kept <= index["weight_map"].keys()


@pytest.mark.parametrize(
    "files", [("model-00009-of-00009.safetensors",), ("nextn-a.safetensors", "z.safetensors")]
)
def test_it_does_not_matter_what_the_files_are_called(source, files):
    added = without_index(source, "glm4_moe", files)
    checkpoint = open_checkpoint(source)
    assert find_mtp(checkpoint.entries, checkpoint.config) == added
    assert {path.name for path in checkpoint.files()} > set(files)


def test_one_beside_a_single_file_is_taken_too(source):
    added = without_index(source, "glm4_moe")
    tensors = load_tensors(source)
    save_tensors(source, {key: t for key, t in tensors.items() if key not in added})
    save_file({key: tensors[key] for key in added}, source / "mtp.safetensors")
    assert open_checkpoint(source).entries.keys() == tensors.keys()


def test_dropped_it_is_not_in_the_output(source, tmp_path):
    without_index(source, "glm4_moe")
    done = run(source, tmp_path / "out", settings(6, grouping="none", mtp="drop"))
    assert not find_mtp(done.checkpoint.entries, done.checkpoint.config)
    assert told(done.output) == [0]


def all_of_it(tensors, _added):
    return tensors


def also_indexed(tensors, added):
    return {key: tensors[key] for key in [*sorted(added), "model.norm.weight"]}


def of_another_format(tensors, added):
    return {key.removeprefix("model."): tensors[key] for key in added}


def only_the_last_decoder_layer(tensors, _added):
    return {key + "_": tensor for key, tensor in tensors.items() if ".layers.2." in key}


@pytest.mark.parametrize(
    "left", [all_of_it, also_indexed, of_another_format, only_the_last_decoder_layer]
)
def test_a_file_left_from_something_else_is_not_taken_in(source, left):
    added = without_index(source, "glm4_moe")
    tensors = load_tensors(source)
    (source / "mtp.safetensors").unlink()
    before = open_checkpoint(source)
    assert not find_mtp(before.entries, before.config)
    save_file(left(tensors, added), source / "consolidated.safetensors")
    assert open_checkpoint(source).entries.keys() == before.entries.keys()


def test_a_second_copy_of_indexed_layers_is_not_taken_in(source):
    added = add_mtp(source, "glm4_moe")
    tensors = load_tensors(source)
    scatter_tensors(source, tensors, 2)
    save_file({key: tensors[key] + 1 for key in added}, source / "mtp.safetensors")
    names = {path.name for path in open_checkpoint(source).files()}
    assert "mtp.safetensors" not in names


def test_two_files_with_the_same_tensor_are_refused(source):
    without_index(source, "glm4_moe")
    shutil.copy(source / "mtp.safetensors", source / "nextn.safetensors")
    with pytest.raises(DamagedError, match=r"is in mtp\.safetensors and in nextn\.safetensors"):
        open_checkpoint(source)


def test_a_file_that_cannot_be_read_is_refused_only_if_it_may_hold_the_layer(source):
    scatter_tensors(source, load_tensors(source), 2)
    (source / "left.safetensors").write_bytes(b"\x08")
    whole = open_checkpoint(source)
    config = {**read_config(source), "num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(DamagedError, match=r"left\.safetensors is not a safetensors file"):
        open_checkpoint(source)
    assert "left.safetensors" not in {path.name for path in whole.files()}


def test_a_layer_that_is_nowhere_is_a_note_and_none_in_the_output(source, tmp_path):
    config = {**read_config(source), "num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run(source, tmp_path / "out", settings(6, grouping="none"))
    assert told(done.output) == [0]
    assert sum("multi-token-prediction" in note for note in notes_of(done.plan)) == 1
    findings = [*verify(done.output), *against(done.output, source)]
    assert [finding.message for finding in findings if not finding.ok] == []


def test_the_hub_is_asked_for_files_beside_the_index_only_if_a_layer_is_missing(source):
    without_index(source, "glm4_moe")
    sizes = {path.name: path.stat().st_size for path in source.iterdir()}
    remote = hub.Remote(
        repo="org/name",
        commit="0" * 40,
        files={name: hub.RemoteFile(size=size, sha256=None) for name, size in sizes.items()},
    )
    assert "mtp.safetensors" in hub.shards(remote, source)
    config = {**read_config(source), "num_nextn_predict_layers": 0}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert hub.shards(remote, source) == [
        f"model-0000{number}-of-00002.safetensors" for number in (1, 2)
    ]
