"""The verb `plan`."""

import json

from command_line import call


def test_a_plan_needs_no_text_and_no_output(capsys, source):
    status, out, err = call(capsys, "plan", source, "--keep", "75%", "--any-count")
    assert (status, err) == (0, "")
    assert "8 -> 6 (75%)" in out
    assert "3072 sequences of 512 tokens" in out


def test_a_plan_tells_reads_writes_products_and_time(capsys, source):
    words = ("plan", source, "--keep", "75%", "--any-count")
    short = call(capsys, *words)[1]
    assert len(short.splitlines()) < 30
    assert not {"reads", "products"} & {line.split()[0] for line in short.splitlines()}
    out = call(capsys, *words, "-v")[1]
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert rows.keys() >= {"reads", "writes", "products", "time", "disk", "memory"}
    assert "about" in rows["time"]


def test_a_plan_for_a_named_gpu_tells_that_its_rates_are_a_data_sheet_s(capsys, source):
    words = ("plan", source, "--experts", "4", "--gpu", "rtx-4090")
    status, out, err = call(capsys, *words)
    told = " ".join(out.split())
    assert (status, err) == (0, "")
    assert "rtx-4090: " in told
    assert "of 21.6 GB allowed; times by 50% of the rates of its data sheet (NVIDIA Ada" in told
    assert "not here" not in told
    assert call(capsys, *words[:-1], "voodoo")[0] == 2


def test_what_is_left_of_a_run_is_told_and_of_a_finished_one_nothing(
    capsys, words, finished, tmp_path
):
    assert (
        json.loads(call(capsys, *words(finished, "--dry-run", "--json"))[1])["forecast"] is None
    )
    fresh = json.loads(call(capsys, *words(tmp_path / "new", "--dry-run", "--json"))[1])
    left = fresh["forecast"]
    for key in ("read_bytes", "written_bytes", "flop"):
        assert left[key] == sum(phase[key] for phase in left["phases"].values())
    assert left["written_bytes"] > fresh["output_bytes"]


def test_a_plan_as_json_has_the_bytes_that_the_run_writes(capsys, source, token_file, finished):
    given = ("--experts", "6", "--any-count", "--calibration", token_file)
    words = ("plan", source, *given, "--json")
    known = json.loads(call(capsys, *words)[1])
    assert known["output_bytes"] == sum(
        path.stat().st_size for path in finished.glob("*.safetensors")
    )
    assert known["memory_bytes"] == sum(known["memory_parts"].values())
    assert known["output"] is None
