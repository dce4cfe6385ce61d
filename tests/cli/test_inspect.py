"""The verb `inspect`."""

import json

from command_line import call
from tiny_checkpoints import read_config


def test_inspect_tells_where_the_bytes_are(capsys, source):
    known = json.loads(call(capsys, "inspect", source, "--json")[1])
    assert (known["family"], known["supported"], known["experts"]) == ("qwen3_moe", True, 8)
    assert sum(known["bytes_by_kind"].values()) == known["bytes"]
    # two MoE layers of 8 experts of three 16 x 32 matrices in bf16
    assert known["bytes_by_kind"]["routed experts"] == 2 * 8 * 3 * 16 * 32 * 2
    assert known["made"] is None


def test_inspect_tells_how_an_output_was_made(capsys, finished):
    known = json.loads(call(capsys, "inspect", finished, "--json")[1])
    made = known["made"]
    assert (made["experts_before"], made["experts_after"]) == (8, 6)
    members = sum(int(size) * count for size, count in made["groups_by_size"].items())
    assert members == 2 * 8
    assert "8 -> 6, the rest merged" in call(capsys, "inspect", finished)[1]


def test_inspect_describes_what_cannot_be_compressed(capsys, copied):
    config = read_config(copied)
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    status, out, _ = call(capsys, "inspect", copied)
    assert status == 0
    assert "no: model type 'llama'" in out
