"""Help and options of the verbs, held to what the library has."""

import inspect
import shlex
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import click
import pytest
from command_line import call

from ream_stream.calibration.config import CalibrationOptions
from ream_stream.cli import cli
from ream_stream.compression.config import RunOptions
from ream_stream.compression.method_settings import candidates, settings_for
from ream_stream.evaluation import variants
from ream_stream.evaluation.config import ComparisonOptions, ScoreOptions
from ream_stream.evaluation.verify import verify
from ream_stream.planning.slice_shape import ExpertLayer
from ream_stream.settings import Method, Settings

VERBS = sorted(cli.commands)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_the_exit_statuses(capsys, verb):
    status, out, _ = call(capsys, verb, "--help")
    assert status == 0
    assert "\b" not in out
    assert "\\b" not in out
    assert f"    ream-stream {verb}" in out.partition("Example:")[2]
    assert "Exit status:\n      0  done\n" in out


def test_the_examples_of_the_help_can_be_parsed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("Qwen3-30B-A3B", "Qwen3-23B"):
        (tmp_path / folder).mkdir()
    (tmp_path / "src").mkdir()
    for file in (
        "text.jsonl",
        "test.txt",
        "test.jsonl",
        "arc.jsonl",
        "problems.jsonl",
        "eval.json",
        "sweep.json",
    ):
        (tmp_path / file).touch()
    run = "source: ./Qwen3-30B-A3B\noutput: ./small\ncalibration: text.jsonl\n"
    (tmp_path / "run.yaml").write_text(run)
    for verb in VERBS:
        _, out, _ = call(capsys, verb, "--help")
        shown = out.partition("Example:\n\n")[2].partition("\n\n")[0]
        for line in shown.replace("\\\n", " ").splitlines():
            program, name, *rest = shlex.split(line)
            assert (program, name) == ("ream-stream", verb)
            cli.commands[verb].make_context(verb, rest)


def test_every_verb_gives_json():
    for verb in VERBS:
        assert "--json" in {name for param in cli.commands[verb].params for name in param.opts}


def test_help_of_every_verb_imports_nothing_heavy():
    code = (
        "import sys, ream_stream.__main__ as it\n"
        f"for verb in {VERBS}: it.main([verb, '--help'])\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    imported = done.stdout.splitlines()[-1].split()
    assert {"torch", "transformers", "zarr", "scipy", "numpy", "rich"}.isdisjoint(imported)


def given(verb, *words):
    """Return the values that a verb is called with."""
    return cli.commands[verb].make_context(verb, [str(word) for word in words]).params


def run_options(*words):
    values = given("plan", ".", *words)
    other = {"as_json", "verbose", "stream", "save", "gpu"}
    return RunOptions.of(**{k: v for k, v in values.items() if k not in other})


def chosen(kind, values):
    return kind(**{k: v for k, v in values.items() if k in kind.__dataclass_fields__})


def test_a_command_line_without_options_asks_for_what_the_library_does():
    asked = run_options("--experts", 65)
    here = RunOptions(source=Path(), experts=65)
    assert replace(asked, changes={}) == here
    machine = {"compute_dtype": "float32", "device_kind": "cpu"}
    layer = ExpertLayer(count=128, inner=768)
    settings = Settings(experts=65, method=Method(), **machine)
    (asked_is, _), (here_is, _) = candidates(asked)[0], candidates(here)[0]
    assert (asked_is.method, here_is.method) == ("energy", "energy")
    asked, here = replace(asked, method="ream"), replace(here, method="ream")
    assert settings_for(asked, layer, **machine) == settings
    assert settings_for(here, layer, **machine) == settings
    assert variants.settings_of("ream", experts=65, layer=layer, seed=0, **machine) == settings
    assert chosen(ScoreOptions, given("eval", ".")) == ScoreOptions()
    needed = ("--experts", 65, "--text", "t", "--calibration", "c")
    own = {"experts": 65, "text": ("t",), "calibration": ("c",)}
    for verb in ("compare", "sweep"):
        asked = chosen(ComparisonOptions, given(verb, ".", *needed))
        assert asked == ComparisonOptions(**own)
    asked = chosen(CalibrationOptions, given("tokens", ".", "--calibration", "c"))
    assert asked == CalibrationOptions(calibration=("c",))


def test_flags_of_verify_are_off_and_on_as_in_the_library():
    asked, signature = given("verify", "."), inspect.signature(verify).parameters
    for name in ("scan", "load", "run"):
        assert asked[name] == signature[name].default


def test_an_option_of_the_command_line_is_what_the_library_is_given():
    asked = run_options(
        *("--keep", "80%", "--method", "ream", "--refit", "down"),
        *("--refit-lambda", "1,2", "--no-gate-term"),
        *("--max-shard-size", "1MB", "--ram", "2GB", "--vram", "auto", "--dtype", "bf16"),
    )
    assert (asked.keep, asked.method, asked.ram, asked.vram) == (
        Fraction("0.8"),
        "ream",
        2 * 10**9,
        None,
    )
    layer = ExpertLayer(count=10, inner=768)
    found = settings_for(asked, layer, compute_dtype="float32", device_kind="cpu")
    assert (found.experts, found.dtype, found.max_shard_bytes) == (8, "bf16", 10**6)
    assert (found.method.refit_lambda, found.method.gate_term) == ((1.0, 2.0), False)


@pytest.mark.parametrize("text", ["0", "101", "0%", "101%", "-5%", "nan%", "", "1e9%"])
def test_what_is_no_share_is_wrong_usage(text):
    with pytest.raises(click.UsageError, match="share"):
        given("plan", ".", "--keep", text)
