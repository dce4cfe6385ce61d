"""A run is of one source: what it was begun with, and what it goes on with."""

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import split_by_layer
from tiny_runs import CPU, plan_for, settings, some_tokens

from ream_stream.checkpoint import other_files
from ream_stream.checkpoint.header import read_header
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression import source_record
from ream_stream.compression.journal import load
from ream_stream.compression.pipeline import compress
from ream_stream.compression.source_record import (
    SourceRecord,
    TensorDigests,
    in_order,
)
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import DamagedError, NumbersError, OtherRunError, UsageError
from ream_stream.events import LayerDone, Step

TOKENS = some_tokens()
FIRST, SECOND, LAST, REST = (f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4))
CARD = "---\nlicense: mit\n---\n"


@pytest.fixture(scope="module")
def original(checkpoints, tmp_path_factory):
    """A checkpoint with a shard a layer, a card and a folder of code."""
    folder = shutil.copytree(checkpoints("qwen3_moe"), tmp_path_factory.mktemp("it") / "model")
    split_by_layer(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "code").mkdir()
    (folder / "code" / "model.py").write_text("pass\n", encoding="utf-8")
    return folder


@pytest.fixture
def source(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(scope="module")
def control(original, tmp_path_factory):
    """The files of an undisturbed run."""
    output = tmp_path_factory.mktemp("control") / "output"
    go(original, output)
    return files(output)


class EnoughError(Exception):
    """Ends a run."""


def go(source, output, *, layers=None, during=None, **changes):
    """Run, or go on, until so many layers are committed; return the events.

    `during` is called when the first layer is.
    """
    plan = plan_for(source, TOKENS, settings())
    plan = replace(plan, source=replace(plan.source, **changes))
    workspace = Workspace(output=output, work=output / ".ream-stream")
    events = []

    def report(event):
        events.append(event)
        if during is not None and isinstance(event, LayerDone) and event.layer == 0:
            during()
        if isinstance(event, LayerDone) and event.layer + 1 == layers:
            raise EnoughError

    with workspace.locked(), suppress(EnoughError):
        compress(plan, TOKENS, workspace, device=CPU, report=report)
    return events


def files(output):
    """Return the bytes of the output's files, the work folder aside."""
    found = (path for path in output.rglob("*") if path.is_file())
    return {str(p.relative_to(output)): p.read_bytes() for p in found if ".ream" not in str(p)}


def committed(output):
    saved = load(Workspace(output=output, work=output / ".ream-stream").journal)
    return saved.layers, saved.outside


def other_weights(path):
    """Change the last bit of every number; the header stays."""
    tensors = {name: tensor.view(torch.int16) ^ 1 for name, tensor in load_file(path).items()}
    header = path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    save_file({n: t.view(torch.bfloat16) for n, t in tensors.items()}, path)
    data = path.read_bytes()
    path.write_bytes(header + data[8 + int.from_bytes(data[:8], "little") :])


def another_byte(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def other_text(path):
    path.write_text('{"is": "another"}', encoding="utf-8")


def gone(path):
    path.unlink()


CHANGES = {
    "other weights where a layer was read": (other_weights, FIRST, OtherRunError),
    "another byte where a layer was read": (another_byte, FIRST, OtherRunError),
    "other weights where nothing was read yet": (other_weights, LAST, OtherRunError),
    "other weights outside the layers": (other_weights, REST, OtherRunError),
    "another tokenizer": (other_text, "tokenizer.json", OtherRunError),
    "a tokenizer that is gone": (gone, "tokenizer.json", DamagedError),
    "other code": (other_text, "code/model.py", OtherRunError),
    "code that is gone": (gone, "code/model.py", DamagedError),
    "another card": (other_text, "README.md", OtherRunError),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_source_is_refused_and_the_right_one_goes_on_to_the_same_bytes(
    name, source, original, control, tmp_path
):
    change, file, kind = CHANGES[name]
    output = tmp_path / "output"
    go(source, output, layers=1)
    done = committed(output)
    change(source / file)
    with pytest.raises(kind, match=f"{file} (is not what the run|was there when)"):
        go(source, output)
    assert committed(output) == done
    shutil.copyfile(original / file, source / file)
    go(source, output)
    assert files(output) == control


@pytest.mark.parametrize("name", ["touched", "moved"])
def test_the_same_bytes_with_other_times_or_elsewhere_go_on_and_are_compared_once(
    name, source, control, tmp_path
):
    output = tmp_path / "output"
    go(source, output, layers=1)
    if name == "touched":
        os.utime(source / FIRST, ns=(0, 0))
    else:
        source = shutil.copytree(source, tmp_path / "elsewhere" / "model")
    compared = Step(layer=0, phase="check", done=1, total=1)
    assert go(source, output, layers=2)[0] == compared
    assert compared not in go(source, output)
    assert files(output) == control


def test_where_nothing_was_read_a_run_goes_on_as_one_from_the_beginning_would(
    source, control, tmp_path, monkeypatch
):
    monkeypatch.setattr(source_record, "BLOCK_BYTES", 16)
    go(source, tmp_path / "output", layers=1)
    # one byte before the last block of the sample
    data = bytearray((source / LAST).read_bytes())
    data[-18] ^= 1
    (source / LAST).write_bytes(data)
    go(source, tmp_path / "output")
    go(source, tmp_path / "whole")
    assert files(tmp_path / "output") == files(tmp_path / "whole") != control


def test_a_shard_that_holds_no_numbers_may_be_replaced(source, original, control, tmp_path):
    tensors = load_file(source / LAST)
    next(iter(tensors.values())).view(-1)[:] = float("nan")
    save_file(tensors, source / LAST)
    with pytest.raises(NumbersError, match=f"{LAST} holds NaN"):
        go(source, tmp_path / "output")
    shutil.copyfile(original / LAST, source / LAST)
    go(source, tmp_path / "output")
    assert files(tmp_path / "output") == control


def test_what_is_read_again_is_compared_even_where_size_and_times_are_the_same(
    source, tmp_path
):
    output = tmp_path / "output"
    go(source, output, layers=1)
    another_byte(source / REST)
    workspace = Workspace(output=output, work=output / ".ream-stream")
    saved = load(workspace.journal)
    saved.source = SourceRecord.of(open_checkpoint(source))  # times that lie
    workspace.save(saved)
    with pytest.raises(OtherRunError, match=f"{REST} is not what the run was begun with"):
        go(source, output)


def test_a_complete_output_is_not_taken_for_that_of_another_source(
    source, original, control, tmp_path
):
    output = tmp_path / "output"
    go(source, output)
    other_weights(source / SECOND)
    with pytest.raises(OtherRunError, match=SECOND):
        go(source, output)
    shutil.copyfile(original / SECOND, source / SECOND)
    assert go(source, output)[-1].already_complete
    assert files(output) == control


def test_another_commit_is_refused_and_named(source, control, tmp_path):
    output = tmp_path / "output"
    go(source, output, layers=1, commit="a" * 40)
    with pytest.raises(OtherRunError, match=f"commit {'a' * 40} .* now commit {'b' * 40}"):
        go(source, output, commit="b" * 40)
    go(source, output, commit="a" * 40)
    assert files(output) == control


def test_the_journal_has_the_digest_of_every_tensor_by_layer_and_file(source, tmp_path):
    output = tmp_path / "output"
    go(source, output)
    read = load(Workspace(output=output, work=output / ".ream-stream").journal).read
    for part, shard in {"0": FIRST, "1": SECOND, "2": LAST, "outside": REST}.items():
        data = (source / shard).read_bytes()
        body = data[8 + int.from_bytes(data[:8], "little") :]
        assert read[part] == {shard: hashlib.sha256(body).hexdigest()}


def test_digests_are_of_each_file_in_the_order_of_its_bytes(tmp_path):
    for name, start in (("one", 0), ("two", 100)):
        tensors = {f"{name}.{n}": torch.arange(start + n, start + n + 5) for n in range(3)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    entries = {}
    for path in tmp_path.iterdir():
        entries |= read_header(path)
    with TensorDigests(entries) as digests:
        for name in in_order(entries, entries):
            values = load_file(entries[name].path)[name]
            for block in values.split(2):
                digests.add(name, block)
        found = digests.result()
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        body = data[8 + int.from_bytes(data[:8], "little") :]
        assert found[path.name] == hashlib.sha256(body).hexdigest()


# What a file of the source may become after the plan


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def link_elsewhere(path):
    secret = path.parents[1] / "id_rsa"
    secret.write_text('{"is": "secret"}', encoding="utf-8")
    path.unlink()
    path.symlink_to(secret)


def link_of_a_folder(path):
    elsewhere = path.parents[1] / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (pipe, LAST),
        (device, LAST),
        (pipe, "tokenizer.json"),
        (device, "tokenizer.json"),
        (link_elsewhere, "tokenizer.json"),
        (link_elsewhere, "README.md"),
        (link_of_a_folder, "code"),
    ],
)
def test_what_a_file_becomes_during_the_run_is_refused_when_it_is_read(
    change, name, source, original, control, tmp_path
):
    output = tmp_path / "output"
    with pytest.raises(DamagedError, match=f"{name}.*(not a file|is a link to)"):
        go(source, output, during=lambda: change(source / name))
    assert not (output / "ream_stream.json").exists()
    assert b"secret" not in b"".join(files(output).values())
    shutil.rmtree(source)
    shutil.copytree(original, source)
    go(source, output)
    assert files(output) == control


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is a pipe, a socket or a device, not a file"),
        (lambda path: path.symlink_to("nowhere"), "is a link to what is not there"),
        (lambda path: path.symlink_to("code"), "is a link to a folder, not a file"),
        (lambda path: path.symlink_to("/etc"), "is a link to a folder, not a file"),
        (lambda path: path.symlink_to("/etc/passwd"), "is a link to /etc/passwd, outside of"),
    ],
)
def test_what_cannot_be_copied_is_refused_before_the_plan(source, make, said):
    make(source / "more")
    with pytest.raises(UsageError, match=f"more {said}"):
        open_checkpoint(source)


def test_a_folder_that_cannot_be_listed_is_no_empty_one(source, monkeypatch):
    listed = os.scandir

    def refuse(path):
        if str(path).endswith("code"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="code"):
        open_checkpoint(source)


def test_a_folder_of_very_many_files_is_refused(source, monkeypatch):
    monkeypatch.setattr(other_files, "MAX_OTHERS", 4)
    open_checkpoint(source)
    (source / "notes.txt").touch()
    with pytest.raises(UsageError, match="more than 4"):
        open_checkpoint(source)


def test_a_journal_without_digests_of_what_was_read_is_no_proof(source, tmp_path):
    output = tmp_path / "output"
    go(source, output, layers=1)
    workspace = Workspace(output=output, work=output / ".ream-stream")
    saved = load(workspace.journal)
    saved.read = {}
    workspace.save(saved)
    os.utime(source / FIRST, ns=(0, 0))
    with pytest.raises(OtherRunError, match=FIRST):
        go(source, output)
