"""Runs killed at every durable step, resumed, and compared byte for byte with a clean one."""

import dataclasses
import itertools
import shutil
from contextlib import contextmanager

import pytest
import torch
from crash import (
    JobFailedError,
    Kill,
    digests,
    kills,
    overwritten,
    run_in_child,
    unsynced,
)
from killed_runs import (
    BATCH,
    SEQUENCES,
    VARIANTS,
    WORK,
    Runs,
    check_what_is_left,
    write_mtp_source,
)

from ream_stream import files as durable
from ream_stream.__main__ import main
from ream_stream.checkpoint.reader import INDEX
from ream_stream.compression import layer, pipeline
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import OtherRunError, ReamStreamError
from ream_stream.model import hidden_states

pytestmark = pytest.mark.crash


@pytest.fixture(scope="module")
def finished(crash_source, tmp_path_factory):
    """Return runs and control of a variant, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            of = write_mtp_source(folder / "source") if name == "mtp" else crash_source
            runs = Runs(of, VARIANTS[name], folder)
            made[name] = runs, runs.control()
        return made[name]

    return get


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_killed_anywhere_resumes_to_the_same_bytes(name, finished):
    runs, control = finished(name)
    points = kills(control.ending.steps, thin=True)
    if name == "mtp":  # the steps of that layer
        last = runs.plan.layers[-1].shards[0].name
        first = next(n for n, s in enumerate(control.ending.steps) if last in s.path)
        points = [kill for kill in points if kill.step >= first]
    # more of them for one variant; the others take the same steps with other numbers
    every = {"ream": 8, "mtp": 25, "refit-trajectory": 40}
    for kill in points[:: every.get(name, 24)]:
        runs.check_killed_and_resumed(control, kill)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_killed_at_any_piece_of_any_file_resumes_to_the_same_bytes(name, part, finished):
    runs, control = finished(name)
    # the others take the same steps with other numbers: pieces of a file are taken together
    points = kills(control.ending.steps, thin=name != "ream")
    points = points[:: 1 if name in {"ream", "refit"} else 3]
    for kill in points[part::4]:
        runs.check_killed_and_resumed(control, kill)


def test_a_resume_that_is_killed_too_resumes_to_the_same_bytes(finished, tmp_path):
    runs, control = finished("ream")
    points = kills(control.ending.steps, thin=True)
    for first, second in zip(points[5::11], itertools.cycle(points[3::17]), strict=False):
        output = tmp_path / f"{first.step}-{second.step}"
        runs.run(output, first)
        runs.run(output, second)
        check_what_is_left(output, control)
        runs.run(output)
        assert digests(output) == control.output, f"{first} then {second}"


def test_every_file_is_synced_before_its_rename_and_the_folder_after(finished):
    for name in VARIANTS:
        assert list(unsynced(finished(name)[1].ending.steps)) == []


def test_what_the_journal_names_is_never_changed(finished):
    for name in VARIANTS:
        steps = finished(name)[1].ending.steps
        assert list(overwritten(steps)) == []
        assert any(step.committed for step in steps)


def test_a_finished_run_has_nothing_left_to_do(finished):
    runs, control = finished("ream")
    again = runs.run(runs.folder / "control")
    assert [step for step in again.steps if step.kind != "sync" and not step.idle] == []
    assert digests(runs.folder / "control") == control.output


def test_a_resume_with_less_memory_gives_the_same_bytes(crash_source, finished, tmp_path):
    runs, control = finished("ream")
    poor = Runs(crash_source, VARIANTS["ream"], tmp_path)
    assert poor.plan.memory["attention outputs"] > 0
    # attention is then computed twice instead of kept, as under a small --ram
    memory = {**poor.plan.memory, "attention outputs": 0}
    poor.plan = dataclasses.replace(poor.plan, memory=memory)
    runs.run(tmp_path / "output", step_of(control, "replace", "hidden-00001"))
    poor.run(tmp_path / "output")
    assert digests(tmp_path / "output") == control.output


def test_foreign_files_stay_and_strays_of_ours_go(finished, tmp_path):
    runs, control = finished("ream")
    foreign = [
        "notes.txt",
        "notes.partial",
        "model-00001-of-00002.safetensors",
        f"{WORK}/hidden-notes",
        f"{WORK}/hidden-00001.old",
        f"{WORK}/statistics-all.csv",
        f"{WORK}/journal.json.partial.mine",
    ]
    ours = [
        "config.json.partial",
        f"{WORK}/hidden-00001",
        f"{WORK}/hidden-00003.partial",
        f"{WORK}/journal.json.partial",
        f"{WORK}/statistics-00002.safetensors",
    ]
    output = tmp_path / "output"
    runs.run(output, step_of(control, "remove_empty", "hidden-00001", last=True))
    for name in foreign + ours:
        (output / name).write_text("by hand")
    runs.run(output)
    for name in foreign:
        assert (output / name).read_text() == "by hand", name
        (output / name).unlink()
    assert digests(output) == control.output


def test_a_folder_with_other_files_is_refused_and_left_alone(finished, tmp_path):
    runs, _ = finished("ream")
    (tmp_path / "thesis.tex").write_text("by hand")
    with pytest.raises(JobFailedError, match=f"{OtherRunError.__name__}.*thesis.tex"):
        runs.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_boundaries_are_on_disk_at_most_and_the_plan_has_room_for_all(finished, tmp_path):
    runs, _ = finished("ream")
    workspace = Workspace(output=tmp_path / "output", work=tmp_path / "work")
    most_boundaries = most_bytes = 0

    def job():
        def report(_event):
            nonlocal most_boundaries, most_bytes
            most_boundaries = max(most_boundaries, len(list(workspace.data.glob("hidden-*"))))
            files = [
                *workspace.output.glob("*.safetensors"),
                *workspace.data.rglob("c/*/*/*"),
            ]
            most_bytes = max(most_bytes, sum(path.stat().st_size for path in files))

        with workspace.locked():
            compress(
                runs.plan,
                runs.tokens,
                workspace,
                device=torch.device("cpu"),
                report=report,
            )
        return most_boundaries, most_bytes

    boundaries, num_bytes = run_in_child(job, tmp_path / "report.json").value
    assert boundaries == 2
    # a last batch that is not full takes a whole chunk, and each chunk has its checksum
    chunks = 2 * runs.plan.num_batches
    row = runs.plan.hidden_bytes // SEQUENCES
    assert num_bytes <= runs.plan.disk_bytes + chunks * 4 + 2 * row


def test_a_run_can_be_discarded_for_another_even_if_that_is_killed(finished, tmp_path):
    old, control = finished("ream")
    new, wanted = finished("prune")

    def discard(output):
        workspace = Workspace(output=output, work=output / WORK)
        with workspace.locked():
            workspace.discard()

    template = old.folder / "control"
    copy = tmp_path / "copy"
    shutil.copytree(template, copy)
    steps = run_in_child(lambda: discard(copy), tmp_path / "report.json").steps
    assert {path.name for path in copy.rglob("*")} == {WORK, "lock"}
    for kill in kills(steps)[::3]:
        output = tmp_path / str(kill.step)
        shutil.copytree(template, output)
        (output / WORK / "mine.txt").write_text("by hand")
        run_in_child(lambda: discard(output), tmp_path / "report.json", kill=kill)  # noqa: B023
        check_what_is_left(output, control)
        run_in_child(lambda: discard(output), tmp_path / "report.json")  # noqa: B023
        assert (output / WORK / "mine.txt").read_text() == "by hand"
        (output / WORK / "mine.txt").unlink()
        new.run(output)
        assert digests(output) == wanted.output


def test_a_run_with_its_work_folder_elsewhere_is_killed_begins_and_goes_on_the_same_way(
    finished, tmp_path
):
    runs, control = finished("ream")

    def place(name):
        folder = tmp_path / str(name)
        return Workspace(output=folder / "out", work=folder / "work")

    def do(workspace, act, kill=None):
        return run_in_child(lambda: act(workspace), tmp_path / "report.json", kill=kill)

    def clean(workspace):
        words = ["clean", str(workspace.output), "--work-dir", str(workspace.work), "--force"]
        return main(words)

    def discard(workspace):
        with workspace.locked():
            workspace.discard()

    whole = place("whole")
    steps = do(whole, lambda place: bool(runs._job(place))).steps
    begun = next(n for n, s in enumerate(steps) if s.path == str(whole.journal))
    for kill in kills(steps, thin=True)[::40] + kills(steps[: begun + 2])[::2]:
        killed = place(f"{kill.step}-{kill.moment}")
        do(killed, runs._job, kill)
        do(killed, runs._job)
        found = {n: d for n, d in digests(killed.output).items() if not n.startswith(WORK)}
        assert found == {n: d for n, d in control.output.items() if not n.startswith(WORK)}
        assert digests(killed.work) == digests(whole.work)
        shutil.rmtree(killed.output.parent)
    # moved, and where it was nothing is left
    template = shutil.move(whole.output.parent, tmp_path / "moved")
    for act in (clean, discard):
        copy = place(act.__name__)
        shutil.copytree(template, copy.output.parent)
        steps = do(copy, act).steps
        for kill in kills(steps)[::3]:
            killed = place(f"{act.__name__}-{kill.step}-{kill.moment}")
            shutil.copytree(template, killed.output.parent)
            do(killed, act, kill)
            do(killed, act)
            assert digests(killed.output.parent) == digests(copy.output.parent), kill
        if act is discard:
            do(copy, runs._job)
            assert digests(copy.work) == digests(template / "work")


def delete_hidden_before_the_commit(monkeypatch):
    save = Workspace.save

    def hasty(workspace, journal):
        if journal.layers:
            durable.remove(workspace.hidden(journal.layers[-1].index))
        save(workspace, journal)

    monkeypatch.setattr(Workspace, "save", hasty)


def commit_before_the_data(monkeypatch):
    save, publish, late = Workspace.save, hidden_states.HiddenWriter.publish, []

    def first(workspace, journal):
        save(workspace, journal)
        while late:
            publish(late.pop())

    monkeypatch.setattr(hidden_states.HiddenWriter, "publish", lambda self: late.append(self))
    monkeypatch.setattr(Workspace, "save", first)


def sync_nothing(monkeypatch):
    monkeypatch.setattr(durable, "_sync", lambda _: None)


def sync_no_folder(monkeypatch):
    monkeypatch.setattr(durable, "_sync_directory", lambda _: None)


def sync_no_chunk(monkeypatch):
    def unsynced(partial, path, **_):
        durable._publish(partial, path)

    monkeypatch.setattr(durable, "publish_directory", unsynced)


def write_in_place(monkeypatch):
    @contextmanager
    def in_place(path, _partial):
        with path.open("wb") as file:
            yield file
            file.flush()
            durable._sync(file.fileno())

    monkeypatch.setattr(durable, "_partial", in_place)


def redo_the_last_layer(monkeypatch):
    begun = Workspace.begun

    def forgetful(workspace):
        journal = begun(workspace)
        if journal is not None:
            del journal.layers[-1:]
        return journal

    monkeypatch.setattr(Workspace, "begun", forgetful)


def keep_strays(monkeypatch):
    monkeypatch.setattr(Workspace, "remove_strays", lambda *_: None)


def keep_all_boundaries_in_one_store(monkeypatch):
    remove = durable.remove

    def publish(writer):
        remove(writer._path)
        durable.publish_directory(writer._partial, writer._path)

    monkeypatch.setattr(Workspace, "hidden", lambda self, _: self.work / "hidden-00000")
    monkeypatch.setattr(hidden_states.HiddenWriter, "publish", publish)
    monkeypatch.setattr(
        durable, "remove", lambda path: path.name == "hidden-00000" or remove(path)
    )


def write_the_index_early(monkeypatch):
    write_rest = pipeline.write_rest
    finish = pipeline._finish

    def early(plan, tokens, workspace, journal):
        write_rest(plan, tokens, workspace, journal)
        finish(plan, tokens, workspace, journal)

    monkeypatch.setattr(pipeline, "_finish", early)


def go_on_with_the_wrong_boundary(monkeypatch):
    reader = layer.Context.hidden_reader

    def confused(self, boundary):
        stores = sorted(self.workspace.work.glob("hidden-0000?"))
        return hidden_of(self, stores[0]) if stores and boundary else reader(self, boundary)

    def hidden_of(context, path):
        plan = context.plan
        return hidden_states.HiddenStates(path, plan.hidden_shape, plan.dtype, BATCH)

    monkeypatch.setattr(layer.Context, "hidden_reader", confused)
    monkeypatch.setattr(Workspace, "remove_strays", lambda *_: None)


SLOW = pytest.mark.slow
FAULTS = [
    (delete_hidden_before_the_commit, "", "while the journal names"),
    (commit_before_the_data, "", "while the journal names"),
    (sync_nothing, "", "was not synced before the rename"),
    (sync_no_folder, "", "was not synced after the rename"),
    pytest.param(sync_no_chunk, "", "was not synced before the rename", marks=SLOW),
    pytest.param(
        write_in_place, "model-00001", "is under its final name, not whole", marks=SLOW
    ),
    (write_in_place, "journal.json", "is damaged"),
    (redo_the_last_layer, "model-00003", "written again after"),
    (keep_strays, "journal.json", "other bytes"),
    pytest.param(keep_all_boundaries_in_one_store, "", "while the journal names", marks=SLOW),
    (write_the_index_early, INDEX, "which its index names"),
    pytest.param(go_on_with_the_wrong_boundary, "journal.json", "other bytes", marks=SLOW),
]
"""What is planted, the steps at which kills show it, and what is then said."""


@pytest.mark.parametrize(("plant", "near", "seen"), FAULTS)
def test_a_planted_fault_is_seen(plant, near, seen, crash_source, finished, tmp_path):
    control = finished("ream")[1]
    faulty = Runs(crash_source, VARIANTS["ream"], tmp_path, patch=plant)
    assert any(seen in told for told in complaints(faulty, control, near))


def complaints(runs, control, near):
    """Yield what the tests above find wrong with a run."""
    steps = runs.control().ending.steps
    yield from unsynced(steps)
    yield from overwritten(steps)
    for kill in kills(steps, thin=True):
        if near in steps[kill.step].path:
            try:
                runs.check_killed_and_resumed(control, kill)
            except (AssertionError, ReamStreamError) as error:
                yield str(error)


def step_of(control, kind, name, *, last=False):
    """Return the kill after the first or last step of a kind on a path with this name in it."""
    steps = control.ending.steps
    numbers = [
        i for i, s in enumerate(steps) if s.kind == kind and name in s.path and not s.idle
    ]
    return Kill(numbers[-1 if last else 0], "after")
