"""The verb `eval`."""

import json

import pytest
from command_line import call

from ream_stream.cli.demo import CHECKPOINT
from ream_stream.evaluation.verdict import BANDS


def test_eval_compares_two_checkpoints(capsys, source, finished, token_file):
    words = ("eval", finished, "--against", source, "--text", token_file)
    status, out, _ = call(capsys, *words, "--json")
    known = json.loads(out)
    assert status == 0
    assert known["predicted"] == 4 * 11
    gap = known["nats"] - known["against"]["nats"]
    assert known["difference"]["nats"] == pytest.approx(gap, abs=1e-9)
    assert known["divergence"]["value"] > 0
    assert 0 < known["agreement"]["value"] <= 1
    assert "nats more" in call(capsys, *words)[1]
    alone = json.loads(call(capsys, "eval", source, "--text", token_file, "--json")[1])
    assert alone["nats"] == known["against"]["nats"]
    assert (alone["against"], alone["difference"]) == (None, None)


def test_eval_tells_domains_questions_and_errors_of_layers(capsys, tmp_path):
    texts = {"code": "def f(x): return x\n", "math": "1 + 1 = 2. "}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text * 40)
    asked = {"question": "1 + 1 =", "choices": ["2", "no"], "answer": 0}
    (tmp_path / "sums.jsonl").write_text(json.dumps(asked))
    output, size = tmp_path / "out", ("--sequence-length", 32)
    calibration = ("--calibration", tmp_path / "math.txt", "--sequences", 4, *size)
    words = ("compress", CHECKPOINT, output, "--experts", 24, "--method", "reap")
    assert call(capsys, *words, *calibration)[0] == 0
    parts = [w for n in texts for w in ("--text", f"{n}={tmp_path / n}.txt")]
    words = ("eval", output, "--against", CHECKPOINT, *parts, *size, "--layers")
    words = (*words, "--questions", tmp_path / "sums.jsonl")
    known = json.loads(call(capsys, *words, "--json")[1])
    assert known["domains"].keys() == texts.keys()
    predicted = [each["predicted"] for each in known["domains"].values()]
    assert known["predicted"] == sum(predicted)
    assert known["questions"]["sums"].keys() == {"checkpoint", "original"}
    assert known["questions"]["sums"]["checkpoint"]["acc"].keys() == {"value", "stderr"}
    assert len(known["layers"]) == 4
    assert known["layers"][3]["total"] > 0
    shown = call(capsys, *words)[1]
    for head in ("same top", "acc_norm", "own error"):
        assert head in shown
    assert call(capsys, "eval", output, "--text", tmp_path / "code.txt", "--layers")[0] == 2
    assert call(capsys, "eval", output)[0] == 2
    assert call(capsys, *words, "--ram", "1MB")[0] == 12


def test_eval_of_one_sequence_has_no_error_and_still_is_json(capsys, source, token_file):
    words = ("eval", source, "--text", token_file, "--max-tokens", "12", "--json")
    known = json.loads(call(capsys, *words)[1])
    assert (known["predicted"], known["stderr"]) == (11, None)


def test_eval_of_text_takes_whole_sequences_up_to_the_limit(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words to predict, and a few more of them.\n" * 20)
    words = ("eval", CHECKPOINT, "--text", text, "--sequence-length", "16")
    known = json.loads(call(capsys, *words, "--max-tokens", "40", "--json")[1])
    assert known["predicted"] == 2 * 15
    text.write_text("Short.")
    status, _, err = call(capsys, *words)
    assert status == 2
    assert "do not fill a sequence of 16" in err


def test_eval_says_what_a_comparison_means_and_explains_its_columns(
    capsys, source, finished, token_file
):
    words = ("eval", finished, "--against", source, "--text", token_file)
    known = json.loads(call(capsys, *words, "--json")[1])
    shown = " ".join(call(capsys, *words)[1].split())
    assert f"{known['against']['perplexity']:.4g} " in shown
    ratio = known["perplexity"] / known["against"]["perplexity"]
    assert f" {ratio - 1:+.1%} " in shown
    band = next(
        each
        for each in BANDS
        if known["divergence"]["value"] <= each.divergence
        and known["agreement"]["value"] >= each.agreement
    )
    assert f"verdict: {band.verdict} (divergence" in shown
    assert band.usual_for in shown
    assert "rule of thumb" in shown
    for head in ("perplexity", "change", "accuracy", "nats more", "divergence", "same top"):
        assert f"{head}: " in shown
    alone = call(capsys, "eval", source, "--text", token_file)[1]
    assert "perplexity: " in alone
    assert not {"verdict:", "change"} & set(alone.split())


def test_eval_on_a_pipe_says_what_is_running(capsys, source, finished, token_file):
    words = ("eval", finished, "--against", source, "--text", token_file, "--layers")
    lines = call(capsys, *words)[2].splitlines()
    assert lines[:4] == [
        f"running {finished.name}, 3 layers",
        f"running {source.name}, 3 layers",
        "scoring 4 sequences",
        f"running both, layer by layer: {finished.name}, 3 layers",
    ]


def test_eval_ends_with_what_to_do_next(capsys, source, finished, token_file):
    words = ("--text", token_file)
    lines = call(capsys, "eval", finished, "--against", source, *words)[2].splitlines()
    assert f"next: ream-stream push {finished} ORG/NAME" in lines
    lines = call(capsys, "eval", finished, *words)[2].splitlines()
    assert any(line.startswith("next: the same with --against SOURCE") for line in lines)
    lines = call(capsys, "eval", source, *words)[2].splitlines()
    assert lines[-1] == f"next: ream-stream plan {source} --keep 75%"
