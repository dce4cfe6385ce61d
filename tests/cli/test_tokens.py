"""The verb `tokens`, and the tokens that a run keeps."""

import json

import pytest
from command_line import call

from ream_stream.__main__ import main
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.compression import job


@pytest.fixture(scope="module")
def text_words(tmp_path_factory):
    """Return the arguments of a small run on text, finished once."""
    folder = tmp_path_factory.mktemp("text")
    text = folder / "text.txt"
    text.write_text("The first line.\nAnd the second one, which is longer.\n" * 40)
    words = [
        *("compress", CHECKPOINT, folder / "output", "--method", "reap", "--keep", "75%"),
        *("--calibration", text, "--sequences", 4, "--sequence-length", 32, "--threads", 1),
    ]
    assert main([str(word) for word in words]) == 0
    return words


def test_a_run_that_goes_on_uses_the_tokens_it_began_with(capsys, monkeypatch, text_words):
    def tokenize(*_args, **_kwargs):
        raise AssertionError("the text is made into tokens again")

    monkeypatch.setattr(job, "read_tokens", tokenize)
    assert call(capsys, *text_words)[0] == 0


def test_lost_tokens_are_made_again(capsys, text_words):
    kept = text_words[2] / ".ream-stream" / "tokens.safetensors"
    data = kept.read_bytes()
    kept.unlink()
    try:
        assert call(capsys, *text_words)[0] == 0
    finally:
        kept.write_bytes(data)


@pytest.mark.parametrize("more", ["", "Much more text. " * 500])
def test_a_changed_text_is_refused_as_another_calibration(capsys, text_words, tmp_path, more):
    other, words = tmp_path / "other.txt", list(text_words)
    other.write_text("Another text." + more)
    words[words.index("--calibration") + 1] = other
    status, _, err = call(capsys, *words)
    assert status == 11
    assert "calibration: " in err
    # a new run of the short one would be refused as well, for another reason
    assert call(capsys, *words, "--restart", "--dry-run")[0] == (0 if more else 2)


def test_another_number_of_sequences_is_another_calibration(capsys, text_words):
    status, _, err = call(capsys, *text_words, "--sequences", 3)
    assert status == 11
    assert "calibration: " in err


def test_a_token_set_is_made_described_and_used_by_a_compression(capsys, tmp_path):
    for name, text in (("code", "def f(): return 1\n"), ("math", "1 + 1 = 2. ")):
        (tmp_path / f"{name}.txt").write_text(text * 60)
    made, size = tmp_path / "mix.safetensors", ("--sequences", 6, "--sequence-length", 16)
    parts = [w for n in ("code", "math") for w in ("--calibration", f"{n}={tmp_path / n}.txt")]
    words = ("tokens", CHECKPOINT, *parts, *size, "--json")
    known = json.loads(call(capsys, *words, "--output", made)[1])
    assert known == json.loads(call(capsys, *words)[1])
    assert [(n, d["sequences"]) for n, d in known["domains"].items()] == [
        ("code", 3), ("math", 3),
    ]  # fmt: skip
    again = call(capsys, "tokens", CHECKPOINT, "--calibration", made, "--json")
    assert json.loads(again[1]) == known
    assert "50.0%" in call(capsys, "tokens", CHECKPOINT, "--calibration", made)[1]
    output = tmp_path / "out"
    words = ("compress", CHECKPOINT, output, "--experts", 28, "--method", "reap")
    assert call(capsys, *words, *parts, *size)[0] == 0
    manifest = json.loads((output / "ream_stream.json").read_text())
    assert manifest["fingerprint"]["calibration"] == known["digest"]
    assert manifest["layers"][0]["domains"].keys() == {"code", "math"}
    # the same mix with other weights is another calibration
    other = [f"{word}:3" if word == parts[1] else word for word in parts]
    assert call(capsys, *words, *other, *size)[0] == 11
    assert call(capsys, "tokens", CHECKPOINT, *parts, *size, "--output", made)[0] == 2
