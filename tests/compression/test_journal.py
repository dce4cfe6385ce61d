import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ream_stream import files
from ream_stream.compression import journal
from ream_stream.compression.journal import Journal, LayerRecord
from ream_stream.compression.workspace import DATA, HOME, Workspace
from ream_stream.errors import DamagedError, OtherRunError
from ream_stream.files import Written
from ream_stream.planning.schedule import Schedule, Solver

NAMES = st.text("abc-.", min_size=1).filter(lambda name: name.strip("."))
FILES = st.builds(
    Written, name=NAMES, size=st.integers(0, 1 << 50), sha256=st.text("0123456789abcdef")
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LAYERS = st.builds(
    LayerRecord,
    index=st.integers(0, 99),
    shards=st.lists(FILES, max_size=3).map(tuple),
    hidden=st.none() | NAMES,
    statistics=st.none() | FILES,
    saliency=st.none() | st.lists(FLOATS, max_size=4).map(tuple),
    groups=st.none() | st.lists(st.lists(st.integers(0, 9), min_size=1).map(tuple)).map(tuple),
)
FIELDS = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text())
OURS = json.dumps({"format": journal.FORMAT})
NUMBERS = st.integers(0, 99)
SCHEDULES = st.builds(
    Schedule,
    batch_sequences=NUMBERS,
    expert_blocks=NUMBERS,
    resident_experts=NUMBERS,
    solver=st.builds(Solver, gathered=st.booleans(), column_blocks=NUMBERS),
    threads=NUMBERS,
)
SCHEDULE = Schedule(
    batch_sequences=4,
    expert_blocks=1,
    resident_experts=0,
    solver=Solver(preconditioner="blocks", gathered=False, column_blocks=1),
    threads=1,
)
JOURNALS = st.builds(
    Journal,
    fingerprint=FIELDS,
    schedule=SCHEDULES,
    files=st.lists(NAMES).map(tuple),
    layers=st.lists(LAYERS, max_size=3),
    outside=st.lists(FILES, max_size=3),
)


@pytest.fixture
def workspace(tmp_path):
    made = Workspace(output=tmp_path / "output", work=tmp_path / "output" / ".ream-stream")
    files.make_directory(made.work)
    return made


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    made = Workspace(output=folder, work=folder / HOME)
    files.make_directory(made.work)
    return made


@given(JOURNALS)
def test_what_is_saved_is_what_is_loaded(scratch, written):
    journal.save(scratch.journal, written)
    assert journal.load(scratch.journal) == written


def committed(workspace):
    """Return a journal of one layer, with the files it names."""
    shard = files.write_bytes(workspace.output / "model-00001-of-00001.safetensors", b"1234")
    statistics = files.write_bytes(workspace.statistics(0), b"12")
    record = LayerRecord(
        index=0, shards=(shard,), hidden=None, statistics=statistics, saliency=None, groups=None
    )
    return Journal(
        fingerprint={"seed": 0},
        schedule=SCHEDULE,
        files=(shard.name, "config.json"),
        layers=[record],
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", OURS, OURS[:-1] + ', "layers": 3}', '"text"', "\0\0"],
)
def test_a_damaged_journal_is_named_and_nothing_is_deleted(text, workspace):
    committed(workspace)
    workspace.journal.write_text(text, encoding="utf-8")
    before = sorted(path.name for path in workspace.output.rglob("*"))
    for attempt in (lambda: journal.load(workspace.journal), workspace.discard):
        with pytest.raises(DamagedError, match=r"journal\.json is damaged"):
            attempt()
    assert sorted(path.name for path in workspace.output.rglob("*")) == before


def test_a_journal_that_names_files_elsewhere_is_damaged(workspace):
    thesis = workspace.output.parent / "thesis.tex"
    thesis.write_text("by hand")
    journal.save(workspace.journal, replace(committed(workspace), files=("../thesis.tex",)))
    with pytest.raises(DamagedError, match="outside the folder"):
        workspace.discard()
    assert thesis.exists()


def test_a_journal_of_another_format_is_another_program_s(workspace):
    workspace.journal.write_text('{"format": 999}')
    with pytest.raises(OtherRunError, match="format 999"):
        journal.load(workspace.journal)


def test_other_settings_are_refused_with_the_fields_that_differ():
    begun = Journal(fingerprint={"seed": 0, "experts": 6, "version": "1"}, schedule=SCHEDULE)
    journal.check_fingerprint(begun, dict(begun.fingerprint), "out")
    wanted = {"seed": 1, "experts": 6, "calibration": "ab"}
    with pytest.raises(OtherRunError) as caught:
        journal.check_fingerprint(begun, wanted, "out")
    message = str(caught.value)
    assert "seed: 0 then, 1 now" in message
    assert "version: '1' then, None now" in message
    assert "calibration: None then, 'ab' now" in message
    assert "experts" not in message


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "statistics-00000"])
def test_a_committed_file_that_is_missing_or_cut_is_damaged(name, workspace):
    saved = committed(workspace)
    workspace.check_committed(saved)
    path = next(workspace.output.rglob(f"{name}*"))
    path.write_bytes(b"1")
    with pytest.raises(DamagedError, match=rf"{name}.* has 1 bytes, the journal says \d bytes"):
        workspace.check_committed(saved)
    path.unlink()
    with pytest.raises(DamagedError, match=f"{name}.* is missing"):
        workspace.check_committed(saved)


def test_an_output_folder_that_is_a_file_or_not_empty_is_refused_before_the_first_write(
    tmp_path,
):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("by hand")
    for output in (tmp_path, thesis):
        workspace = Workspace(output=output, work=output / ".ream-stream")
        with pytest.raises(OtherRunError, match=r"thesis\.tex"), workspace.locked():
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_work_may_lie_in_a_folder_with_other_things_which_stay(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "results.csv").write_text("by hand")
    (scratch / "log.txt").write_text("by hand")
    workspace = Workspace(output=tmp_path / "output", work=scratch)
    with workspace.locked():
        saved = committed(workspace)
        workspace.claim(saved)
        workspace.hidden(1).mkdir()
        (workspace.output / "config.json.partial").write_text("{")
        workspace.remove_strays(saved)
        assert not workspace.hidden(1).exists()
        assert {path.name for path in workspace.output.iterdir()} == {saved.files[0], HOME}
        workspace.discard()
    assert {path.name for path in workspace.output.rglob("*")} == {HOME, "lock"}
    left = {path.name for path in scratch.rglob("*")}
    assert left == {"results.csv", "log.txt", DATA, "lock"}


def test_discarding_takes_the_folders_it_made_and_leaves_those_with_other_things(workspace):
    made = ("a/b/one.jinja", "a/two.jinja", "c/three.jinja")
    for name in [*made, "c/notes.txt"]:
        (workspace.output / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace.output / name).write_text("text")
    begun = replace(committed(workspace), layers=[], files=(*made, "model.safetensors"))
    workspace.claim(begun)
    for record in (begun, replace(begun, files=made)):
        journal.save(workspace.journal, record)
        if record is begun:
            # what is written last is there, and a shard is not
            with pytest.raises(OtherRunError, match=r"one\.jinja is not of the run"):
                workspace.discard()
            assert (workspace.output / made[0]).exists()
    workspace.discard()
    assert not (workspace.output / "a").exists()
    assert [path.name for path in (workspace.output / "c").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a/../b", "../a", "a//b", "a/", "./a"])
def test_a_journal_that_names_a_file_in_an_unusual_way_is_not_believed(workspace, name):
    journal.save(workspace.journal, replace(committed(workspace), files=(name,)))
    with pytest.raises(DamagedError, match="outside the folder"):
        journal.load(workspace.journal)


def test_the_journal_is_a_document_people_can_read(workspace):
    journal.save(workspace.journal, committed(workspace))
    text = workspace.journal.read_text(encoding="utf-8")
    assert json.loads(text)["layers"][0]["shards"][0]["size"] == 4
    assert text.startswith(f'{{\n  "format": {journal.FORMAT},\n')


@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_journal_with_a_changed_byte_is_refused_or_says_the_same(scratch, position, value):
    written = committed(scratch)
    journal.save(scratch.journal, written)
    data = bytearray(scratch.journal.read_bytes())
    data[position % len(data)] = value
    scratch.journal.write_bytes(data)
    try:
        loaded = journal.load(scratch.journal)
    except (DamagedError, OtherRunError):
        return
    assert loaded == written
