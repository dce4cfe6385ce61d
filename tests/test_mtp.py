"""Checkpoints with multi-token-prediction layers, which have experts of their own."""

import json

import pytest
import tiny
import torch
from tiny import forward_in_transformers, run, settings

from ream_stream.against import against
from ream_stream.errors import UnsupportedModelError
from ream_stream.mtp import find_mtp, without_mtp
from ream_stream.verify import verify

PLACES = {
    "qwen3_next": ("mtp.layers.0.", "mtp_num_hidden_layers"),
    "deepseek_v3": ("model.layers.3.", "num_nextn_predict_layers"),
    "glm4_moe": ("model.layers.3.", "num_nextn_predict_layers"),
    "mimo_v2_flash": ("model.mtp.layers.0.", "num_nextn_predict_layers"),
}


@pytest.fixture
def source(tmp_path, request):
    name = request.param
    place, key = PLACES[name]
    folder = tiny.write_checkpoint(tmp_path / "source", name, torch.bfloat16)
    tensors = tiny.load_tensors(folder)
    layer = "model.layers.1."
    extra = {
        k.replace(layer, place): t.clone() for k, t in tensors.items() if k.startswith(layer)
    }
    extra[f"{place}enorm.weight"] = torch.ones(32)
    tiny.save_tensors(folder, {**tensors, **extra})
    config = {**tiny.read_config(folder), key: 1}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, set(extra), key


@pytest.mark.parametrize("source", sorted(PLACES), indirect=True)
def test_they_are_refused_unless_they_are_to_be_dropped(source, tmp_path):
    with pytest.raises(UnsupportedModelError, match="--mtp drop"):
        run(source[0], tmp_path / "out", settings())
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("source", sorted(PLACES), indirect=True)
def test_dropped_they_are_in_neither_tensors_nor_config(source, tmp_path):
    folder, extra, key = source
    done = run(folder, tmp_path / "out", settings(mtp="drop"))
    have = tiny.load_tensors(done.output)
    assert extra.isdisjoint(have)
    assert tiny.read_config(done.output)[key] == 0
    findings = [*verify(done.output), *against(done.output, folder)]
    assert [finding.message for finding in findings if not finding.ok] == []
    forward_in_transformers(done.output, torch.float32, [(done.tokens.input_ids_SL, None)])


def test_layers_after_the_last_are_found_and_others_are_not():
    config = {"text_config": {"num_hidden_layers": 3}, "num_nextn_predict_layers": 2}
    found = {
        "model.layers.3.eh_proj.weight",
        "model.layers.12.mlp.gate.weight",
        "language_model.model.layers.3.enorm.weight",
        "mtp.fc.weight",
        "model.mtp.layers.0.norm.weight",
        "model.mtp_block.0.weight",
    }
    others = {
        "model.layers.2.mlp.gate.weight",
        "model.visual.layers.7.weight",
        "model.embed_tokens.weight",
    }
    assert find_mtp(found | others, config) == found
    assert without_mtp(config) == {**config, "num_nextn_predict_layers": 0}
