"""Records are the same whatever they are stored as, and are read in bounded memory."""

import bz2
import csv
import gzip
import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ream_stream.calibration import json_list, readers
from ream_stream.calibration.datasets import open_documents
from ream_stream.calibration.mix import parse_part
from ream_stream.errors import UsageError

TEXTS = ["one\ntwo", 'three, "3" \N{EURO SIGN}', "", "four\t[4]", "[{5"]
KEPT = [text for text in TEXTS if text]


def documents(path, *, field="text", **options):
    found = open_documents(parse_part(str(path)), field=field, **options)
    return [found[index] for index in range(len(found))]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_lines(texts):
    return "".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(texts))


def as_list(texts, **options):
    return json.dumps([{"id": n, "text": t} for n, t in enumerate(texts)], **options)


def as_table(texts, delimiter=","):
    content = io.StringIO(newline="")
    rows = csv.writer(content, delimiter=delimiter)
    rows.writerows([["id", "text"], *enumerate(texts)])
    return content.getvalue()


KINDS = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "a.json": as_lines,
    "b.json": as_list,
    "c.json": lambda texts: "\ufeff\n " + as_list(texts, indent=1, ensure_ascii=False) + "\n",
    "a.csv": as_table,
    "b.csv": lambda texts: "\ufeff" + as_table(texts),
    "a.tsv": lambda texts: as_table(texts, delimiter="\t"),
}


@pytest.mark.parametrize("pack", ["", ".gz", ".bz2"])
@pytest.mark.parametrize("name", KINDS)
def test_records_are_the_same_whatever_they_are_stored_as(tmp_path, name, pack):
    packed = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[pack]
    path = write(tmp_path / (name + pack), packed(KINDS[name](TEXTS).encode()))
    assert documents(path) == KEPT


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
@pytest.mark.parametrize("name", ["b.json", "c.json", "a.csv", "a.tsv"])
def test_any_texts_come_back_from_a_list_or_a_table(tmp_path_factory, name, texts):
    wanted = [text for text in texts if text.strip()]
    path = write(tmp_path_factory.mktemp("any") / name, KINDS[name](texts))
    if name[2:] != "json" and any("\0" in text for text in texts):
        with pytest.raises(UsageError, match="has a NUL character"):
            documents(path)
    elif wanted:
        assert documents(path) == wanted


def test_records_of_a_list_may_end_anywhere_in_what_is_read_at_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", as_list([f"text {n} " * n for n in range(60)], indent=1))
    whole = documents(path)
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(json_list, "_READ_CHARACTERS", size)
        assert documents(path) == whole


def test_a_long_list_is_read_in_little_memory(tmp_path):
    path = tmp_path / "a.json"
    record = json.dumps({"text": "word " * 20_000})  # 100 kB
    with path.open("w", encoding="utf-8") as file:
        file.write("[" + record + ("," + record) * 299 + "]")
    tracemalloc.start()
    try:
        found = open_documents(parse_part(str(path)), field="text")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 300
    assert peak < path.stat().st_size / 3


def test_what_a_cell_of_a_table_holds_as_json_is_a_chat_only_if_it_is_messages(tmp_path):
    chat = [{"role": "user", "content": "hi, you"}]
    path = write(tmp_path / "a.csv", as_table([json.dumps(chat), "[1, 2]", "[{}]", "[x"]))
    shown = documents(path, render=lambda chat: f"chat of {chat.messages}")
    assert shown == [f"chat of {chat}", "[1, 2]", "[{}]", "[x"]


BAD = {
    "an open list": ("a.json", '[{"text": "a"}', "record 1 is followed by no comma"),
    "a cut record": ("a.json", '[{"text": "a"}, {"text": "b', "record 2 is not JSON: "),
    "a list of texts": ("a.json", '["a"]', "record 1 is not a JSON object"),
    "no comma": ("a.json", '[{"text": "a"} {"text": "b"}]', "record 1 is followed by no"),
    "two lists": ("a.json", '[{"text": "a"}] []', "something follows the list"),
    "an empty list": ("a.json", " [ ] ", "there is no text in it"),
    "no field in a list": (
        "a.json",
        '[{"text": "a"}, {"b": 1}]',
        "record 2 has no field 'text'",
    ),
    "one record over lines": ("a.json", '{\n "text": "a"\n}\n', "neither a list of records"),
    "records by column": ("a.json", '{"text": {"0": "a"}}', "its field 'text' is not a string"),
    "brackets": ("a.json", '[{"a":' + "[" * 100_000, "record 1 is not JSON to be read"),
    "many digits": ("a.json", '[{"a":' + "9" * 5000 + "}]", "record 1 is not JSON to be read"),
    "Latin-1 in a list": ("a.json", b'[{"text": "\xe9"}]', "record 0 is not UTF-8 text"),
    "half a pair in a list": (
        "a.json",
        '[{"text": "\\ud800"}]',
        "record 1: .* half a surrogate",
    ),
    "no such column": ("a.csv", "id,body\n1,a\n", r"no column 'text'.*here: id, body\)"),
    "semicolons": ("a.csv", "id;text\n1;a\n", r"no column 'text'.*here: id;text\)"),
    "a column twice": ("a.csv", "text,text\n1,a\n", "several columns 'text'"),
    "nothing": ("a.csv", "", r"no column 'text'.*here: none\)"),
    "an open quote": ("a.csv", 'id,text\n1,"a\n2,b\n', "line 3 ends in no row .*left open"),
    "a stray quote": ("a.csv", 'id,text\n1,"a"b\n', "line 2 ends in no row"),
    "a short row": ("a.csv", "id,text\n1,a\n2\n", "line 3 has 1 cells, the header 2"),
    "a long row": ("a.csv", "id,text\n1,a,b\n", "line 2 has 3 cells, the header 2"),
    "a NUL": ("a.csv", "id,text\n1,a\0\n", "line 2 has a NUL character; read are text"),
    "UTF-16": ("a.csv", "id,text\n".encode("utf-16"), "line 1 is not UTF-8 text"),
    "a NUL in a text": ("a.txt", "a\0b", r"NUL characters; read are text .*\.jsonl, \.ndjson"),
    "a table of Arrow": ("a.arrow", b"ARROW1\0\0\xff", "not UTF-8 text at byte 8 .*; read are"),
    "what xz packed": ("a.jsonl.xz", b"\xfd7zXZ\0", "not UTF-8 text at byte 0 .*; read are"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_list_or_table_of_records_is_refused_with_its_place(tmp_path, case):
    name, content, message = BAD[case]
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=message) as caught:
        documents(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"text": "' + "b" * (1 << 12) + '"}]'),
        ("a.csv", "text\n" + "b" * (1 << 12) + "\n"),
        ("a.csv", 'text\n"' + "b\n" * (1 << 12) + '"\n'),
        ("a.jsonl", '{"text": "' + "b" * (1 << 12) + '"}\n'),
    ],
)
def test_a_record_of_any_kind_that_is_too_long_is_refused(tmp_path, monkeypatch, name, content):
    from ream_stream.calibration import text

    monkeypatch.setattr(readers, "RECORD_BYTES", 1 << 10)
    monkeypatch.setattr(text, "RECORD_BYTES", 1 << 10)
    monkeypatch.setattr(json_list, "_READ_CHARACTERS", 64)
    with pytest.raises(UsageError, match=r"longer than 0 MiB|field limit \(1024\)"):
        documents(write(tmp_path / name, content))


def test_a_message_names_few_columns_and_the_start_of_their_names(tmp_path):
    path = write(tmp_path / "a.csv", ",".join(f"column-{n}-{'x' * 99}" for n in range(99)))
    with pytest.raises(UsageError) as caught:
        documents(path)
    assert len(str(caught.value)) < 800


def test_lists_and_tables_make_a_data_set_of_a_folder_only_where_nothing_else_is(tmp_path):
    write(tmp_path / "set/train.json", as_list(["one"]))
    write(tmp_path / "set/more.csv", as_table(["two"]))
    write(tmp_path / "set/README.md", "about")
    assert documents(tmp_path / "set") == ["two", "one"]
    write(tmp_path / "code/package.json", '{"name": "x"}')
    write(tmp_path / "code/main.py", "print()")
    assert documents(tmp_path / "code") == ["print()", '{"name": "x"}']
    write(tmp_path / "c4/train.json.gz", gzip.compress(as_lines(["three"]).encode()))
    write(tmp_path / "c4/infos.json", "{}")
    write(tmp_path / "c4/load.py", "print()")
    assert documents(tmp_path / "c4") == ["three"]


def test_a_table_of_arrow_leaves_no_nulls_and_keeps_the_tools(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chats = [
        [{"role": "user", "content": "a", "name": None}],
        [{"role": "user", "content": "b", "name": "me"}],
    ]
    tools = [[{"name": "f", "x": None}], None]
    table = pyarrow.table({"messages": chats, "tools": tools, "n": [1, 2], "b": [b"1", b"2"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    shown = documents(tmp_path / "a.parquet", field="messages", render=repr)
    assert shown == [
        "Chat(messages=[{'role': 'user', 'content': 'a'}], tools=[{'name': 'f'}])",
        "Chat(messages=[{'role': 'user', 'content': 'b', 'name': 'me'}], tools=None)",
    ]
    with pytest.raises(UsageError, match="row 1: its field 'n' is not a string"):
        documents(tmp_path / "a.parquet", field="n")
    with pytest.raises(UsageError, match="its column 'b' is neither text nor chats"):
        documents(tmp_path / "a.parquet", field="b")
