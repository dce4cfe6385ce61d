"""The verb `plan`."""

import json

from command_line import call

from ream_stream.cli.demo import CHECKPOINT


def test_a_plan_needs_no_text_and_no_output(capsys, source):
    words = ("plan", source, "--keep", "75%", "--any-count")
    status, out, err = call(capsys, *words, "--method", "ream")
    assert (status, err) == (0, "")
    assert "8 -> 6 (75%)" in out
    assert "3072 sequences of 512 tokens" in out


def test_a_plan_tells_which_method_auto_is_and_why(capsys, source):
    words = ("plan", source, "--any-count")
    cut = json.loads(call(capsys, *words, "--keep", "75%", "--json")[1])
    assert (cut["method"], cut["settings"]["slices"]) == ("slices", 2)
    assert cut["settings"]["refit_target"] == "trajectory"
    assert cut["experts_after"] * cut["width_after"] <= 8 * 16 * 3 // 4
    out = " ".join(call(capsys, *words, "--keep", "75%")[1].split())
    assert "--method auto is slices: it lost least in all that was measured" in out
    assert "3 -> 6 a token" in out
    counted = json.loads(call(capsys, *words, "--experts", "6", "--json")[1])
    assert (counted["method"], counted["settings"]["saliency"]) == ("energy", "energy")
    assert counted["settings"]["refit"] == "down"


def test_auto_is_energy_where_experts_cannot_be_cut_and_says_why(capsys, checkpoints):
    words = ("plan", checkpoints("phimoe"), "--any-count", "--keep", "75%")
    told = json.loads(call(capsys, *words, "--json")[1])
    assert told["method"] == "energy"
    assert "phimoe cannot be cut, its router masks" in told["method_reason"]


def test_auto_takes_the_layer_as_target_where_there_is_no_trajectory(capsys, checkpoints):
    for name in ("granitemoe", "gemma4_text"):
        words = ("plan", checkpoints(name), "--any-count", "--keep", "75%", "--json")
        status, out, err = call(capsys, *words)
        assert status == 0, err
        told = json.loads(out)
        assert (told["method"], told["settings"]["refit_target"]) == ("slices", "layer")


def test_a_part_of_a_method_needs_the_methods_name(capsys, source):
    words = ("plan", source, "--any-count", "--keep", "75%")
    for part in (("--merge", "mean"), ("--saliency", "reap"), ("--group-size", "8")):
        status, _, err = call(capsys, *words, *part)
        assert status == 2
        assert f"{part[0]} changes a part of a method: say of which with --method" in err
    assert call(capsys, *words, "--refit-lambda", "1")[0] == 0


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


def test_a_plan_tells_parameters_and_sizes_before_and_after(capsys, source):
    words = ("plan", source, "--keep", "75%", "--any-count", "--method", "ream")
    known = json.loads(call(capsys, *words, "--json")[1])
    before, after = known["parameters"]["before"], known["parameters"]["after"]
    # two layers, two experts less in each, and their router rows
    assert before["total"] - after["total"] == 2 * 2 * (3 * 16 * 32 + 32)
    # a token still goes to three experts
    assert before["active"] - after["active"] == 2 * 2 * 32
    out = " ".join(call(capsys, *words)[1].split())
    assert "3 a token" in out
    assert "context 64 tokens" in out
    assert "at 16, 8, 4 bits" in out
    assert "works with 6 experts a layer, but fails to divide them" in out


def test_a_plan_of_a_short_text_counts_what_there_is_and_says_that_it_is_little(
    capsys, tmp_path
):
    (tmp_path / "text.txt").write_text("Some words of nothing. " * 400)
    words = ("plan", CHECKPOINT, "--keep", "75%", "--calibration", tmp_path / "text.txt")
    known = json.loads(call(capsys, *words, "--json")[1])
    assert 1 < known["calibration_sequences"] < 100
    tokens = known["calibration_sequences"] * known["calibration_sequence_length"]
    assert sum(f"{tokens} calibration tokens are few" in note for note in known["notes"]) == 1
    status, _, err = call(capsys, *words, "--sequences", "3072")
    assert status == 2
    assert f"use --sequences {known['calibration_sequences']}, or a longer text" in err
    assert call(capsys, *words, "--sequences", "0")[0] == 2
