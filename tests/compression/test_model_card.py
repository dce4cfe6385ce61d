"""The model card: metadata that the hub reads, and facts of the run."""

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_checkpoints import write_checkpoint
from tiny_runs import run, settings, some_tokens

from ream_stream.calibration.tokens import joined
from ream_stream.checkpoint.source_card import source_metadata
from ream_stream.compression.model_card import base_model

SOURCE_CARD = """---
license: other
license_name: some-license
license_link: LICENSE
language: [en, fr]
tags: [chat]
eval_results: 3
---
# Source
"""


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory):
    """Give an output made of a source with a card, on two domains."""
    folder = (
        tmp_path_factory.mktemp("card") / "models--some--Model-8x" / "snapshots" / ("f" * 40)
    )
    folder.parent.mkdir(parents=True)
    source = write_checkpoint(folder, "qwen3_moe", torch.bfloat16)
    (source / "README.md").write_text(SOURCE_CARD, encoding="utf-8")
    tokens = joined({"code": some_tokens(3), "math": some_tokens(1)}, description="mix")
    return run(source, folder.parents[2] / "out", settings(6), tokens)


def test_the_hub_s_own_reader_finds_the_metadata(made):
    data = ModelCard.load(made.output / "README.md").data
    assert data.base_model == "some/Model-8x"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["mixture-of-experts", "expert-merging"]
    assert (data.license, data.license_name, data.license_link) == (
        "other", "some-license", "LICENSE",
    )  # fmt: skip
    assert data.language == ["en", "fr"]
    assert "eval_results" not in data.to_dict()


def test_the_card_tells_the_facts_of_the_run(made):
    text = (made.output / "README.md").read_text(encoding="utf-8")
    assert "# some/Model-8x, 8 experts a layer merged to 6" in text
    groups = [group for layer in made.manifest["layers"] for group in layer["groups"]]
    merged = sum(len(group) > 1 for group in groups)
    assert f"{merged} of {len(groups)} experts were merged of several" in text
    assert (
        f"4 sequences of 12 tokens, 75% code, 25% math (digest `{made.tokens.digest}`)" in text
    )


def test_pruned_experts_are_told_as_byte_copies(checkpoints, tmp_path):
    wanted = settings(6, grouping="none")
    made = run(checkpoints("mixtral"), tmp_path / "out", wanted)
    text = (made.output / "README.md").read_text(encoding="utf-8")
    assert "All 18 experts that are left are byte copies." in text
    assert ModelCard.load(made.output / "README.md").data.tags[1] == "expert-pruning"


CARDS = {
    "none": "# Source",
    "not closed": "---\nlicense: mit\n# Source",
    "no mapping": "---\n- mit\n---\n",
    "other types": "---\nlicense: {a: b}\nlanguage: []\npipeline_tag: [[a]]\n---\n",
    "codes of a terminal": '---\nlicense: "\\e[2J"\nlanguage: "\\ud800"\n---\n',
    "a card larger than is read": "---\nlicense: mit\nx: " + 200_000 * "x" + "\n---\n",
}


@pytest.mark.parametrize("name", CARDS)
def test_a_source_card_that_says_nothing_gives_nothing(tmp_path, name):
    (tmp_path / "README.md").write_text(CARDS[name], encoding="utf-8")
    assert source_metadata(tmp_path) == ({}, None)


def test_a_card_that_is_missing_or_a_folder_gives_nothing(tmp_path):
    assert source_metadata(tmp_path) == ({}, None)
    (tmp_path / "README.md").mkdir()
    assert source_metadata(tmp_path) == ({}, None)


UNREADABLE = {
    "no YAML": "license: [",
    "deep": "license: " + 20_000 * "[",
    "a name twice": "license: mit\nlicense: other",
    "a character out of range": 'license: "\\UFFFFFFFF"',
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_card_whose_head_cannot_be_read_is_noted(tmp_path, name):
    head = f"---\n{UNREADABLE[name]}\n---\n"
    (tmp_path / "README.md").write_text(head, encoding="utf-8")
    values, note = source_metadata(tmp_path)
    assert values == {}
    assert "cannot be read" in note


@pytest.mark.parametrize(
    "line",
    [
        "date: 2023-02-31",
        "x: " + 6000 * "9",
        "y: !!timestamp foo",
        "z: !!bool foo",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "a: &a {b: c}\n<<: [*a, *a, *a]",
        "when: .nan\n1: 2\n~: ~",
    ],
)
def test_what_looks_like_a_number_or_a_date_in_a_card_is_text(tmp_path, line):
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{line}\n---\n", encoding="utf-8")
    assert source_metadata(tmp_path) == ({"license": "mit"}, None)


def test_a_card_with_windows_line_ends_is_read(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\nText\r\n")
    assert source_metadata(tmp_path) == ({"license": "mit"}, None)


def test_a_folder_s_name_is_a_base_model_only_if_the_hub_takes_it(tmp_path):
    assert base_model(tmp_path / "Qwen3-30B-A3B") == "Qwen3-30B-A3B"
    assert base_model(tmp_path / "my model") is None
