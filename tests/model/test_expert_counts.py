"""Every key of config.json that tells the number of experts is patched."""

import json
import shutil

import pytest
import torch
from tiny_checkpoints import read_config
from tiny_families import TINY
from tiny_runs import forward_in_transformers, run, settings
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ream_stream.evaluation.source_diff import against
from ream_stream.evaluation.verify import verify
from ream_stream.model.families import COUNT_KEYS, FAMILIES, with_expert_count
from ream_stream.model.meta_model import ALIASES


@pytest.mark.parametrize("name", FAMILIES)
def test_each_key_that_a_class_reads_is_patched(name):
    kind = CONFIG_MAPPING[ALIASES.get(name, name)]
    own = {kind.attribute_map.get(key, key) for key in COUNT_KEYS if hasattr(kind(), key)}
    assert {key for key, of in kind.attribute_map.items() if of in own} <= set(COUNT_KEYS)
    read = 0
    for key in COUNT_KEYS:
        before = {each: getattr(kind.from_dict({key: 40}), each) for each in own}
        patched = kind.from_dict(with_expert_count({key: 40}, 40, 36))
        after = {each: getattr(patched, each) for each in own}
        assert after == {each: 36 if count == 40 else count for each, count in before.items()}
        read += before != after
    assert read


def with_counts(folder, source, name, counts):
    shutil.copytree(source, folder)
    config = read_config(folder)
    del config[TINY[name].count_key]
    (folder / "config.json").write_text(json.dumps({**config, **counts}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "counts", "told"),
    [
        ("deepseek_v3", {"num_local_experts": 8}, {"num_local_experts": 6}),
        (
            "glm4_moe",
            {"num_local_experts": 8, "n_routed_experts": 8},
            {"num_local_experts": 6, "n_routed_experts": 6},
        ),
        pytest.param(
            "glm_moe_dsa",
            {"n_routed_experts": 8, "num_experts": 8},
            {"n_routed_experts": 6, "num_experts": 6},
            marks=pytest.mark.slow,
        ),
        # the class's default, and a key that it does not read
        ("mixtral", {"moe_num_experts": 32}, {"moe_num_experts": 32, "num_local_experts": 6}),
        ("mixtral", {}, {"num_local_experts": 6}),
    ],
)
def test_an_output_loads_whichever_keys_told_the_count(
    checkpoints, tmp_path, name, counts, told
):
    folder = with_counts(tmp_path / "source", checkpoints(name), name, counts)
    done = run(folder, tmp_path / "out", settings(6, grouping="none"))
    config = read_config(done.output)
    assert {key: config[key] for key in COUNT_KEYS if key in config} == told
    findings = [*verify(done.output, load=True), *against(done.output, folder)]
    assert [finding.message for finding in findings if not finding.ok] == []
    forward_in_transformers(done.output, torch.float32, [(done.tokens.input_ids_SL, None)])


def test_counts_of_layers_and_of_a_text_decoder_are_patched_and_other_numbers_are_not():
    config = {
        "text_config": {
            "num_experts": 8,
            "hidden_size": 8,
            "per_layer_config": {"1": {"num_experts": 8, "head_dim": 8}},
        },
        "num_local_experts": [8, 1, 8],
        "n_routed_experts": 16,
        "vision_config": {"num_experts": 8},
    }
    assert with_expert_count(config, 8, 6) == {
        "text_config": {
            "num_experts": 6,
            "hidden_size": 8,
            "per_layer_config": {"1": {"num_experts": 6, "head_dim": 8}},
        },
        "num_local_experts": [6, 1, 6],
        "n_routed_experts": 16,
        "vision_config": {"num_experts": 8},
    }


def test_a_count_that_was_left_is_told(checkpoints, tmp_path):
    folder = with_counts(
        tmp_path / "source", checkpoints("mixtral"), "mixtral", {"num_local_experts": 8}
    )
    done = run(folder, tmp_path / "out", settings(6, grouping="none"))
    path = done.output / "config.json"
    config = {**read_config(done.output), "n_routed_experts": 8}
    path.write_text(json.dumps(config), encoding="utf-8")
    bad = [finding.message for finding in verify(done.output, scan=False) if not finding.ok]
    assert bad == ["config.json says n_routed_experts=8, the manifest that 6 of them are kept"]
