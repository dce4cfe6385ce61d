"""An output compared with its source, tensor by tensor."""

import json
import re
import shutil

import pytest
import quantized
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import add_mtp, load_tensors, read_config, save_tensors, scatter_tensors
from tiny_families import MTP
from tiny_runs import run, settings, some_tokens

from ream_stream.evaluation.source_diff import against


def bad(output, source):
    return [finding.message for finding in against(output, source) if not finding.ok]


@pytest.mark.parametrize("grouping", ["ream", "none"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_what_was_not_merged_is_the_source_byte_for_byte(name, grouping, checkpoints, tmp_path):
    done = run(checkpoints(name), tmp_path / "out", settings(grouping=grouping)).output
    findings = list(against(done, checkpoints(name)))
    assert all(finding.ok for finding in findings)
    assert (made(findings) > 0) == (grouping == "ream")


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "gpt_oss",
        pytest.param("granitemoe", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", marks=pytest.mark.slow),
    ],
)
def test_it_does_not_matter_in_which_file_a_matrix_of_an_expert_is(name, checkpoints, tmp_path):
    whole = shutil.copytree(checkpoints(name), tmp_path / "whole")
    if name in MTP:
        add_mtp(whole, name)
    source = shutil.copytree(whole, tmp_path / "source")
    scatter_tensors(source, load_tensors(whole))
    wanted = settings(6, group_size=2)
    done = run(source, tmp_path / "out", wanted).output
    findings = list(against(done, source))
    assert all(finding.ok for finding in findings), findings
    assert made(findings) > 0
    same = load_tensors(run(whole, tmp_path / "same", wanted).output)
    have = load_tensors(done)
    assert have.keys() == same.keys()
    assert all(torch.equal(have[key], same[key]) for key in have)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe-nvfp4", "gpt_oss-mxfp4", "deepseek_v3-int4"])
@pytest.mark.parametrize("dtype_out", ["keep", "bf16"])
def test_nor_where_its_scales_are(name, dtype_out, tmp_path):
    source, _ = quantized.write(tmp_path, name, torch.float32)
    scatter_tensors(source, load_tensors(source))
    wanted = settings(6, group_size=2, dtype_out=dtype_out)
    done = run(source, tmp_path / "out", wanted).output
    findings = list(against(done, source))
    assert all(finding.ok for finding in findings), findings


def made(findings):
    """Return how many tensors are told to be other than the source's."""
    found = [re.search(r"(\d+) were merged or refitted", f.message) for f in findings]
    return sum(int(each[1]) for each in found if each)


@pytest.mark.parametrize(
    ("name", "changes", "per_layer"),
    [
        ("qwen3_moe", {"grouping": "none"}, 6),
        ("qwen3_moe", {"group_size": 2, "refit_experts": "changed"}, 0),
        ("qwen3_5_moe_text", {"grouping": "none"}, 1),
    ],
)
def test_down_projections_that_were_refitted_may_differ_and_nothing_else(
    name, changes, per_layer, checkpoints, tmp_path
):
    source = checkpoints(name, torch.float32)
    wanted = settings(6, refit="down", **changes)
    done = run(source, tmp_path / "out", wanted, some_tokens(20, 24))
    layers = done.manifest["layers"]
    refitted = [layer for layer in layers if layer["refitted"] and layer["refitted"]["penalty"]]
    assert refitted
    merged = sum(len(group) > 1 for layer in layers for group in layer["groups"])
    findings = list(against(done.output, source))
    assert all(finding.ok for finding in findings), findings
    # of merged experts gate, up and down are made; the others are refitted
    assert made(findings) == 3 * merged + per_layer * len(refitted)


def test_one_flipped_bit_is_told_with_the_tensor(checkpoints, tmp_path):
    source = checkpoints("qwen3_moe")
    done = run(source, tmp_path / "out", settings(grouping="none")).output
    index = json.loads((done / "model.safetensors.index.json").read_bytes())["weight_map"]
    name = "model.layers.2.mlp.experts.0.up_proj.weight"
    tensors = load_file(done / index[name])
    tensors[name].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, done / index[name])
    assert len(bad(done, source)) == 1
    assert name in bad(done, source)[0]


def test_another_source_is_refused(checkpoints, tmp_path):
    done = run(checkpoints("qwen3_moe"), tmp_path / "out", settings(grouping="none")).output
    assert "is not the checkpoint" in bad(done, checkpoints("olmoe"))[0]


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Give a source with a file in a folder, and an output of it that may be damaged."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("qwen3_moe"), source)
    (source / "code").mkdir()
    (source / "code" / "template.jinja").write_text("{{ bos_token }}", encoding="utf-8")
    return source, run(source, tmp_path / "out", settings()).output


def test_a_copied_file_that_was_changed_or_lost_is_told(copy):
    source, done = copy
    assert bad(done, source) == []
    (done / "code" / "template.jinja").write_text("{{ eos_token }}", encoding="utf-8")
    (done / "tokenizer.json").unlink()
    assert bad(done, source) == [
        "code/template.jinja is not the source's byte for byte",
        "tokenizer.json is not the source's byte for byte",
    ]


def test_a_config_that_differs_in_more_than_counts_is_told(copy):
    source, done = copy
    config = read_config(done)
    del config["rms_norm_eps"]
    config["rope_theta_"] = None
    (done / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert bad(done, source) == [
        f"config.json differs from the source's in {key}"
        for key in ("rms_norm_eps", "rope_theta_")
    ]


def test_a_merged_tensor_of_another_dtype_is_told_though_its_bytes_are_new(copy):
    source, done = copy
    tensors = load_tensors(done)
    manifest = json.loads((done / "ream_stream.json").read_bytes())
    groups = manifest["layers"][0]["groups"]
    merged = next(n for n, group in enumerate(groups) if len(group) > 1)
    name = f"model.layers.0.mlp.experts.{merged}.up_proj.weight"
    save_tensors(done, {**tensors, name: tensors[name].float()})
    (done / "model.safetensors.index.json").unlink(missing_ok=True)
    assert bad(done, source) == [f"{name} is F32, in the source BF16"]
