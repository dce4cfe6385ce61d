"""The verb `compress`: what it writes, goes on with and refuses."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from command_line import call, files
from tiny_checkpoints import read_config

from ream_stream.checkpoint import reader
from ream_stream.compression import event_log, job
from ream_stream.events import LayerDone, Started
from ream_stream.model import streamed_model
from ream_stream.planning import disk


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
    assert "8 -> 6 (80% is 6.4, rounded)" in err
    assert "layer 3/3" in err
    assert f"next: ream-stream verify {output}" in err
    assert read_config(output)["num_experts"] == 6
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
    assert "error:" not in done.stderr
    assert "stopped after 0 of 3 layers; run the same command again to go on" in done.stderr


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


def test_a_model_of_another_kind_is_10_and_a_cut_file_is_3(capsys, copied, words, tmp_path):
    config = read_config(copied)
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    status, _, err = call(capsys, "plan", copied, "--experts", "6")
    assert (status, "'llama' is not supported" in err) == (10, True)
    verb, _, *rest = words(tmp_path / "output")
    shard = sorted(copied.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    status, _, err = call(capsys, verb, copied, *rest)
    assert (status, shard.name in err) == (3, True)
    assert not (tmp_path / "output").exists()
