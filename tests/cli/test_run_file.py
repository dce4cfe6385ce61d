"""Options from a file and from the environment."""

import json

import pytest
import yaml
from command_line import call, files

from ream_stream.cli import cli
from ream_stream.cli.run_file import values_of
from ream_stream.errors import UsageError


def test_what_plan_saved_compresses_to_the_bytes_of_the_same_options(
    capsys, source, token_file, tmp_path
):
    given = ("--experts", "6", "--any-count", "--calibration", token_file, "--ram", "2.5GB")
    given = (
        *given,
        "--method",
        "reap",
        "--refit",
        "down",
        "--refit-lambda",
        "0.3,2",
        "--no-sequential",
    )
    run = tmp_path / "run.yaml"
    assert call(capsys, "plan", source, tmp_path / "one", *given, "--save", run)[0] == 0
    status, _, err = call(capsys, "compress", "--config", run)
    assert (status, err.count("layer 3/3  ")) == (0, 1)
    assert call(capsys, "compress", source, tmp_path / "two", *given)[0] == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    # what was given stands there and nothing else
    saved = yaml.safe_load(run.read_text(encoding="utf-8"))
    assert saved.keys() == {
        *("source", "output", "experts", "any-count", "calibration", "ram", "method", "refit"),
        *("refit-lambda", "sequential"),
    }
    assert (saved["ram"], saved["refit-lambda"]) == ("2500000000", "0.3,2.0")
    # and is the same when it is read and saved again
    again = tmp_path / "again.yaml"
    assert call(capsys, "plan", "--config", run, "--save", again)[0] == 0
    assert yaml.safe_load(again.read_text(encoding="utf-8")) == saved


@pytest.mark.parametrize("share", ["62.5%", "75", "0.5"])
def test_a_share_is_saved_as_it_is(capsys, source, tmp_path, share):
    run = tmp_path / "run.yaml"
    words = ("plan", source, "--keep", share, "--any-count", "--json")
    known = json.loads(call(capsys, *words, "--save", run)[1])
    assert (
        json.loads(call(capsys, "plan", "--config", run, "--json")[1])["settings"]
        == known["settings"]
    )


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    capsys, source, tmp_path, monkeypatch
):
    run = tmp_path / "run.yaml"
    run.write_text(f"source: {source}\nexperts: 4\nseed: 1\nmax_shard_size: 1MB\n")

    def settings(*more):
        known = json.loads(call(capsys, "plan", "--config", run, "--json", *more)[1])
        return known["settings"]

    assert (settings()["experts"], settings()["seed"]) == (4, 1)
    assert settings()["max_shard_bytes"] == 1_000_000
    monkeypatch.setenv("REAM_STREAM_PLAN_SEED", "2")
    assert settings()["seed"] == 2
    assert settings("--seed", "3", "--experts", "8") | {} == {
        **settings(),
        "seed": 3,
        "experts": 8,
        "group_size": settings("--experts", "8")["group_size"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calibratoin: x\n", "there is no option calibratoin; did you mean calibration?"),
        ("json: true\n", "there is no option json"),
        ("config: other.yaml\n", "there is no option config"),
        ("experts: {a: 1}\n", "experts: text or a list of text is needed"),
        ("experts: [1, 2]\n", "experts: it takes one value, not a list"),
        ("- experts\n", "names with values are needed"),
        ("experts: 1\nexperts: 2\n", "a name occurs twice"),
        ("experts: [\n", "it is no run file"),
        ("x: " + "y" * 200_000, "more than 100000 characters"),
        ("\x1b[31m: 1\n", "it is no run file"),
    ],
)
def test_a_file_that_is_no_run_file_is_refused_with_the_reason(capsys, tmp_path, text, message):
    run = tmp_path / "run.yaml"
    run.write_text(text)
    status, out, err = call(capsys, "compress", "--config", run)
    assert (status, out) == (2, "")
    assert message in err
    assert "\x1b" not in err
    assert list(tmp_path.iterdir()) == [run]


def test_a_value_that_an_option_does_not_take_is_refused_as_on_the_command_line(
    capsys, source, tmp_path
):
    run = tmp_path / "run.yaml"
    run.write_text(f"source: {source}\noutput: {tmp_path / 'out'}\nram: 16\ncalibration: x\n")
    status, _, err = call(capsys, "compress", "--config", run)
    assert (status, "write a unit" in err) == (2, True)


def test_saving_replaces_nothing_and_plan_reads_what_is_of_compress_alone(
    capsys, source, tmp_path
):
    run = tmp_path / "run.yaml"
    run.write_text(f"source: {source}\nexperts: 4\nkeep-work: false\nrestart: true\n")
    before = run.read_bytes()
    assert call(capsys, "plan", "--config", run)[0] == 0
    status, _, err = call(capsys, "plan", "--config", run, "--save", run)
    assert (status, "it exists" in err) == (2, True)
    assert run.read_bytes() == before


def test_every_option_of_compress_has_a_place_in_a_run_file(tmp_path):
    compress, run = cli.commands["compress"], tmp_path / "run.yaml"
    words = {
        param.opts[0].removeprefix("--"): param
        for param in compress.params
        if param.name not in {"config", "as_json", "verbose", "quiet"}
    }
    for word, param in words.items():
        run.write_text(f"{word}: x\n")
        expected = ["x"] if param.multiple else "x"
        assert values_of(run, compress) == {param.name: expected}
    run.write_text("quiet: true\n")
    with pytest.raises(UsageError, match="there is no option quiet"):
        values_of(run, compress)


def test_quiet_leaves_results_and_errors(capsys, words, source, token_file, tmp_path):
    command = words(tmp_path / "out", "-q")
    assert call(capsys, *command) == (0, "", "")
    status, out, err = call(capsys, "eval", tmp_path / "out", "--text", token_file, "-q")
    assert (status, err) == (0, "")
    assert "perplexity" in out
    assert call(capsys, "verify", tmp_path / "out", "-q")[::2] == (0, "")
    status, _, err = call(capsys, *words(tmp_path / "out", "-q", "--seed", "5"))
    assert (status, err.startswith("error: ")) == (11, True)


def test_shells_are_given_completions(capsys, monkeypatch):
    monkeypatch.setenv("_REAM_STREAM_COMPLETE", "bash_source")
    assert "complete -o nosort -F" in call(capsys)[1]
    monkeypatch.setenv("_REAM_STREAM_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "ream-stream compress --refit-t")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert call(capsys)[1].splitlines() == ["plain,--refit-target"]
