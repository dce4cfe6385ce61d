"""What is left of a run, and how it looks from another terminal while it runs."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import compression
from crash import digests, kills, run_in_child

from ream_stream import files
from ream_stream.__main__ import main
from ream_stream.cli.status import gather
from ream_stream.compression import event_log
from ream_stream.compression.event_log import Log
from ream_stream.compression.file_lock import lock
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import InterruptedRunError
from ream_stream.events import LayerDone, Started, Step


@pytest.fixture(scope="module")
def words(checkpoints, token_file):
    """Return the arguments of a compression into a folder."""
    return lambda output, *more: compression(checkpoints("olmoe"), output, token_file, *more)


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "output"
    assert main(words(output)) == 0
    return output


def stop_after_a_layer(patch):
    """Stop a run after its first layer; collect what status tells just then."""
    show, seen = Log.show, []

    def tell(log, event):
        show(log, event)
        if isinstance(event, LayerDone):
            work = Path(log._file.name).parent
            seen.append(gather(Workspace(output=work.parent, work=work)))
            raise InterruptedRunError("stopped for the test")

    patch.setattr(Log, "show", tell)
    return seen


def test_status_of_a_running_run_tells_layer_time_memory_and_that_it_is_alive(
    words, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        seen = stop_after_a_layer(patch)
        assert main(words(tmp_path / "output")) == 130
    (running,) = seen
    assert running["state"] == "running"
    assert running["held_by"].startswith("process ")
    assert (running["committed_layers"], running["layers"]) == (1, 3)
    assert running["left_seconds"] > 0
    assert running["anonymous_bytes"] > 1_000_000
    assert running["last_event"]["event"] == "layer done"
    stopped = gather(
        Workspace(output=tmp_path / "output", work=tmp_path / "output/.ream-stream")
    )
    assert (stopped["state"], stopped["left_seconds"]) == ("stopped", None)


@pytest.mark.parametrize("jump", [timedelta(days=-9), timedelta(0), timedelta(days=9)])
def test_what_is_left_is_never_negative_whatever_the_clock_says(tmp_path, jump):
    workspace = Workspace(output=tmp_path, work=tmp_path / ".ream-stream")
    workspace.work.mkdir()
    line = {"event": "started", "layers": 3, "left_seconds": 60.0}
    line["time"] = (datetime.now(UTC) + jump).isoformat()
    workspace.log.write_text(json.dumps(line) + "\n", encoding="utf-8")
    with workspace.locked():
        left = gather(workspace)["left_seconds"]
    assert 0 <= left <= 60


def test_the_log_tells_a_step_of_a_long_phase_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(event_log.time, "monotonic", lambda: now[0])
    with files.open_log(tmp_path / "log.jsonl", tmp_path / "old") as file:
        log = Log(file, [10, 10])
        log.show(Started(layers=2, committed=0))
        for done in range(1, 100):
            now[0] += 1
            log.show(Step(layer=0, phase="observe", done=done, total=100))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "step", "step", "step"]
    assert lines[1]["done"] == 30


def test_a_large_log_is_put_aside_when_it_is_opened_and_a_small_one_goes_on(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "LOG_BYTES", 100)
    log, older = tmp_path / "log.jsonl", tmp_path / "log.1.jsonl"
    for number in range(8):
        with files.open_log(log, older) as file:
            files.append(file, f"{number}" * 39 + "\n")
            # each line is with the kernel before the next
            assert log.read_text(encoding="utf-8").endswith(f"{number}\n")
    assert [line[0] for line in older.read_text(encoding="utf-8").splitlines()] == [*"345"]
    assert [line[0] for line in log.read_text(encoding="utf-8").splitlines()] == [*"67"]


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_a_finished_run_is_cleaned_and_what_is_not_ours_stays(words, tmp_path, capsys):
    output = tmp_path / "output"
    assert main(words(output)) == 0
    before = contents(output)
    (output / ".ream-stream" / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["clean", str(output)]) == 0
    assert [path.name for path in (output / ".ream-stream").iterdir()] == ["notes.txt"]
    (output / ".ream-stream" / "notes.txt").unlink()
    assert main(["clean", str(output)]) == 0
    assert not (output / ".ream-stream").exists()
    assert main(["clean", str(output)]) == 2
    assert contents(output) == before
    assert main(["verify", str(output), "--no-scan"]) == 0
    capsys.readouterr()
    assert main(["status", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "complete"
    assert main(words(output)) == 11
    assert contents(output) == before


def test_an_unfinished_run_is_cleaned_only_by_force(words, tmp_path, monkeypatch):
    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        stop_after_a_layer(patch)
        assert main(words(output)) == 130
    (output / "mine.txt").write_text("mine", encoding="utf-8")
    left = digests(output)
    assert main(["clean", str(output)]) == 2
    assert digests(output) == left
    with lock(output / ".ream-stream" / "lock"):
        assert main(["clean", str(output), "--force"]) == 11
    assert digests(output) == left
    assert main(["clean", str(output), "--force"]) == 0
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_work_files_can_be_removed_when_a_run_is_done(words, tmp_path, finished):
    assert main(words(tmp_path / "output", "--remove-work")) == 0
    assert not (tmp_path / "output" / ".ream-stream").exists()
    assert contents(tmp_path / "output") == contents(finished)


def test_a_clean_killed_anywhere_leaves_the_checkpoint_and_can_be_repeated(finished, tmp_path):
    whole = contents(finished)

    def clean(output):
        return main(["clean", str(output)])

    copied = shutil.copytree(finished, tmp_path / "copied")
    steps = run_in_child(lambda: clean(copied), tmp_path / "report.json").steps
    assert len(steps) > 5
    for kill in kills(steps):
        output = shutil.copytree(finished, tmp_path / f"{kill.step}-{kill.moment}")
        run_in_child(lambda: clean(output), tmp_path / "report.json", kill=kill)  # noqa: B023
        assert contents(output) == whole
        # if the lock was the last to go, there is nothing left to do
        assert clean(output) in (0, 2)
        assert not (output / ".ream-stream").exists()
