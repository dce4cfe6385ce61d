"""The command line as its user meets it: words in, files, words and an exit status out."""

import inspect
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import click
import pytest
import tiny
import torch
from rich.console import Console
from safetensors.torch import save_file

from ream_stream import units
from ream_stream.__main__ import main
from ream_stream.calibration.config import CalibrationOptions
from ream_stream.checkpoint import reader
from ream_stream.cli import cli, progress
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.compression import event_log, job
from ream_stream.compression.config import RunOptions, settings_for
from ream_stream.evaluation import variants
from ream_stream.evaluation.config import ComparisonOptions, ScoreOptions
from ream_stream.evaluation.verify import verify
from ream_stream.events import LayerDone, Started, Step
from ream_stream.model import streamed_model
from ream_stream.planning import disk
from ream_stream.settings import Method, Settings

VERBS = sorted(cli.commands)


def call(capsys, *words):
    """Run a command line; return its status, what it printed and what it said."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def files(folder):
    """Every file of an output by name, the work folder aside."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints("qwen3_moe")


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file(tiny.some_tokens().tensors(), path)
    return path


@pytest.fixture(scope="module")
def words(source, token_file):
    """Return the arguments of a compression into a folder."""

    def give(output, *more):
        count = () if {"--keep", "--experts"} & set(more) else ("--experts", "6")
        fixed = ("--any-count", "--calibration", token_file, "--compute-dtype", "float32")
        return "compress", source, output, *count, *fixed, *more

    return give


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """Give an output made without a stop."""
    output = tmp_path_factory.mktemp("finished") / "output"
    assert main([str(word) for word in words(output)]) == 0
    return output


# --- help


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


# --- options


def given(verb, *words):
    """Return the values that a verb is called with."""
    return cli.commands[verb].make_context(verb, [str(word) for word in words]).params


def run_options(*words):
    values = given("plan", ".", *words)
    return RunOptions.of(**{k: v for k, v in values.items() if k not in {"as_json", "stream"}})


def chosen(kind, values):
    return kind(**{k: v for k, v in values.items() if k in kind.__dataclass_fields__})


def test_a_command_line_without_options_asks_for_what_the_library_does():
    asked = run_options("--experts", 65)
    here = RunOptions(source=Path(), experts=65)
    assert replace(asked, changes={}) == here
    machine = {"compute_dtype": "float32", "device_kind": "cpu"}
    settings = Settings(experts=65, method=Method(), **machine)
    assert settings_for(asked, 128, **machine) == settings_for(here, 128, **machine) == settings
    assert (
        variants.settings_of("ream", experts=65, num_experts=128, seed=0, **machine) == settings
    )
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
        *("--keep", "80%", "--method", "reap", "--refit-lambda", "1,2", "--no-gate-term"),
        *("--max-shard-size", "1MB", "--ram", "2GB", "--vram", "auto", "--dtype", "bf16"),
    )
    assert (asked.keep, asked.method, asked.ram, asked.vram) == (
        Fraction("0.8"),
        "reap",
        2 * 10**9,
        None,
    )
    found = settings_for(asked, 10, compute_dtype="float32", device_kind="cpu")
    assert (found.experts, found.dtype, found.max_shard_bytes) == (8, "bf16", 10**6)
    assert (found.method.refit_lambda, found.method.gate_term) == ((1.0, 2.0), False)


@pytest.mark.parametrize("text", ["75", "0.75", "0%", "101%", "-5%", "nan%", "", "1e9%"])
def test_what_is_no_share_is_wrong_usage(text):
    with pytest.raises(click.UsageError, match="share"):
        given("plan", ".", "--keep", text)


# --- compress


def stop_at_start(monkeypatch):
    """Let runs get a Ctrl-C as they begin."""

    def stop(_log, event):
        if isinstance(event, Started):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(event_log.Log, "show", stop)


def test_a_compressed_checkpoint_loads_with_fewer_experts(capsys, words, tmp_path):
    output = tmp_path / "output"
    status, out, err = call(capsys, *words(output, "--keep", "80%"))
    assert (status, out) == (0, "")
    assert "8 -> 6 (80% is 6.4, rounded down)" in err
    assert "layer 3/3" in err
    assert f"next: ream-stream verify {output}" in err
    assert tiny.read_config(output)["num_experts"] == 6
    assert "Traceback" not in err
    assert call(capsys, "verify", output)[0] == 0


def test_a_run_builds_two_models_and_looks_through_two_sets_of_headers(
    capsys, monkeypatch, words, tmp_path
):
    counted = Counter()

    def count(module, name):
        called = getattr(module, name)

        def counting(*args, **kwargs):
            counted[name] += 1
            return called(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(streamed_model, "build_skeleton")
    count(reader, "find_experts")
    count(reader, "find_quantized")
    assert call(capsys, *words(tmp_path / "out"))[0] == 0
    # the source's and the output's
    assert counted == {"build_skeleton": 2, "find_experts": 2, "find_quantized": 2}


def test_json_is_one_object_and_nothing_else(capsys, words, tmp_path):
    status, out, _ = call(capsys, *words(tmp_path / "output", "--json"))
    known = json.loads(out)
    assert status == 0
    assert (known["experts_before"], known["experts_after"]) == (8, 6)
    assert known["already_complete"] is False
    written = sum(p.stat().st_size for p in (tmp_path / "output").glob("*.safetensors"))
    assert known["output_bytes"] == written
    assert set(known["seconds_by_phase"]) >= {"observe", "write"}


def test_a_second_run_of_a_finished_one_does_nothing(capsys, words, finished):
    before = files(finished)
    status, _, err = call(capsys, *words(finished))
    assert status == 0
    assert "nothing was left to do" in err
    assert files(finished) == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_stops_after_a_commit_and_the_next_run_gives_the_same_bytes(
    capsys, monkeypatch, words, finished, tmp_path, name
):
    output, number = tmp_path / "output", getattr(signal, name)
    show = event_log.Log.show

    def stop_after_the_first_layer(log, event):
        show(log, event)
        if isinstance(event, LayerDone) and event.layer == 0:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(event_log.Log, "show", stop_after_the_first_layer)
        status, _, err = call(capsys, *words(output))
    assert status == 128 + number
    line = next(line for line in err.splitlines() if line.startswith("resume with: "))
    again = shlex.split(line.removeprefix("resume with: "))
    known = json.loads(call(capsys, "status", output, "--json")[1])
    assert (known["state"], known["committed_layers"], known["layers"]) == ("stopped", 1, 3)
    assert known["resume"] == shlex.join(again)
    assert not (output / "model.safetensors.index.json").exists()

    status, _, err = call(capsys, *again[1:])
    assert status == 0
    assert "resuming at layer 2 of 3" in err
    assert files(output) == files(finished)


def test_a_run_goes_on_with_the_threads_it_began_with(capsys, monkeypatch, words, tmp_path):
    output = tmp_path / "output"
    stop_at_start(monkeypatch)
    try:
        assert call(capsys, *words(output, "--threads", 2))[0] == 130
        torch.set_num_threads(1)
        known = json.loads(call(capsys, *words(output, "--dry-run", "--json"))[1])
        assert known["threads"] == 2
    finally:
        torch.set_num_threads(1)


def test_the_resume_command_does_not_discard_what_there_is(
    capsys, monkeypatch, words, tmp_path
):
    stop_at_start(monkeypatch)
    _, _, err = call(capsys, *words(tmp_path / "output", "--restart"))
    assert "resume with: ream-stream compress" in err
    assert "--restart" not in err.partition("resume with: ")[2]


@pytest.mark.slow
def test_the_process_itself_ends_with_130_on_ctrl_c(words, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from ream_stream.__main__ import main\n"
        "from ream_stream.compression import event_log\n"
        "from ream_stream.events import Started\n"
        "def stop(log, event):\n"
        "    if isinstance(event, Started):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "event_log.Log.show = stop\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, *map(str, words(tmp_path / "output"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_signal_ends_the_process_at_once(name):
    code = (
        "import os, signal\n"
        "from ream_stream.cli.signals import stop_requests\n"
        "with stop_requests() as asked:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        f"    assert asked() == signal.{name}\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    raise SystemExit('it goes on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 143
    assert done.stderr == "stopping at the next safe point; once more to stop at once\n"


def test_a_hangup_that_nohup_ignores_does_not_stop_a_run():
    code = (
        "import os, signal\n"
        "from ream_stream.cli.signals import stop_requests\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with stop_requests() as asked:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    assert asked() is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, words, tmp_path):
    status, out, err = call(capsys, *words(tmp_path / "output", "--dry-run"))
    assert (status, out) == (0, "")
    assert "8 -> 6" in err
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_refused_by_name(capsys, words, finished):
    before = files(finished)
    status, _, err = call(capsys, *words(finished, "--saliency", "ean", "--seed", "3"))
    assert status == 11
    assert "saliency: 'reap' then, 'ean' now" in err
    assert "seed: 0 then, 3 now" in err
    assert "merge:" not in err
    assert files(finished) == before


def test_restart_discards_a_run_with_other_settings(capsys, words, finished, tmp_path):
    output = tmp_path / "output"
    assert call(capsys, *words(output, "--saliency", "frequency"))[0] == 0
    assert files(output) != files(finished)
    status, _, err = call(capsys, *words(output, "--restart"))
    assert status == 0
    assert "discarding" in err
    assert files(output) == files(finished)


def test_a_run_in_a_folder_that_is_in_use_is_refused(capsys, words, tmp_path):
    output = tmp_path / "output"
    with job.workspace_of(output, None).locked():
        status, _, err = call(capsys, *words(output))
        assert status == 11
        assert f"in use by process {os.getpid()}" in err
        known = json.loads(call(capsys, "status", output, "--json")[1])
        assert known["state"] == "running"
    assert call(capsys, *words(output))[0] == 0


def test_a_work_folder_elsewhere_leaves_the_model_and_whose_it_is_in_the_output(
    capsys, words, finished, tmp_path
):
    output, work = tmp_path / "output", tmp_path / "work"
    assert call(capsys, *words(output, "--work-dir", work))[0] == 0
    assert sorted(p.name for p in output.iterdir()) == sorted(
        [".ream-stream", *files(finished)]
    )
    assert not list((output / ".ream-stream").glob("*.safetensors"))
    status, out, _ = call(capsys, "status", output, "--work-dir", work, "--json")
    assert (status, json.loads(out)["state"]) == (0, "complete")


def test_the_log_tells_the_run_as_json_lines(words, finished):
    lines = (finished / ".ream-stream" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(line)["event"] for line in lines]
    assert names[:3] == ["command", "plan", "started"]
    assert names.count("layer done") == 3
    assert "finished" in names


# --- what is refused, and that nothing is written then

REFUSED = {
    "no count": (2, ["--experts", None]),
    "both counts": (2, ["--keep", "75%", "--experts", "6"]),
    "more experts than there are": (2, ["--experts", "9"]),
    "fewer than a token needs": (2, ["--experts", "2"]),
    "groups too small": (2, ["--experts", "3", "--group-size", "2"]),
    "no such device": (2, ["--device", "abacus"]),
    "unknown choice": (2, ["--saliency", "luck"]),
    "no such text": (2, ["--calibration", "nowhere.txt"]),
    "no size": (2, ["--ram", "much"]),
    "too little memory": (12, ["--ram", "1MB"]),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("verb", ["compress", "plan"])
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    capsys, words, tmp_path, what, verb
):
    status, more = REFUSED[what]
    arguments = [verb, *words(tmp_path / "output")[1:]]
    if more[1] is None:
        at = arguments.index(more[0])
        arguments, more = arguments[:at] + arguments[at + 2 :], []
    found, out, err = call(capsys, *arguments, *more)
    assert (found, out) == (status, "")
    assert err.strip().splitlines()[-1].lower().startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_unless_the_run_has_what_it_needs(
    capsys, monkeypatch, words, finished, tmp_path
):
    monkeypatch.setattr(disk, "free_bytes", lambda _path: 0)
    status, _, err = call(capsys, *words(tmp_path / "output"))
    assert status == 12
    assert "on the disk of" in err
    assert list(tmp_path.iterdir()) == []
    assert call(capsys, *words(finished))[0] == 0


def test_hidden_states_are_counted_on_the_disk_of_the_work_folder(
    capsys, monkeypatch, words, tmp_path
):
    work = tmp_path / "work"
    monkeypatch.setattr(disk, "same_disk", lambda *_: False)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 0 if path == work else 1 << 40)
    status, _, err = call(capsys, *words(tmp_path / "output", "--work-dir", work))
    assert status == 12
    # two boundaries of 4 x 12 tokens of 32 numbers in float32
    assert f"needs 12.3 kB on the disk of {work}" in err


def test_an_output_in_the_source_is_refused(capsys, words, source):
    before = sorted(source.iterdir())
    assert call(capsys, *words(source / "output"))[0] == 2
    assert call(capsys, *words(source))[0] == 2
    assert sorted(source.iterdir()) == before


def test_a_folder_with_other_things_is_refused(capsys, words, tmp_path):
    (tmp_path / "thesis.tex").touch()
    for more in ((), ("--restart",), ("--dry-run",)):
        status, _, err = call(capsys, *words(tmp_path, *more))
        assert status == 11
        assert "thesis.tex" in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def copied(source, tmp_path):
    """Give a copy of the source that may be changed."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_model_of_another_kind_is_10_and_a_cut_file_is_3(capsys, copied, words, tmp_path):
    config = tiny.read_config(copied)
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    status, _, err = call(capsys, "plan", copied, "--experts", "6")
    assert (status, "'llama' is not supported" in err) == (10, True)
    verb, _, *rest = words(tmp_path / "output")
    shard = sorted(copied.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    status, _, err = call(capsys, verb, copied, *rest)
    assert (status, shard.name in err) == (3, True)
    assert not (tmp_path / "output").exists()


# --- plan


def test_a_plan_needs_no_text_and_no_output(capsys, source):
    status, out, err = call(capsys, "plan", source, "--keep", "75%", "--any-count")
    assert (status, err) == (0, "")
    assert "8 -> 6 (75%)" in out
    assert "3072 sequences of 512 tokens" in out


def test_a_plan_tells_reads_writes_products_and_time(capsys, source):
    out = call(capsys, "plan", source, "--keep", "75%", "--any-count")[1]
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert rows.keys() >= {"reads", "writes", "products", "time", "disk", "memory"}
    assert "about" in rows["time"]


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


# --- calibration text, with the packaged checkpoint and its tokenizer


@pytest.fixture(scope="module")
def text_words(tmp_path_factory):
    """Return the arguments of a small run on text, finished once."""
    folder = tmp_path_factory.mktemp("text")
    text = folder / "text.txt"
    text.write_text("The first line.\nAnd the second one, which is longer.\n" * 40)
    words = [
        *("compress", CHECKPOINT, folder / "output", "--method", "reap", "--keep", "75%"),
        *("--calibration", text, "--sequences", 4, "--sequence-length", 32, "--threads", 1),
    ]
    assert main([str(word) for word in words]) == 0
    return words


def test_a_run_that_goes_on_uses_the_tokens_it_began_with(capsys, monkeypatch, text_words):
    def tokenize(*_args, **_kwargs):
        raise AssertionError("the text is made into tokens again")

    monkeypatch.setattr(job, "read_tokens", tokenize)
    assert call(capsys, *text_words)[0] == 0


def test_lost_tokens_are_made_again(capsys, text_words):
    kept = text_words[2] / ".ream-stream" / "tokens.safetensors"
    data = kept.read_bytes()
    kept.unlink()
    try:
        assert call(capsys, *text_words)[0] == 0
    finally:
        kept.write_bytes(data)


@pytest.mark.parametrize("more", ["", "Much more text. " * 500])
def test_a_changed_text_is_refused_as_another_calibration(capsys, text_words, tmp_path, more):
    other, words = tmp_path / "other.txt", list(text_words)
    other.write_text("Another text." + more)
    words[words.index("--calibration") + 1] = other
    status, _, err = call(capsys, *words)
    assert status == 11
    assert "calibration: " in err
    # a new run of the short one would be refused as well, for another reason
    assert call(capsys, *words, "--restart", "--dry-run")[0] == (0 if more else 2)


def test_another_number_of_sequences_is_another_calibration(capsys, text_words):
    status, _, err = call(capsys, *text_words, "--sequences", 3)
    assert status == 11
    assert "calibration: " in err


def test_a_token_set_is_made_described_and_used_by_a_compression(capsys, tmp_path):
    for name, text in (("code", "def f(): return 1\n"), ("math", "1 + 1 = 2. ")):
        (tmp_path / f"{name}.txt").write_text(text * 60)
    made, size = tmp_path / "mix.safetensors", ("--sequences", 6, "--sequence-length", 16)
    parts = [w for n in ("code", "math") for w in ("--calibration", f"{n}={tmp_path / n}.txt")]
    words = ("tokens", CHECKPOINT, *parts, *size, "--json")
    known = json.loads(call(capsys, *words, "--output", made)[1])
    assert known == json.loads(call(capsys, *words)[1])
    assert [(n, d["sequences"]) for n, d in known["domains"].items()] == [
        ("code", 3), ("math", 3),
    ]  # fmt: skip
    again = call(capsys, "tokens", CHECKPOINT, "--calibration", made, "--json")
    assert json.loads(again[1]) == known
    assert "50.0%" in call(capsys, "tokens", CHECKPOINT, "--calibration", made)[1]
    output = tmp_path / "out"
    words = ("compress", CHECKPOINT, output, "--experts", 28, "--method", "reap")
    assert call(capsys, *words, *parts, *size)[0] == 0
    manifest = json.loads((output / "ream_stream.json").read_text())
    assert manifest["fingerprint"]["calibration"] == known["digest"]
    assert manifest["layers"][0]["domains"].keys() == {"code", "math"}
    # the same mix with other weights is another calibration
    other = [f"{word}:3" if word == parts[1] else word for word in parts]
    assert call(capsys, *words, *other, *size)[0] == 11
    assert call(capsys, "tokens", CHECKPOINT, *parts, *size, "--output", made)[0] == 2


# --- inspect, status, verify, eval


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
    config = tiny.read_config(copied)
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    status, out, _ = call(capsys, "inspect", copied)
    assert status == 0
    assert "no: model type 'llama'" in out


def test_status_of_a_finished_run_and_of_none(capsys, finished, tmp_path):
    status, out, _ = call(capsys, "status", finished)
    assert status == 0
    assert "complete" in out
    assert "3 of 3 committed" in out
    assert call(capsys, "status", tmp_path)[0] == 2


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


def test_compare_and_sweep_write_their_results_and_do_nothing_twice(capsys, tmp_path):
    for name in ("general", "math", "code"):
        (tmp_path / f"{name}.txt").write_text(f"Some words of {name}, 1 + 1 = 2.\n" * 60)
    names = ("general", "math", "code")
    size = ("--sequences", 10, "--sequence-length", 16, "--max-tokens", 64)
    words = [CHECKPOINT, "--experts", 24, "--seeds", 1, "--threads", 1, *size]
    for option in ("--calibration", "--text"):
        words += [w for n in names for w in (option, f"{n}={tmp_path / n}.txt")]
    folder = tmp_path / "compared"
    command = ("compare", *words, "--methods", "reap,frequency", "--output", folder)
    status, out, err = call(capsys, *command, "--json")
    known = json.loads(out)
    assert status == 0
    assert [each["name"] for each in known["summary"]] == ["original", "reap", "frequency"]
    assert json.loads((folder / "comparison.json").read_text()) == known
    assert "layer 4" in err
    status, out, err = call(capsys, *command)
    assert (status, err) == (0, "")
    assert "frequency" in out
    assert call(capsys, "compare", *words, "--methods", "none")[0] == 2

    mixes = ("--mixes", "general-50-math-50-code-00,general-00-math-30-code-70")
    folder = tmp_path / "swept"
    command = ("sweep", *words, "--methods", "reap", *mixes, "--output", folder)
    known = json.loads(call(capsys, *command, "--json")[1])
    assert known["axes"] == list(names)
    assert len(known["points"]) == 2
    assert "hypervolume" in call(capsys, *command)[1]
    assert (folder / "sweep.svg").read_text().startswith("<svg")
    assert call(capsys, "sweep", *words, "--mixes", "paper")[0] == 2


# --- how it looks


def test_what_is_left_follows_from_bytes_and_times():
    pace = event_log.Pace([10, 10, 40, 20])
    assert pace.left() is None
    pace.skip(1)
    pace.finish(2.0)
    # 10 bytes took 2 s, 60 bytes are left
    assert pace.left() == 12.0
    assert pace.left(since_last=5.0) == 7.0
    assert pace.left(since_last=50.0) == 0.0
    assert (pace.done_bytes, pace.total_bytes) == (20, 80)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (41.2, "41 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_are_told_in_two_units(seconds, text):
    assert units.format_seconds(seconds) == text


LAYER_DONE = LayerDone(
    layer=1,
    experts_before=8,
    experts_after=6,
    changed=2,
    read_bytes=2_000_000,
    written_bytes=1_500_000,
    seconds={"observe": 40.0, "write": 1.2},
    peak_anonymous_bytes=700_000_000,
)


def shown(*, terminal):
    """Show three layers, of which the first was committed before; return what is printed."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, highlight=False)
    with progress.display(console, [1_000_000, 2_000_000, 4_000_000]) as display:
        display.show(Started(layers=3, committed=1))
        display.show(Step(layer=1, phase="observe", done=3, total=4))
        display.show(LAYER_DONE)
        display.show(Step(layer=2, phase="observe", done=1, total=4))
    return file.getvalue()


def test_a_log_gets_one_line_for_each_layer():
    (line,) = shown(terminal=False).splitlines()
    assert line.startswith(
        "layer 2/3  8 -> 6 experts, 2 merged  2.00 MB -> 1.50 MB  41 s  peak 700 MB  "
    )
    assert line.endswith(" left")


def test_a_line_tells_the_memory_of_a_device_that_was_used():
    event = replace(LAYER_DONE, peak_device_bytes=3_000_000_000)
    line = progress.layer_line(event, 3, event_log.Pace([1, 2, 4]))
    assert line.endswith("peak 700 MB  device 3.00 GB")


def test_a_terminal_gets_a_bar_beside_the_lines():
    text = shown(terminal=True)
    assert "layer 2/3  8 -> 6 experts, 2 merged" in text
    assert "layer 3/3  observe 1/4" in text
    assert "3.00 MB of 7.00 MB  memory " in text
