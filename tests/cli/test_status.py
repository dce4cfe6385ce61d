"""The verb `status`."""

from command_line import call


def test_status_of_a_finished_run_and_of_none(capsys, finished, tmp_path):
    status, out, _ = call(capsys, "status", finished)
    assert status == 0
    assert "complete" in out
    assert "3 of 3 committed" in out
    assert call(capsys, "status", tmp_path)[0] == 2
