"""Runs on file systems that are really full: exit 12, the file named, the same bytes after."""

import contextlib
import io
import os
import re
import resource
from pathlib import Path

import pytest
from command_line import words_of
from crash import digests, run_in_child

from ream_stream import files
from ream_stream.__main__ import main
from ream_stream.compression import event_log, file_lock
from ream_stream.errors import OverBudgetError
from ream_stream.events import LayerDone, Started

PAGE = 4096


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, checkpoints):
    """Return what makes the words of a run, and the files of one that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = words_of(checkpoints("olmoe"), folder)
    assert main(words(folder / "out")) == 0
    return words, digests(folder / "out")


def fill(disk, *, but):
    """Take all room of a disk but some pages."""
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - but * PAGE)


def check_named(text, output):
    """Look for the file that the last error is about."""
    found = re.search(
        r"no space left for (\S+) \((No space left on device|File too large)\)", text
    )
    assert found is not None, text[-500:]
    assert Path(found[1]).is_relative_to(output)


@pytest.mark.parametrize(("layer", "pages"), [(-1, 0), (-1, 4), (0, 0), (0, 9), (1, 1), (2, 2)])
def test_a_disk_that_fills_up_ends_the_run_by_name_and_it_goes_on_to_the_same_bytes(
    layer, pages, mounted, undisturbed, monkeypatch, capsys
):
    words, wanted = undisturbed
    disk, show = mounted("size=1m"), event_log.Log.show

    def tell(log, event):
        at = event.layer if isinstance(event, LayerDone) else -1
        if at == layer and isinstance(event, LayerDone | Started):
            fill(disk, but=pages)
        show(log, event)

    with monkeypatch.context() as patch:
        patch.setattr(event_log.Log, "show", tell)
        assert main(words(disk / "out")) == 12
    check_named(capsys.readouterr().err, disk / "out")
    (disk / "ballast").unlink()
    assert main(words(disk / "out")) == 0
    assert digests(disk / "out") == wanted


@pytest.mark.parametrize("most", [400, 3000, 5000, 30_000])
def test_files_that_may_not_grow_end_the_run_by_name_and_it_goes_on_to_the_same_bytes(
    most, undisturbed, tmp_path
):
    words, wanted = undisturbed

    def limited():
        # the system refuses what is longer; what the run says goes elsewhere
        with contextlib.redirect_stderr(io.StringIO()) as said:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            status = main(words(tmp_path / "out"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, resource.RLIM_INFINITY))
        return status, said.getvalue()

    status, said = run_in_child(limited, tmp_path / "report.json").value
    assert status == 12
    check_named(said, tmp_path / "out")
    assert main(words(tmp_path / "out")) == 0
    assert digests(tmp_path / "out") == wanted


def test_an_error_of_a_close_does_not_hide_the_first(tmp_path):
    descriptor = os.open("/dev/full", os.O_WRONLY)

    def lines():
        with files.open_log(tmp_path / "log.jsonl", tmp_path / "older") as file:
            os.dup2(descriptor, file.fileno())
            files.append(file, "a line\n")

    with pytest.raises(OverBudgetError, match=r"log\.jsonl \(No space"):
        lines()
    with pytest.raises(OverBudgetError, match="first"), file_lock.lock(tmp_path / "lock"):
        raise OverBudgetError("first")
    os.close(descriptor)


def test_a_line_that_a_full_disk_cut_does_not_spoil_the_next(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "cut')
    with files.open_log(log, tmp_path / "older") as file:
        files.append(file, '{"event": "next"}\n')
    assert log.read_text().splitlines() == ['{"event": "cut', '{"event": "next"}']
