"""Whose the folders of a run are: what is refused, what goes on, and what stays."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import words_of
from reports import when_a_layer_is_committed
from safetensors.torch import save_file
from tiny_runs import SCHEDULE

from ream_stream.__main__ import main
from ream_stream.compression.journal import Journal, LayerRecord
from ream_stream.compression.workspace import DATA, HOME, Workspace, workspace_of
from ream_stream.errors import DamagedError, InterruptedRunError, OtherRunError, UsageError
from ream_stream.file_access import open_regular
from ream_stream.files import write_bytes


def begin(output, work, *, layers=1):
    """Make the folders of a run of two layers and a config, killed after some layers."""
    workspace = workspace_of(output, work)
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    with workspace.locked():
        journal = Journal(fingerprint={}, schedule=SCHEDULE, files=(*shards, "config.json"))
        workspace.claim(journal)
        for index in range(layers):
            shard = write_bytes(workspace.output / shards[index], bytes(100 + index))
            sums = write_bytes(workspace.statistics(index), b"sums")
            journal.layers.append(
                LayerRecord(
                    index=index, shards=(shard,), hidden=None, statistics=sums,
                    saliency=None, groups=None,
                )
            )  # fmt: skip
            workspace.save(journal)
    return workspace


def precious(folder):
    """Make a checkpoint of somebody that has the names of the run's files."""
    folder.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_bytes(bytes(7))
    (folder / "config.json").write_text("{}")
    return folder


def contents(folder):
    """Return every file below a folder with its bytes, locks aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != "lock"
    }


@pytest.fixture
def words(tmp_path, checkpoints):
    return words_of(checkpoints("olmoe"), tmp_path)


@pytest.mark.parametrize("restart", [False, True])
def test_a_work_folder_of_another_output_destroys_nothing(tmp_path, words, restart, capsys):
    assert main(words(tmp_path / "out", "--work-dir", tmp_path / "w")) == 0
    output = precious(tmp_path / "precious")
    before = contents(tmp_path)
    more = ["--restart"] if restart else []
    assert main(words(output, "--work-dir", tmp_path / "w", *more)) == 11
    told = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "w") in told
    assert str(tmp_path / "out") in told
    for verb in (["clean", "--force"], ["clean"], ["status"]):
        status = main([verb[0], str(output), "--work-dir", str(tmp_path / "w"), *verb[1:]])
        assert status == 11, verb
    assert contents(tmp_path) == before


def test_a_new_output_is_not_begun_with_the_work_folder_of_another(tmp_path):
    begin(tmp_path / "out", tmp_path / "w")
    before = contents(tmp_path)
    other = workspace_of(tmp_path / "new", tmp_path / "w")
    for attempt in (other.begun, other.discard, lambda: other.locked().__enter__()):
        with pytest.raises(OtherRunError, match=r"w holds the run of '.*out', not of .*new"):
            attempt()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("work", [None, "w"])
def test_a_run_whose_folders_were_moved_is_still_its_own(tmp_path, work):
    began = begin(tmp_path / "a" / "out", work and tmp_path / "a" / work)
    saved = began.begun()
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    for place in ("b", "c"):
        moved = workspace_of(tmp_path / place / "out", work and tmp_path / place / work)
        assert moved.begun() == saved
        moved.claim(moved.begun())
        assert moved.begun().output == str(tmp_path / place / "out")
        moved.check_committed(moved.begun())


def test_an_output_and_its_work_folder_may_be_moved_apart(tmp_path):
    saved = begin(tmp_path / "out", tmp_path / "w").begun()
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "w").rename(tmp_path / "elsewhere")
    assert workspace_of(tmp_path / "moved", tmp_path / "elsewhere").begun() == saved


def test_a_work_folder_put_into_a_foreign_checkpoint_is_refused(tmp_path):
    began = begin(tmp_path / "out", None)
    output = precious(tmp_path / "precious")
    shutil.move(began.home, output / HOME)
    before = contents(output)
    foreign = workspace_of(output, None)
    for attempt in (foreign.begun, foreign.discard):
        with pytest.raises(OtherRunError, match="not of the run"):
            attempt()
    (output / "config.json").unlink()
    with pytest.raises(OtherRunError, match="should have 100 bytes and has 7"):
        foreign.discard()
    (output / "config.json").write_text("{}")
    assert contents(output) == before


def test_an_output_that_was_deleted_can_be_begun_again_and_nothing_else_there(tmp_path):
    began = begin(tmp_path / "out", tmp_path / "w")
    shutil.rmtree(tmp_path / "out")
    journal = began.begun()
    with pytest.raises(DamagedError, match=r"model-00001.* is missing"):
        began.check_committed(journal)
    precious(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(OtherRunError, match="holds the run of"):
        began.discard()
    assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / "out")
    with began.locked():
        began.discard()
    assert began.begun() is None
    assert not began.has_journal()


def test_a_marker_without_a_journal_may_be_begun_and_one_of_another_folder_says_which(tmp_path):
    began = begin(tmp_path / "out", tmp_path / "w")
    # the run is in w, and was asked for without
    for work in (None, tmp_path / "other"):
        with pytest.raises(OtherRunError, match=r"has its work folder in '.*w'"):
            workspace_of(tmp_path / "out", work).begun()
    assert main(["status", str(tmp_path / "out")]) == 2
    began.journal.unlink()
    began.statistics(0).unlink()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").unlink()
    assert began.begun() is None
    begin(tmp_path / "out", tmp_path / "w")
    inner = begin(tmp_path / "in", None)
    with pytest.raises(OtherRunError, match="has its work folder in"):
        workspace_of(inner.output, tmp_path / "other").begun()


def test_two_copies_with_one_work_folder_go_on_one_after_the_other_and_lose_nothing(tmp_path):
    began = begin(tmp_path / "out", tmp_path / "w")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    copy = workspace_of(tmp_path / "copy", tmp_path / "w")
    with copy.locked():
        with pytest.raises(OtherRunError, match="in use by process"), began.locked():
            pass
        copy.claim(copy.begun())
        copy.discard()
        copy.claim(Journal(fingerprint={}, schedule=SCHEDULE, files=("config.json",)))
    with pytest.raises(OtherRunError, match="holds the run of"):
        began.discard()
    assert (tmp_path / "out" / "model-00001-of-00002.safetensors").stat().st_size == 100


NAMES = [
    "tokens.safetensors", "hidden-00001", "hidden-00001.partial", "streamed", "log.jsonl",
    "log.1.jsonl", "lock", "run.json", "statistics-00000.safetensors", "scratch-mixer-0",
    "journal.json.partial", "original-00002", HOME,
]  # fmt: skip


def test_files_of_a_user_in_a_work_folder_survive_whatever_their_names(tmp_path, words):
    work, output = tmp_path / "w", tmp_path / "out"
    work.mkdir()
    for number, name in enumerate(NAMES):
        if number % 2:
            (work / name).mkdir()
        (work / name / "mine" if number % 2 else work / name).write_text("mine")
    before = contents(work)
    assert main(words(output, "--work-dir", work)) == 0
    assert {name: data for name, data in contents(work).items() if name in before} == before
    assert main(words(output, "--work-dir", work, "--restart")) == 0
    assert main(["clean", str(output), "--work-dir", str(work)]) == 0
    assert contents(work) == before
    assert not (output / HOME).exists()


def test_a_journal_of_another_program_is_refused_and_stays(tmp_path, words):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "journal.json").write_text('{"dear": "diary"}')
    before = contents(tmp_path)
    for more in ([], ["--restart"]):
        assert main(words(tmp_path / "out", "--work-dir", tmp_path / "w", *more)) == 11
    assert contents(tmp_path) == before


@pytest.mark.parametrize("work", ["out", "out/work", "out/a/b", "link", "link/work", "./out"])
def test_a_work_folder_in_the_output_is_refused_before_the_first_byte(
    tmp_path, words, work, monkeypatch
):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for given in (work, tmp_path / work):
        assert main(words("out", "--work-dir", given)) == 2
        assert contents(tmp_path) == before


def test_the_folders_of_a_run_may_lie_in_some_ways_and_not_in_others(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    made = workspace_of(tmp_path / "out", tmp_path / "out" / HOME, source)
    assert made == Workspace(output=tmp_path / "out", work=tmp_path / "out" / HOME)
    assert workspace_of(tmp_path / "w" / "out", tmp_path / "w", source).work == tmp_path / "w"
    for output, work in (
        ("w/" + DATA, "w"),
        (f"w/{DATA}/hidden-00001", "w"),
        ("w/journal.json", "w"),
        ("out", "source"),
        ("out", "source/work"),
        ("source/out", None),
        ("nowhere", None),
        ("out", "nowhere"),
    ):
        with pytest.raises(UsageError):
            workspace_of(tmp_path / output, work and tmp_path / work, source)


def test_links_that_a_user_gives_are_followed_and_others_are_not(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    began = begin(tmp_path / "link" / "out", tmp_path / "link" / "w")
    assert began.output == tmp_path / "disk" / "out"
    # a folder of ours became a link while nobody looked
    began.data.rename(tmp_path / "away")
    began.data.symlink_to(tmp_path / "away")
    before = contents(tmp_path / "away")
    for attempt in (began.begun, began.discard, began.clean, began.holder):
        with pytest.raises(OtherRunError, match="behind a link"):
            attempt()
    assert contents(tmp_path / "away") == before


KINDS = {
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to("/etc/hostname"),
    "a folder": os.mkdir,
    "a link to nowhere": lambda path: path.symlink_to("/nonexistent/file"),
}
PLACES = [
    "journal.json", "run.json", "log.jsonl", "statistics-00000.safetensors",
    "hidden-00001/zarr.json", "hidden-00001/c/0/0/0", "lock",
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, checkpoints):
    """Return a function that runs a command over a copy of a run of one layer."""
    folder = tmp_path_factory.mktemp("stopped")

    def interrupt():
        raise InterruptedRunError("stopped for the test")

    words = words_of(checkpoints("olmoe"), folder)
    with pytest.MonkeyPatch.context() as patch:
        when_a_layer_is_committed(patch, interrupt)
        assert main(words(folder / "out")) == 130
    return folder / "out", words


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in PLACES
        for kind in KINDS
        if name == "lock" or kind in list(KINDS)[:2]
    ],
)
def test_what_is_no_regular_file_is_refused_unread(tmp_path, kind, name, stopped, capsys):
    output = tmp_path / "out"
    shutil.copytree(stopped[0], output)
    (output / HOME / name).unlink()
    KINDS[kind](output / HOME / name)
    before = sorted(output.rglob("*"))
    assert main(stopped[1](output)) == 11
    assert f"{output / HOME / name} is {kind[:6].strip()}" in capsys.readouterr().err
    assert main(["status", str(output)]) in {0, 11}
    assert sorted(output.rglob("*")) == before
    assert main(["clean", "--force", str(output)]) in {0, 11}


def test_a_device_is_never_opened(monkeypatch):
    monkeypatch.setattr(os, "open", None)
    with pytest.raises(OtherRunError, match="/dev/zero is a device"):
        open_regular(Path("/dev/zero"))


def test_a_lock_with_another_name_is_not_written_to(tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("by hand")
    began = begin(tmp_path / "out", None)
    (began.home / "lock").unlink()
    (began.home / "lock").hardlink_to(thesis)
    with pytest.raises(OtherRunError, match="not a file of ours alone"), began.locked():
        pass
    assert thesis.read_text() == "by hand"


def test_a_restart_that_is_refused_deletes_nothing(tmp_path, stopped, capsys):
    output = tmp_path / "out"
    shutil.copytree(stopped[0], output)
    one = tmp_path / "one.safetensors"
    save_file({"input_ids": torch.arange(12).view(1, 12)}, one)
    before = contents(output)
    for more in (
        ["--experts", "99"],
        ["--calibration", str(tmp_path / "missing.jsonl")],
        ["--ram", "1MB"],
        ["--disk", "1kB"],
        ["--refit", "down"],
    ):
        words = [*stopped[1](output), *more, "--restart"]
        if "--refit" in more:
            words[words.index("--calibration") + 1] = str(one)
        assert main(words) in {2, 12}, more
        assert contents(output) == before, more
    assert "holds back" in capsys.readouterr().err
