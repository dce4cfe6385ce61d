"""Plans of checkpoints that are not there: headers alone, up to the largest models."""

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tiny_checkpoints import read_config

from ream_stream.__main__ import main
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.errors import DamagedError
from ream_stream.units import parse_size

TOOLS = Path(__file__).parents[2] / "tools" / "fixtures"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(capsys, *words):
    capsys.readouterr()
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def headers(checkpoints, tmp_path):
    tool("headers_only").copy_headers(checkpoints("deepseek_v3"), tmp_path / "headers")
    return tmp_path / "headers"


def planned(capsys, *words):
    status, out, err = call(capsys, "plan", *words, "--any-count", "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_a_plan_from_headers_is_that_from_the_whole_checkpoint(capsys, checkpoints, headers):
    source = checkpoints("deepseek_v3")
    whole, cut = (planned(capsys, f, "--experts", 6) for f in (source, headers))
    files = len(list(source.glob("*.safetensors")))
    assert (whole["headers_only_files"], cut["headers_only_files"]) == (0, files)
    assert files > 1
    for key in ("source_bytes", "output_bytes", "disk_bytes", "experts_after", "settings"):
        assert whole[key] == cut[key]


def test_a_file_in_a_folder_keeps_its_place(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints("mixtral"), tmp_path / "source")
    (source / "draft").mkdir()
    (source / "draft" / "config.json").write_text("{}")
    written = tool("headers_only").copy_headers(source, tmp_path / "headers")
    copied = [path for path in (tmp_path / "headers").rglob("*") if path.is_file()]
    assert written == sum(path.stat().st_size for path in copied)
    assert (tmp_path / "headers" / "draft" / "config.json").read_text() == "{}"
    assert open_checkpoint(tmp_path / "headers", with_data=False).config["num_local_experts"]


def test_a_plan_says_that_there_are_headers_only(capsys, checkpoints, headers):
    given = ("--experts", 6, "--any-count")
    whole = call(capsys, "plan", checkpoints("deepseek_v3"), *given)
    cut = call(capsys, "plan", headers, *given)
    assert "headers only" not in whole[1]
    told = " ".join(cut[1].split())
    assert re.search(r"headers only: (\d+) of \1 files end before their tensors do", told)


def test_headers_alone_are_not_compressed(capsys, headers, tmp_path):
    words = ("--experts", 6, "--calibration", headers / "config.json")
    status, _, err = call(capsys, "compress", headers, tmp_path / "output", *words)
    assert status == 3
    assert "truncated or damaged" in err
    assert not (tmp_path / "output").exists()


def test_a_file_that_is_longer_than_its_header_says_is_damaged_all_the_same(headers):
    shard = sorted(headers.glob("*.safetensors"))[0]
    end = max(
        entry.stop
        for entry in open_checkpoint(headers, with_data=False).entries.values()
        if entry.path == shard
    )
    with shard.open("ab") as file:
        file.truncate(end + 1)
    with pytest.raises(DamagedError, match="damaged"):
        open_checkpoint(headers, with_data=False)


def test_a_file_cut_within_its_header_is_damaged(headers):
    shard = sorted(headers.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="cut short"):
        open_checkpoint(headers, with_data=False)


def test_headers_can_be_copied_from_headers_and_the_tokenizer_comes_along(headers, tmp_path):
    tool("headers_only").copy_headers(headers, tmp_path / "again")
    names = sorted(path.name for path in headers.iterdir())
    assert "tokenizer.json" in names
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    assert read_config(tmp_path / "again") == read_config(headers)


LARGE = {
    "deepseek-v3": (192, 58, 1.3e12),
    "kimi-k2": (288, 60, 2.0e12),
    "glm-4.6": (120, 89, 7e11),
    "deepseek-v4-flash": (192, 44, 1.5e11),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_model_of_hundreds_of_gigabytes_is_planned_in_16(capsys, tmp_path, name):
    experts, layers, least = LARGE[name]
    maker = tool("make_headers")
    maker.write_headers(tmp_path / "headers", maker.CONFIGS[name])
    words = ("--keep", "75%", "--ram", "16GiB", "--method", "ream")
    known = planned(capsys, tmp_path / "headers", *words)
    assert (known["experts_after"], known["moe_layers"]) == (experts, layers)
    assert least < known["source_bytes"] < 1.1 * least
    assert known["memory_bytes"] == sum(known["memory_parts"].values())
    assert known["memory_bytes"] <= 16 << 30
    left = known["forecast"]
    for key in ("read_bytes", "cached_bytes", "written_bytes", "flop"):
        assert left[key] == sum(phase[key] for phase in left["phases"].values())
    assert left["written_bytes"] > known["output_bytes"]
    assert left["read_bytes"] - left["cached_bytes"] >= known["source_bytes"]
    assert left["seconds"] > 0
    assert left["rates"]["read_measured"] is False


@pytest.mark.slow
def test_headers_of_deepseek_v4_have_as_many_numbers_of_each_kind_as_the_published(tmp_path):
    """As the hub tells them of deepseek-ai/DeepSeek-V4-Flash; it leaves out other kinds."""
    maker = tool("make_headers")
    maker.write_headers(tmp_path / "headers", maker.CONFIGS["deepseek-v4-flash"])
    found = Counter()
    for entry in open_checkpoint(tmp_path / "headers", with_data=False).entries.values():
        found[entry.dtype] += entry.num_elements
    assert {dtype: found[dtype] for dtype in ("BF16", "F8_E8M0", "F8_E4M3", "I8")} == {
        "BF16": 1_415_259_264,
        "F8_E8M0": 8_858_737_664,
        "F8_E4M3": 6_023_020_544,
        "I8": 141_733_920_768,
    }
    assert set(found) == {"BF16", "F8_E8M0", "F8_E4M3", "I8", "F32", "I64"}


def test_a_refusal_names_parts_option_and_the_smallest_budget_that_works(capsys, headers):
    words = ("plan", headers, "--experts", 6)
    status, _, err = call(capsys, *words, "--ram", "1MB")
    assert status == 12
    assert "the largest parts are interpreter and libraries" in err
    assert "--similarity-tokens" in err
    smallest = parse_size(re.search(r"--ram (\w[\w.]*)", err)[1])
    # the interpreter itself grows by a few hundred kilobytes from call to call
    assert call(capsys, *words, "--ram", smallest // 2)[0] == 12
    known = planned(capsys, "--ram", smallest + (16 << 20), *words[1:])
    assert known["memory_bytes"] <= smallest + (16 << 20)
