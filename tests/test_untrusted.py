"""JSON and YAML of strangers: read, or refused by a `ValueError` of one line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ream_stream.errors import DamagedError
from ream_stream.file_access import read_json
from ream_stream.untrusted import parse_json, parse_yaml

REFUSED = {
    "no JSON": "{",
    "nothing": "",
    "deep": 15_000_000 * "[",
    "deep, and whole": 65 * "[" + 65 * "]",
    "a name twice": '{"a": 1, "b": 2, "a": 1}',
    "not a number": '{"a": NaN}',
    "infinite": "[-Infinity]",
    "too large": "1e999",
    "6000 digits": 6000 * "9",
    "a surrogate as a value": '{"a": "\\ud800"}',
    "a surrogate as a name": '{"\\udfff": 1}',
    "a surrogate in bytes": b'{"a": "\xed\xa0\x80"}',
    "not UTF-8": b'"\xff"',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_json_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_json(REFUSED[name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_what_python_writes_is_read(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode()) == value


def test_infinite_numbers_and_names_that_are_no_text_are_read_where_they_may_be():
    assert parse_json("[1e999, -Infinity]", finite=False) == [float("inf"), float("-inf")]
    assert parse_json('"caf\\udce9"', text=False) == "caf\udce9"
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"  # a whole pair is a character


def test_a_file_of_json_that_is_too_large_or_none_is_refused_unread(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(DamagedError, match="not a file of at most 5 bytes"):
        read_json(tmp_path / "a.json", 5)
    with pytest.raises(DamagedError, match="is a folder, not a file"):
        read_json(tmp_path)


@given(st.text(alphabet="a:-[]{}&*!<>|?'\"\\ \n\t#%@,0.~", max_size=60))
def test_yaml_is_read_or_refused_by_one_error(text):
    try:
        parse_yaml(text)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either way is right
