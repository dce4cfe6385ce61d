"""Texts of every kind give the same documents, and a mix has its shares."""

import gzip
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ream_stream.calibration.chat_templates import ChatRenderer
from ream_stream.calibration.config import CalibrationOptions
from ream_stream.calibration.datasets import digest_of, open_documents
from ream_stream.calibration.mix import MIXES, Part, parse_part, parts_of, shares
from ream_stream.calibration.packing import Calibration, load_tokenizer, read_tokens
from ream_stream.calibration.token_cache import calibration_of
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.errors import UsageError

TEXTS = ["one\ntwo", "three \N{EURO SIGN}", "", "four"]
KEPT = [text for text in TEXTS if text]


def documents(path, *, field="text", **options):
    found = open_documents(parse_part(str(path)), field=field, **options)
    return [found[index] for index in range(len(found))]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(texts=TEXTS, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts)


def test_a_compressed_file_has_the_documents_of_the_plain_one(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines().encode()))
    assert documents(path) == KEPT
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"plain\r\ntext"))
    assert documents(path) == ["plain\ntext"]


def test_a_compressed_file_that_is_cut_or_none_is_refused(tmp_path):
    whole = gzip.compress(json_lines(["text"] * 1000).encode())
    for content in (whole[:-20], b"not gzip"):
        path = write(tmp_path / "a.jsonl.gz", content)
        with pytest.raises(UsageError, match=r"a\.jsonl\.gz: it cannot be unpacked"):
            documents(path)


def test_zstd_without_a_library_is_refused_by_name(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.zst", b"")

    def missing(name, *_):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"a\.jsonl\.zst: .*zstd; install zstandard"):
        documents(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"pip install ream-stream\[parquet\]"):
        documents(path)


def test_the_rows_of_a_parquet_file_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chat = [[{"role": "user", "content": text}] for text in TEXTS]
    table = pyarrow.table({"body": [*TEXTS[:3], None], "chat": chat})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert documents(tmp_path / "a.parquet", field="body") == TEXTS[:2]
    spoken = documents(
        tmp_path / "a.parquet", field="chat", render=lambda chat: chat.messages[0]["content"]
    )
    assert spoken == KEPT
    with pytest.raises(UsageError, match=r"no column 'text'; --text-field .*: body, chat\)"):
        documents(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", b"PAR1")
    with pytest.raises(UsageError, match=r"b\.parquet: not a parquet file"):
        documents(tmp_path / "b.parquet")


def test_each_text_file_of_a_folder_is_a_document_in_the_order_of_names(tmp_path):
    write(tmp_path / "src/b.py", "def b(): ...\r\n")
    write(tmp_path / "src/a/z.rs", "fn z() {}")
    write(tmp_path / "src/.git/config", "hidden")
    write(tmp_path / "src/image.bin", b"\xff\xfe\x00")
    write(tmp_path / "src/data.bin", b"text\0text")
    write(tmp_path / "src/empty.py", "\n")
    assert documents(tmp_path / "src") == ["fn z() {}", "def b(): ...\n"]
    write(tmp_path / "none/.git/config", "hidden")
    with pytest.raises(UsageError, match="none: there is no text in it"):
        documents(tmp_path / "none")


def test_a_folder_with_records_is_a_data_set(tmp_path):
    write(tmp_path / "set/b.jsonl", json_lines(["three"]))
    write(tmp_path / "set/a.jsonl.gz", gzip.compress(json_lines(["one", "two"]).encode()))
    write(tmp_path / "set/README.md", "about")
    assert documents(tmp_path / "set") == ["one", "two", "three"]


def test_short_documents_are_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(["  1234  ", "12345"]))
    assert documents(path, min_characters=5) == ["12345"]
    with pytest.raises(UsageError, match="no text of 9 characters or more"):
        documents(path, min_characters=9)


def test_a_chat_is_rendered_with_the_template_of_the_checkpoint(tmp_path):
    tokenizer = load_tokenizer(CHECKPOINT)
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": chat}))
    with pytest.raises(UsageError, match="line 1: its field 'messages' is not a string"):
        documents(path, field="messages")
    with pytest.raises(UsageError, match="tokenizer has no chat template"):
        documents(path, field="messages", render=ChatRenderer(tokenizer))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    )
    rendered = documents(path, field="messages", render=ChatRenderer(tokenizer))
    assert rendered == ["<user>hello\n<assistant>yes\n"]
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(
        UsageError, match=r"can be rendered: the chat template of .* says: no system role"
    ):
        documents(path, field="messages", render=ChatRenderer(tokenizer))


def test_a_data_set_on_the_hub_is_read_from_the_cache(tmp_path):
    """Run apart: where the cache is is read once, at import."""
    cache = tmp_path / "datasets--some--set"
    write(cache / "refs/main", "f" * 40)
    write(cache / "snapshots" / ("f" * 40) / "data/train-0.jsonl", json_lines())
    program = (
        "from ream_stream.calibration.mix import parse_part\n"
        "from ream_stream.calibration.datasets import open_documents\n"
        "part = parse_part('code=hf:some/set/data:0.5')\n"
        "found = open_documents(part, field='text')\n"
        "print([part.name, part.weight, *(found[n] for n in range(len(found)))])\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == str(["code", 0.5, *KEPT])


@pytest.mark.parametrize("wanted", ["hf:some", "hf:no/such-data-set"])
def test_a_data_set_that_cannot_be_fetched_is_refused_by_name(wanted):
    with pytest.raises(UsageError, match=wanted):
        open_documents(parse_part(wanted), field="text")


def test_the_digest_of_a_folder_is_of_names_and_contents(tmp_path):
    write(tmp_path / "one/a.py", "1")
    write(tmp_path / "two/a.py", "1")
    write(tmp_path / "three/b.py", "1")
    digests = [digest_of(parse_part(str(tmp_path / n))) for n in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]


def test_a_part_is_a_name_a_source_and_a_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "odd=b.txt:3"):
        write(tmp_path / name, "text")
    assert parse_part("code=a.txt:0.7") == Part(name="code", source="a.txt", weight=0.7)
    assert parse_part("a.txt:2") == Part(name="a", source="a.txt", weight=2)
    assert parse_part("a.txt") == Part(name="a", source="a.txt")
    assert parse_part("odd=b.txt:3").source == "odd=b.txt:3"
    with pytest.raises(UsageError, match=r"none\.txt: there is no such file or folder"):
        parse_part("code=none.txt:0.7")
    for name in ("a" * 300, "code=" + "a" * 300 + ":2", "a" * 300 + ".yaml"):
        with pytest.raises(UsageError, match=r"aa(\.yaml)?: there is no such file or folder"):
            parts_of([name])


def test_a_list_of_parts_is_read_from_yaml(tmp_path):
    write(tmp_path / "in/code.txt", "text")
    write(tmp_path / "in/math.jsonl", json_lines())
    listed = write(
        tmp_path / "in/mix.yaml",
        "code: {source: code.txt, weight: 0.7}\n"
        "math: {source: math.jsonl, field: problem}\n"
        "more: {source: 'hf:some/set'}\n",
    )
    assert parts_of([str(listed)]) == (
        Part(name="code", source=str(tmp_path / "in/code.txt"), weight=0.7),
        Part(name="math", source=str(tmp_path / "in/math.jsonl"), field="problem"),
        Part(name="more", source="hf:some/set"),
    )


BAD_LISTS = {
    "[": "not YAML that can be read",
    "- a": "not a mapping of names",
    "code: a.txt": "code has source and",
    "code: {source: mix.yaml, wait: 1}": "code has source and",
    "code: {source: [a]}": "source and field are text",
    "code: {source: a, source: b}": "a name occurs twice",
    "code: {source: mix.yaml, weight: 2023-02-31}": "is not a number from 0 on",
    "code: " + 2000 * "[": "it is nested too deeply",
    "a: &a {b: 1}\nc: {<<: [*a, *a]}": "has source and",
    "code: {source: mix.yaml, weight: -1}": "weight '-1' is not a number from 0 on",
    "code: {source: mix.yaml, weight: .inf}": "weight '.inf' is not",
    "code: {source: none.txt}": r"none\.txt: there is no such file",
}


@pytest.mark.parametrize("content", BAD_LISTS)
def test_a_list_that_is_none_is_refused_with_the_reason(tmp_path, content):
    listed = write(tmp_path / "mix.yaml", content)
    with pytest.raises(UsageError, match=BAD_LISTS[content]):
        parts_of([str(listed)])


def test_the_ten_mixes_are_the_paper_s():
    # method of arXiv 2604.04356: C4, NuminaMath, The-Stack-Smol
    paper = [".3:.3:.3", ".5:.5:0", ".5:0:.5", "0:.5:.5", ".2:.5:.3"]
    paper += [".1:.8:.1", "0:.7:.3", ".2:.25:.55", ".1:.1:.8", "0:.3:.7"]
    told = [tuple(weights.values()) for weights in MIXES.values()]
    assert told == [tuple(float(w) for w in mix.split(":")) for mix in paper]
    assert {tuple(weights) for weights in MIXES.values()} == {("general", "math", "code")}


def test_a_named_mix_sets_the_weights_and_leaves_out_what_has_none(tmp_path):
    write(tmp_path / "a.txt", "text")
    texts = [f"{name}={tmp_path / 'a.txt'}:9" for name in ("code", "general", "math")]
    parts = parts_of(texts, mix="general-00-math-30-code-70")
    assert [(part.name, part.weight) for part in parts] == [("code", 0.7), ("math", 0.3)]
    with pytest.raises(UsageError, match="is of parts called code, math, not of code"):
        parts_of(texts[:1], mix="general-00-math-30-code-70")
    with pytest.raises(UsageError, match="two parts of the mix are called code"):
        parts_of([texts[0], texts[0]])
    with pytest.raises(UsageError, match="no part of the mix has a weight above 0"):
        parts_of([f"code={tmp_path / 'a.txt'}:0"])


def test_shares_by_hand():
    parts = [Part(name=n, source="", weight=w) for n, w in (("a", 0.5), ("b", 0.3), ("c", 0.2))]
    # 3.5, 2.1 and 1.4: the largest remainder takes the one left over
    assert shares(parts, 7) == [4, 2, 1]
    with pytest.raises(UsageError, match="c gives none of 2 sequences"):
        shares(parts, 2)


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=5), total=st.integers(300, 400)
)
def test_shares_add_up_and_are_off_by_less_than_one(weights, total):
    parts = [Part(name=str(n), source="", weight=w) for n, w in enumerate(weights)]
    counts = shares(parts, total)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


def test_a_mix_of_text_and_tokens_has_its_shares(tmp_path):
    write(tmp_path / "a.txt", "some words to be cut into tokens " * 40)
    ids = torch.full((9, 8), 7)
    save_file({"input_ids": ids}, tmp_path / "b.safetensors")
    parts = parts_of([f"code={tmp_path / 'a.txt'}:3", f"math={tmp_path / 'b.safetensors'}:1"])
    wanted = Calibration(parts=parts, num_sequences=8, sequence_length=8)
    tokens = read_tokens(wanted, CHECKPOINT, vocab_size=4096)
    assert tokens.domains == ("code", "math")
    assert tokens.domain_S.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert bool((tokens.input_ids_SL[tokens.domain_S == 1] == 7).all())


def test_the_two_ends_of_a_rendered_chat_are_not_put_twice():
    from ream_stream.calibration.packing import pack

    class Ending:
        bos_token_id, eos_token_id, name_or_path = 7, 9, "digits"

        def __call__(self, text, *, add_special_tokens=True, verbose=True):
            ids = [int(letter) for letter in text]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    tokens = pack(
        ["719", "2"], Ending(), num_sequences=1, sequence_length=6, description="chats"
    )
    assert tokens.input_ids_SL.tolist() == [[7, 1, 9, 7, 2, 9]]


@pytest.fixture
def short(tmp_path):
    """Write a text of some 40 sequences of 16 tokens, and one of some 10."""
    for name, times in (("general", 120), ("code", 30)):
        (tmp_path / f"{name}.txt").write_text(f"Some words of {name}. " * times)
    return tmp_path


def of(*sources, sequences=None):
    """Return the tokens that a command line with these sources asks for."""
    options = CalibrationOptions(calibration=sources, sequences=sequences, sequence_length=16)
    wanted = calibration_of(options)
    return read_tokens(wanted, CHECKPOINT, vocab_size=4096)


def test_without_a_number_there_are_as_many_sequences_as_the_text_fills(short):
    everything = of(str(short / "general.txt"), sequences=0)
    usual = of(str(short / "general.txt"))
    assert 20 < usual.num_sequences < 100
    assert torch.equal(usual.input_ids_SL, everything.input_ids_SL)
    some = of(str(short / "general.txt"), sequences=5)
    assert torch.equal(some.input_ids_SL, usual.input_ids_SL[:5])
    with pytest.raises(
        UsageError, match=rf"use --sequences {usual.num_sequences}, or a longer"
    ):
        of(str(short / "general.txt"), sequences=usual.num_sequences + 1)


@pytest.mark.parametrize("sequences", [None, 0])
def test_a_mix_keeps_its_shares_where_one_text_is_short(short, sequences):
    general, code = (f"{name}={short / name}.txt" for name in ("general", "code"))
    alone = of(str(short / "code.txt")).num_sequences
    mixed = of(f"{general}:0.75", f"{code}:0.25", sequences=sequences)
    counts = torch.bincount(mixed.domain_S).tolist()
    assert counts[0] == pytest.approx(3 * counts[1], abs=3)
    assert counts[1] in {alone - 1, alone}


def test_more_than_the_usual_number_is_taken_only_if_all_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("ream_stream.calibration.config.MOST_SEQUENCES", 3)
    (tmp_path / "text.txt").write_text("Some words of nothing. " * 40)
    assert of(str(tmp_path / "text.txt")).num_sequences == 3
    assert of(str(tmp_path / "text.txt"), sequences=0).num_sequences > 3
