import itertools
import json
import re
from pathlib import Path

import pytest

from ream_stream.cli.demo import CHECKPOINT, problems, texts

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


def test_the_packaged_checkpoint_is_whole():
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text("utf-8"))
    shards = set(index["weight_map"].values())
    assert {path.name for path in CHECKPOINT.glob("*.safetensors")} == shards
