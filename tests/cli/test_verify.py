"""The verb `verify`."""

import json

from command_line import call, files


def test_a_flipped_byte_is_3(capsys, finished, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    for name, data in files(finished).items():
        (output / name).write_bytes(data)
    assert call(capsys, "verify", output)[0] == 0
    shard = sorted(output.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    status, out, err = call(capsys, "verify", output)
    assert status == 3
    assert "FAILED  digest" in out
    assert err.startswith("error: ")
    status, out, _ = call(capsys, "verify", output, "--json")
    known = json.loads(out)
    assert (status, known["ok"]) == (3, False)
    assert [each["check"] for each in known["findings"] if not each["ok"]] == ["digest"]
    assert call(capsys, "verify", output, "--no-scan")[0] == 0


def test_verify_ends_with_what_to_do_next(capsys, finished):
    status, out, err = call(capsys, "verify", finished, "--no-scan")
    assert status == 0
    assert "next:" not in out
    assert err.startswith(f"next: serve with vLLM: vllm serve {finished}  (tested with ")
    assert call(capsys, "verify", finished, "--no-scan", "--json")[2] == ""
