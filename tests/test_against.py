"""An output compared with its source, tensor by tensor."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ream_stream.against import against


def bad(output, source):
    return [finding.message for finding in against(output, source) if not finding.ok]


@pytest.mark.parametrize("grouping", ["ream", "none"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_what_was_not_merged_is_the_source_byte_for_byte(name, grouping, checkpoints, tmp_path):
    done = tiny.run(
        checkpoints(name), tmp_path / "out", tiny.settings(grouping=grouping)
    ).output
    findings = list(against(done, checkpoints(name)))
    assert all(finding.ok for finding in findings)
    merged = sum(int(f.message.split()[-2]) for f in findings)
    assert (merged > 0) == (grouping == "ream")


def test_one_flipped_bit_is_told_with_the_tensor(checkpoints, tmp_path):
    source = checkpoints("qwen3_moe")
    done = tiny.run(source, tmp_path / "out", tiny.settings(grouping="none")).output
    index = json.loads((done / "model.safetensors.index.json").read_bytes())["weight_map"]
    name = "model.layers.2.mlp.experts.0.up_proj.weight"
    tensors = load_file(done / index[name])
    tensors[name].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, done / index[name])
    assert len(bad(done, source)) == 1
    assert name in bad(done, source)[0]


def test_another_source_is_refused(checkpoints, tmp_path):
    done = tiny.run(
        checkpoints("qwen3_moe"), tmp_path / "out", tiny.settings(grouping="none")
    ).output
    assert "is not the checkpoint" in bad(done, checkpoints("olmoe"))[0]
