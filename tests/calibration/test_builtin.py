import itertools
import json
import re
from pathlib import Path

import pytest

import ream_stream
from ream_stream.calibration import builtin as texts
from ream_stream.calibration.builtin import problems
from ream_stream.calibration.datasets import digest_of, open_documents
from ream_stream.calibration.mix import BUILTIN_NAMES, parts_of
from ream_stream.calibration.packing import load_tokenizer
from ream_stream.calibration.token_cache import read_test_tokens
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.errors import UsageError

SPLITS: tuple[texts.Split, ...] = ("calibration", "test")


@pytest.mark.parametrize("domain", sorted(texts.DOMAINS))
def test_no_document_is_in_both_splits(domain):
    calibration, test = (set(texts.documents(domain, split)) for split in SPLITS)
    # an empty module (``__init__.py``) is in both and gives no text
    assert not (calibration & test) - {""}


@pytest.mark.parametrize("domain", sorted(texts.DOMAINS))
@pytest.mark.parametrize("split", SPLITS)
def test_documents_are_the_same_each_time_and_enough_for_the_demo(domain, split):
    documents = texts.documents(domain, split)
    assert documents == texts.documents(domain, split)
    # 16,384 tokens of 256 are the sequences the demo model was measured on
    assert sum(map(len, documents)) > 16_384 * 4


@pytest.mark.parametrize("domain", sorted(texts.DOMAINS))
def test_about_a_quarter_of_the_documents_is_for_tests(domain):
    calibration, test = (len(texts.documents(domain, split)) for split in SPLITS)
    assert 0.15 < test / (calibration + test) < 0.35


def test_modules_this_python_does_not_have_are_skipped(tmp_path, monkeypatch):
    listed = (Path(texts.__file__).parent / "code_modules.txt").read_text(encoding="utf-8")
    kept = listed.split()[:2]
    for name in kept:
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8")
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda _name: str(tmp_path))
    found = itertools.chain.from_iterable(texts.documents("code", split) for split in SPLITS)
    assert sorted(found) == sorted(f"# {name}\n" for name in kept)


def test_the_answers_of_generated_sums_are_right():
    left = re.compile(
        r"has (\d+) \w+ and buys (\d+) more, then gives (\d+) .*?Answer: (\d+)", re.S
    )
    text = "\n".join(problems.documents(5, 50))
    found = left.findall(text)
    assert len(found) > 50
    for start, more, given, answer in found:
        assert int(start) + int(more) - int(given) == int(answer)


def test_generated_roots_solve_their_equations():
    equation = re.compile(
        r"Solve (\d+)x ([+-]) (\d+) = (-?\d+) for x\..*?Answer: (-?\d+)", re.S
    )
    found = equation.findall("\n".join(problems.documents(6, 50)))
    assert len(found) > 50
    for slope, sign, offset, right, root in found:
        assert int(slope) * int(root) + int(sign + offset) == int(right)


def test_a_built_in_text_is_named_and_its_test_split_is_what_is_predicted():
    (code, math) = parts_of(["builtin:code", "sums=builtin:math:0.25"])
    assert (code.name, code.source, code.weight) == ("code", "builtin:code", 1)
    assert (math.name, math.weight) == ("sums", 0.25)
    found = open_documents(code, field="text", min_characters=1000)
    assert [*found] == [t for t in texts.documents("code", "calibration") if len(t) > 1000]
    held = open_documents(math, field="text", split="test")
    assert [*held] == texts.documents("math", "test")
    assert digest_of(code) == digest_of(code) != digest_of(math)
    # and of eval it is the other split, of which no document is calibrated on
    tokens = read_test_tokens(
        [math],
        CHECKPOINT,
        vocab_size=None,
        text_field="text",
        sequence_length=64,
        max_tokens=640,
    )
    first = load_tokenizer(CHECKPOINT)(held[0])["input_ids"]
    assert tokens.input_ids_SL.flatten()[: len(first)].tolist() == first


@pytest.mark.parametrize("source", ["builtin:poetry", "builtin:"])
def test_a_built_in_text_that_there_is_not_is_refused_with_those_there_are(source):
    with pytest.raises(UsageError, match=r"there are builtin:general, builtin:code, builtin:m"):
        parts_of([source])
    assert {*BUILTIN_NAMES} == {*texts.DOMAINS}


def test_a_mix_of_built_in_texts_is_told_to_be_for_trying_out():
    mix = [f"builtin:{name}" for name in BUILTIN_NAMES]
    known = ream_stream.plan(CHECKPOINT, keep="75%", calibration=mix, sequence_length=256)
    assert known.details["calibration_sequences"] > 300
    (note,) = [note for note in known.details["notes"] if "built-in" in note]
    assert "for trying things out only" in note


def test_the_packaged_checkpoint_is_whole():
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text("utf-8"))
    shards = set(index["weight_map"].values())
    assert {path.name for path in CHECKPOINT.glob("*.safetensors")} == shards
