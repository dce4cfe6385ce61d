import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ream_stream.calibration import text
from ream_stream.calibration.datasets import open_documents
from ream_stream.calibration.mix import parse_part
from ream_stream.calibration.text import in_seeded_order
from ream_stream.errors import UsageError


def opened(path, field="text", **options):
    """Open the documents of a file as a run does."""
    return open_documents(parse_part(str(path)), field=field, **options)


def all_of(documents):
    return [documents[index] for index in range(len(documents))]


def file(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def records(folder, *values):
    return file(folder, "records.jsonl", "".join(json.dumps(value) + "\n" for value in values))


def test_a_short_text_is_one_document(tmp_path):
    assert all_of(opened(file(tmp_path, "a.txt", "one\ntwo"))) == ["one\ntwo"]


def test_a_long_text_is_cut_after_the_last_newline_that_fits(tmp_path):
    line = "x" * 999 + "\n"
    documents = all_of(opened(file(tmp_path, "a.md", line * 100)))
    # 65 lines of 1000 bytes are the most in 65,536
    assert documents == [line * 65, line * 35]


def test_a_text_without_newlines_is_cut_between_characters(tmp_path):
    content = "x" + "\N{EURO SIGN}" * 50_000
    documents = all_of(opened(file(tmp_path, "a.txt", content)))
    # 65,536 = 1 + 21,845 characters of 3 bytes, to the byte; the next cut drops 1 byte
    assert [len(document) for document in documents] == [21_846, 21_845, 6_310]
    assert "".join(documents) == content


@settings(max_examples=50)
@given(content=st.text(st.sampled_from("ab \n\u00e9\u20ac\U0001f600"), min_size=1, max_size=80))
def test_the_pieces_of_a_text_are_the_text(tmp_path_factory, content):
    path = file(tmp_path_factory.mktemp("text"), "a.txt", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_PIECE_BYTES", 7)
        with path.open("rb") as content_file:
            pieces = list(text._pieces(content_file))
        assert b"".join(pieces).decode() == content
        assert all(0 < len(piece) <= 7 for piece in pieces)
        if content.strip():
            kept = [piece.decode() for piece in pieces if piece.decode().strip()]
            assert all_of(opened(path)) == kept


def test_records_are_read_from_the_field_that_is_named(tmp_path):
    path = records(tmp_path, {"text": "a", "body": "b\r\n"}, {"text": "c", "body": "\u00e9"})
    assert all_of(opened(path)) == ["a", "c"]
    assert all_of(opened(path, field="body")) == ["b\r\n", "\u00e9"]


@settings(max_examples=30)
@given(values=st.lists(st.text(), min_size=1))
def test_every_record_that_is_not_blank_is_a_document(tmp_path_factory, values):
    path = records(tmp_path_factory.mktemp("records"), *({"text": value} for value in values))
    wanted = [value for value in values if value.strip()]
    if wanted:
        assert all_of(opened(path)) == wanted
    else:
        with pytest.raises(UsageError, match="no text"):
            opened(path)


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_are_no_matter(tmp_path):
    path = file(tmp_path, "a.JSONL", b'\xef\xbb\xbf{"text": "a"}\n\n \n{"text": "b"}')
    assert all_of(opened(path)) == ["a", "b"]
    assert all_of(opened(file(tmp_path, "b.txt", b"\xef\xbb\xbfa\r\nb"))) == ["a\nb"]


def test_the_order_has_every_document_once_and_follows_the_seed():
    documents = [str(number) for number in range(100)]
    orders = [list(in_seeded_order(documents, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(documents)
    assert orders[0] != documents


BAD_RECORDS = {
    "not JSON": (
        '{"text": "a"}\n{"text": \n',
        r"line 2 is not JSON: Expecting value at column",
    ),
    "a list": ('["a"]\n', r"line 1 is not a JSON object"),
    "no such field": (
        '{"text": "a"}\n\n{"body": "b", "id": 1}\n',
        r"line 3 has no field 'text'; --text-field names it \(here: body, id\)",
    ),
    "no fields": ("{}\n", r"line 1 has no field 'text'.*here: none"),
    "a number": ('{"text": 1}\n', r"line 1: its field 'text' is not a string"),
    "null": ('{"text": null}\n', r"line 1: its field 'text' is not a string"),
    "half a pair": ('{"text": "\\ud800"}\n', r"line 1: .* half a surrogate pair"),
    "too deep": ("[" * 100_000 + "\n", r"line 1 is not JSON that can be read"),
    "too many digits": ("1" * 5000 + "\n", r"line 1 is not JSON that can be read"),
}


@pytest.mark.parametrize("name", sorted(BAD_RECORDS))
def test_a_bad_record_is_refused_with_its_line(tmp_path, name):
    content, message = BAD_RECORDS[name]
    path = file(tmp_path, "a.jsonl", content)
    with pytest.raises(UsageError, match=message) as caught:
        opened(path)
    assert str(caught.value).startswith(f"{path}: line ")
    assert "\n" not in str(caught.value)


def test_a_record_that_does_not_fit_in_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "RECORD_BYTES", 1 << 20)
    path = file(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "' + "b" * (1 << 20) + '"}\n')
    with pytest.raises(UsageError, match="line 2 is longer than 1 MiB"):
        opened(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", "\n", " \n\n\t"])
def test_a_file_without_text_is_refused(tmp_path, name, content):
    with pytest.raises(UsageError, match="there is no text in it"):
        opened(file(tmp_path, name, content))


def test_what_is_not_utf8_is_refused_with_its_place(tmp_path):
    good = b"x" * 70_000
    with pytest.raises(UsageError, match=r"not UTF-8 text at byte 70000 \("):
        opened(file(tmp_path, "a.txt", good + b"\xff" + good))
    with pytest.raises(UsageError, match=r"not UTF-8 text at byte 23 \("):
        opened(file(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text":"\xe9"}\n'))
    with pytest.raises(UsageError, match=r"not UTF-8 text at byte 1 \(unexpected end"):
        opened(file(tmp_path, "b.txt", b"a\xe2\x82"))


def test_what_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        opened(tmp_path / "missing.txt")
    with pytest.raises(UsageError, match="there is no text in it"):
        opened(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a file"):
        opened(tmp_path / "pipe")


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path):
    path = records(tmp_path, {"text": "a"})
    documents = opened(path)
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="changed while it was being read"):
        documents[0]
