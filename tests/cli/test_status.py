"""The verb `status`."""

import io
import json
import re
import shutil
from contextlib import ExitStack

from command_line import call
from rich.console import Console

from ream_stream.cli.status import follow, gather
from ream_stream.compression.workspace import workspace_of


def test_status_of_a_finished_run_and_of_none(capsys, finished, tmp_path):
    status, out, _ = call(capsys, "status", finished)
    assert status == 0
    assert "complete" in out
    assert "3 of 3 committed" in out
    assert call(capsys, "status", tmp_path)[0] == 2


def test_status_of_an_output_without_work_files_tells_its_manifest(capsys, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "output")
    before = json.loads(call(capsys, "status", output, "--json")[1])
    assert call(capsys, "clean", output)[0] == 0
    after = json.loads(call(capsys, "status", output, "--json")[1])
    assert (before["is_cleaned"], after["is_cleaned"]) == (False, True)
    assert (after["state"], after["written_bytes"]) == ("complete", before["written_bytes"])
    _, out, _ = call(capsys, "status", output)
    assert "all; its work files were removed" in out


def test_status_watches_a_run_until_it_ends(capsys, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "output")
    manifest = output / "ream_stream.json"
    whole = manifest.read_bytes()
    manifest.unlink()  # as before the end of a run
    workspace, file, states = workspace_of(output, None), io.StringIO(), []

    with ExitStack() as stack:
        stack.enter_context(workspace.locked())

        def pause(_seconds):
            states.append(gather(workspace)["state"])
            if len(states) == 2:
                stack.close()
                manifest.write_bytes(whole)

        known = follow(workspace, Console(file=file, width=200), pause)
    assert (states, known["state"]) == (["running", "running"], "complete")
    # nothing changed between the two looks
    (line,) = file.getvalue().splitlines()
    assert re.match(r"\d\d:\d\d:\d\d  3 of 3 committed  ", line)


def test_watching_what_does_not_run_shows_it_once(capsys, finished):
    shown = call(capsys, "status", finished)
    assert call(capsys, "status", finished, "--watch") == shown
