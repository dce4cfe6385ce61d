"""The model card: metadata that the hub reads, and facts of the run."""

import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_checkpoints import write_checkpoint
from tiny_runs import run, settings, some_tokens

from ream_stream.calibration.tokens import joined
from ream_stream.checkpoint.source_card import hub_name, source_metadata, source_name
from ream_stream.cli import cli
from ream_stream.compression.config import RunOptions
from ream_stream.compression.method_settings import settings_for
from ream_stream.compression.model_card import with_quality
from ream_stream.planning.slice_shape import ExpertLayer

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
    told = f"{merged} merged of several, {len(groups) - merged} byte copies"
    assert f"Of {len(groups)} experts that are left: {told}." in text
    assert "[REAM](https://arxiv.org/abs/2604.04356), [REAP](https" in text
    assert text.endswith("## License\n\nThat of the source: some-license.\n")
    assert "Not measured yet" in text
    assert (
        f"4 sequences of 12 tokens, 75% code, 25% math (digest `{made.tokens.digest}`)" in text
    )


def test_pruned_experts_are_told_as_byte_copies(checkpoints, tmp_path):
    wanted = settings(6, grouping="none")
    made = run(checkpoints("mixtral"), tmp_path / "out", wanted)
    text = (made.output / "README.md").read_text(encoding="utf-8")
    assert "All 18 experts that are left are byte copies." in text
    # a folder's name is no name on the hub, and nobody told the license
    assert "base_model" not in text
    assert "Not known: the card of the source names none" in text
    assert ModelCard.load(made.output / "README.md").data.tags[1] == "expert-pruning"


def test_slices_are_told_as_cut_and_not_as_byte_copies(checkpoints, tmp_path):
    wanted = settings(12, grouping="none", slices=2)
    made = run(checkpoints("mixtral"), tmp_path / "out", wanted)
    text = (made.output / "README.md").read_text(encoding="utf-8")
    assert "8 experts a layer of width 24 cut and pruned to 12 of width 12" in text
    assert "All 36 experts that are left are cut from the source's, with down" in text
    assert "byte copies" not in text


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


def test_refitted_experts_are_not_told_as_byte_copies(checkpoints, tmp_path):
    source, tokens = checkpoints("qwen3_moe", torch.float32), some_tokens(20, 24)
    for refit_experts in ("all", "changed"):
        wanted = settings(6, refit="down", refit_experts=refit_experts)
        made = run(source, tmp_path / refit_experts, wanted, tokens)
        text = (made.output / "README.md").read_text(encoding="utf-8")
        layers = made.manifest["layers"]
        groups = [group for layer in layers for group in layer["groups"]]
        helped = [layer for layer in layers if layer["refitted"]["penalty"] is not None]
        refitted = [
            group
            for layer in helped
            for group in layer["groups"]
            if refit_experts == "all" or len(group) > 1
        ]
        alone = sum(len(group) == 1 and group not in refitted for group in groups)
        assert helped
        assert f"{len(refitted)} with refitted down projections" in text
        assert (f"{alone} byte copies" in text) == bool(alone)
        assert f"they helped in {len(helped)} of {len(layers)} layers" in text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grouping": "none", "refit": "down", "saliency": "energy"},
        {"grouping": "hc-smoe", "gate_term": False, "seed": 3, "sequential": False},
        {"grouping": "none", "slices": 2, "saliency": "energy", "refit": "down"},
        {
            "group_size": 3,
            "refit": "down",
            "refit_lambda": (0.5, 2.0),
            "max_shard_bytes": 7 << 20,
        },
    ],
)
def test_the_command_of_a_card_asks_for_the_settings_it_was_made_with(
    checkpoints, tmp_path, changes
):
    made = run(
        checkpoints("qwen3_moe"), tmp_path / "out", settings(6, **changes), some_tokens(20)
    )
    text = (made.output / "README.md").read_text(encoding="utf-8")
    command = text.partition("## How it was made\n\n```\n")[2].partition("\n```")[0]
    program, verb, source, output, *words = shlex.split(command)
    assert (program, verb, output) == ("ream-stream", "compress", "OUTPUT")
    assert source == checkpoints("qwen3_moe").name
    assert str(tmp_path) not in text
    values = (
        cli.commands[verb]
        .make_context(verb, [str(checkpoints("qwen3_moe")), output, *words])
        .params
    )
    own = {"as_json", "verbose", "dry_run", "restart", "keep_work", "quiet"}
    asked = RunOptions.of(**{k: v for k, v in values.items() if k not in own})
    known = made.manifest["fingerprint"]
    machine = {name: known[name] for name in ("compute_dtype", "device_kind")}
    found = settings_for(asked, ExpertLayer(count=8, inner=16), **machine).fields()
    assert found == {name: known[name] for name in found}
    assert (asked.sequences, asked.sequence_length, asked.any_count) == (20, 12, True)


MEASURED = {
    "perplexity": 12.5,
    "predicted": 90,
    "divergence": {"value": 0.1, "stderr": None},
    "against": {"perplexity": 11.0},
    "difference": {"nats": 0.125, "stderr": 0.01},
    "agreement": {"value": 0.875, "stderr": 0.01},
}


def test_what_was_measured_takes_the_place_of_what_was_measured_before(made):
    text = (made.output / "README.md").read_text(encoding="utf-8")
    named = {**MEASURED, "domains": {"a|b\x1b[2J": {**MEASURED, "perplexity": None}}}
    once = with_quality(text, named)
    assert "| all | 90 | 12.500 | 11.000 | +0.1250 | 87.5% |" in once
    assert "| a\\|b\\x1b[2J | 90 | - | 11.000 |" in once
    assert "Not measured yet" not in once
    alone = {"perplexity": 2.0, "predicted": 3}
    twice = with_quality(once, alone)
    assert "| all | 3 | 2.000 |\n\n## Use" in twice
    assert "87.5%" not in twice
    assert twice.replace(twice.partition("## Quality")[2].partition("## Use")[0], "") == (
        text.replace(text.partition("## Quality")[2].partition("## Use")[0], "")
    )
    with pytest.raises(ValueError, match="no section"):
        with_quality("# mine", alone)


def test_a_base_model_is_a_name_of_the_hub_and_of_a_folder_only_in_its_caches(tmp_path):
    commit = "f" * 40
    cached = tmp_path / "models--some--Model-8x" / "snapshots" / commit
    headers = tmp_path / "ream-stream" / "some" / commit / "Model-8x"
    assert hub_name(cached) == hub_name(headers) == "some/Model-8x"
    for name in ("Qwen3-30B-A3B", "my model", "models--broken"):
        assert hub_name(tmp_path / name) is None
        assert source_name(tmp_path / name) == name
