"""Files made by strangers to do harm: nothing of theirs is run, read or filled up."""

import gzip
import json
import os
import shutil
import sys
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import run, settings
from transformers import AutoConfig, AutoModelForCausalLM

from ream_stream.__main__ import main
from ream_stream.calibration.datasets import open_documents
from ream_stream.calibration.mix import Part
from ream_stream.calibration.packing import load_tokenizer
from ream_stream.checkpoint import header
from ream_stream.checkpoint.reader import INDEX, MAX_CONFIG_BYTES, SINGLE, open_checkpoint
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.compression import journal
from ream_stream.errors import DamagedError, ReamStreamError, UnsupportedModelError, UsageError
from ream_stream.model.meta_model import build_skeleton

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "stress"))
from fuzz import Parsers

EVIL = "import pathlib\npathlib.Path(__file__).with_name('it-ran').write_text('')\n"


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Give a copy of a checkpoint that may be changed."""

    def give(name="olmoe"):
        return shutil.copytree(checkpoints(name), tmp_path / "source")

    return give


def edit_config(source, **changes):
    path = source / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")


# Code


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_weights_that_are_pickles_are_named_and_never_opened(copy, name):
    source = copy()
    (source / SINGLE).unlink()
    (source / name).write_bytes(b"cos\nsystem\n(S'touch it-ran'\ntR.")
    with pytest.raises(UsageError, match=f"{name} may hold code that runs"):
        open_checkpoint(source)


def test_code_that_comes_with_a_checkpoint_is_not_run(copy, tmp_path, monkeypatch):
    source = copy()

    def forbidden(*_, **__):
        raise AssertionError("it may run the checkpoint's code")

    monkeypatch.setattr(AutoConfig, "from_pretrained", forbidden)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", forbidden)
    (source / "modeling_evil.py").write_text(EVIL, encoding="utf-8")
    auto_map = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit_config(source, auto_map=auto_map)
    done = run(source, tmp_path / "out", settings())
    assert not list(tmp_path.rglob("it-ran"))
    # for those who trust it, it is in the output
    assert (done.output / "modeling_evil.py").read_text(encoding="utf-8") == EVIL


def test_a_model_that_needs_such_code_is_refused_by_name(copy, tmp_path, capsys):
    source = copy()
    edit_config(source, model_type="evil", auto_map={"AutoConfig": "modeling_evil.C"})
    words = ["compress", str(source), str(tmp_path / "out"), "--experts", "6"]
    words += ["--calibration", str(source / "config.json")]
    assert main(words) == 10
    said = capsys.readouterr().err
    assert "model type 'evil' is not supported" in said
    assert "code that comes with a checkpoint is never run" in said


@pytest.mark.parametrize(
    "key",
    ["attn_implementation", "_attn_implementation", "experts_implementation"],
)
def test_a_config_cannot_have_kernels_fetched_by_the_name_of_a_repository(checkpoints, key):
    config = json.loads((checkpoints("olmoe") / "config.json").read_text(encoding="utf-8"))
    plain = build_skeleton(config, torch.float32, torch.device("cpu")).config
    given = build_skeleton({**config, key: "evil/kernel"}, torch.float32, torch.device("cpu"))
    assert given.config._attn_implementation == plain._attn_implementation
    assert given.config._experts_implementation == plain._experts_implementation


def test_a_tokenizer_that_needs_code_is_not_run(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    (folder / "tokenization_evil.py").write_text(EVIL, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]},
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        load_tokenizer(folder)
    except UsageError as error:
        assert "tokenizer cannot be loaded" in str(error)  # noqa: PT017 - either way is right
    assert not list(tmp_path.rglob("it-ran"))


# Places


def test_a_link_out_of_the_folder_is_not_copied_into_the_output(copy, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("secret", encoding="utf-8")
    source = copy()
    (source / "notes.txt").symlink_to(secret)
    with pytest.raises(UsageError, match=r"notes\.txt is a link to .*id_rsa, outside"):
        open_checkpoint(source)
    (source / "notes.txt").unlink()
    (source / "notes.txt").symlink_to("tokenizer.json")
    open_checkpoint(source)


def test_a_snapshot_may_link_to_its_blobs_and_not_to_those_of_another(copy, tmp_path):
    hub = tmp_path / "hub"
    mine, other = hub / "models--org--mine", hub / "models--org--other"
    for repository in (mine, other):
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs" / "0").write_text("{}", encoding="utf-8")
    snapshot = shutil.move(copy(), mine / "snapshots" / "0123")
    (snapshot / "vocab.txt").symlink_to("../../blobs/0")
    open_checkpoint(snapshot)
    (snapshot / "merges.txt").symlink_to("../../../models--org--other/blobs/0")
    with pytest.raises(UsageError, match=r"merges\.txt is a link"):
        open_checkpoint(snapshot)


def device(path):
    path.symlink_to("/dev/zero")


def pipe(path):
    os.mkfifo(path)


def endless(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("make", [device, pipe, endless])
@pytest.mark.parametrize("name", ["config.json", INDEX, SINGLE, "tokenizer.json"])
def test_devices_pipes_and_endless_files_are_refused_unread(copy, name, make):
    source = copy()
    (source / name).unlink(missing_ok=True)
    make(source / name)
    read = load_tokenizer if name == "tokenizer.json" else open_checkpoint
    with pytest.raises((UsageError, DamagedError)) as caught:
        read(source)
    assert str(source) in str(caught.value)


def test_a_shard_that_is_a_link_is_read_like_any_other(copy, tmp_path):
    source = copy()
    (source / SINGLE).rename(tmp_path / "elsewhere.safetensors")
    (source / SINGLE).symlink_to(tmp_path / "elsewhere.safetensors")
    open_checkpoint(source)
    (source / SINGLE).unlink()
    (source / SINGLE).symlink_to("/etc/passwd")
    with pytest.raises(DamagedError, match="not a safetensors file"):
        open_checkpoint(source)


# Sizes


def test_a_config_of_many_megabytes_is_refused_unread(copy):
    source = copy()
    (source / "config.json").write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(DamagedError, match="at most 16000000 bytes"):
        open_checkpoint(source)


def test_a_header_of_very_many_tensors_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "MAX_TENSORS", 3)
    entries = {f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(4)}
    raw = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(DamagedError, match="more than 3 tensors"):
        header.read_header(path)


def bomb(path):
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(60):
            file.write(b"a" * (1 << 20))


def one_line(path):
    path.write_bytes(b'{"text": "' + b"a" * (20 << 20) + b'"}\n')


def not_text(path):
    path.write_bytes(b"some text\n" * 1000 + b"\xff\xfe\n")


def a_pickle(path):
    torch.save({"text": "words"}, path)


HARMFUL = {
    "bomb.txt.gz": (bomb, "it unpacks to more than"),
    "line.jsonl": (one_line, "line 1 is longer than 16 MiB"),
    "bytes.txt": (not_text, "not UTF-8 text at byte 10000"),
    "tokens.pt": (a_pickle, "not UTF-8 text"),
    "pipe.txt": (pipe, "not a file"),
    "device.txt": (device, "not a file"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_calibration_text_is_refused_in_little_memory(tmp_path, name):
    make, words = HARMFUL[name]
    make(tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=words):
            open_documents(Part(name="x", source=str(tmp_path / name)), field="text")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60 << 20


def test_a_large_file_without_a_newline_is_read_in_pieces(tmp_path):
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"word " * (1 << 18))
    tracemalloc.start()
    try:
        documents = open_documents(Part(name="x", source=str(path)), field="text")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20
    del documents


# Anything


@pytest.fixture(scope="module")
def parsers(tmp_path_factory):
    with closing(Parsers(tmp_path_factory.mktemp("fuzz"))) as parsers:
        yield parsers


@pytest.mark.parametrize(
    "name",
    [
        *("header", "config", "index", "card", "journal", "log", "zarr", "chats", "mix"),
        "hub",
        pytest.param("template", marks=pytest.mark.slow),  # loops take the time they may
    ],
)
@given(draw=st.randoms(use_true_random=False))
def test_a_changed_document_is_read_or_refused(parsers, name, draw):
    # it raises what is no refusal
    parsers.feed(name, parsers.change(name, parsers.valid(name), draw))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(value=JSON)
def test_any_json_as_a_journal_is_refused(parsers, value):
    parsers.workspace.journal.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ReamStreamError):
        journal.load(parsers.workspace.journal)


@given(config=JSON, weight_map=JSON)
def test_any_json_as_config_and_index_is_refused_or_read(parsers, config, weight_map):
    folder = parsers.targets["config"].path.parent
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = {"weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ReamStreamError):
        open_checkpoint(folder)


def test_a_model_whose_config_is_of_a_dense_one_with_kernels_is_still_refused(copy):
    source = copy()
    edit_config(source, model_type="llama", attn_implementation="evil/kernel")
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported"):
        run(source, source.parent / "out", settings())
