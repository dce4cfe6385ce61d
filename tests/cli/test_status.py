"""The verb `status`."""

import json
import shutil

from command_line import call


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
