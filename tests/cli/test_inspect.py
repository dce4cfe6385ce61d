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


def test_inspect_speaks_of_a_model(capsys, source, finished):
    known = json.loads(call(capsys, "inspect", source, "--json")[1])
    size = known["parameters"]
    # bf16, and 8 - 3 of 8 experts of each of two layers are not used for a token
    assert size["total"] == known["bytes"] // 2
    assert size["total"] - size["active"] == 2 * 5 * 3 * 16 * 32
    assert size["bytes_at_bits"] == {
        "16": known["bytes"],
        "8": known["bytes"] // 2,
        "4": known["bytes"] // 4,
    }
    assert (known["context_length"], known["stored_as"]) == (64, "BF16")
    made = json.loads(call(capsys, "inspect", finished, "--json")[1])["made"]
    assert made["parameters_before"] == size
    # it stands in the manifest, which a clean leaves
    assert made["source_bytes"] == known["bytes"]
    shown = call(capsys, "inspect", source)[1]
    rows = {line[:16].strip(): line[16:].strip() for line in shown.splitlines()}
    assert rows["model"].endswith("context 64 tokens")
    assert rows["experts a layer"].endswith("8, 3 a token")


def test_inspect_takes_headers_alone_and_says_so(capsys, source, copied):
    for path in copied.glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    known, whole = (
        json.loads(call(capsys, "inspect", folder, "--json")[1]) for folder in (copied, source)
    )
    changed = {name for name in whole if known[name] != whole[name]}
    assert changed == {"path", "headers_only_files"}
    assert "headers only: 3 of 3 files end before" in call(capsys, "inspect", copied)[1]


def test_inspect_of_what_cannot_be_compressed_has_its_parameters(capsys, copied):
    config = read_config(copied)
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    known = json.loads(call(capsys, "inspect", copied, "--json")[1])
    assert known["parameters"]["total"] == known["bytes"] // 2
