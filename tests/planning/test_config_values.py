"""Values of config.json that are not as transformers expects them: a plan, or one sentence."""

import json
import resource
import shutil

import pytest
from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from tiny_checkpoints import load_tensors, save_tensors
from tiny_runs import settings

from ream_stream.__main__ import main
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.errors import DamagedError, ReamStreamError, UnsupportedModelError
from ream_stream.planning.planner import make_plan

NASTY = [
    0, -1, 1, 3, 10**9, 10**30, -(10**30), 0.5, 1e300, float("nan"), float("inf"), True, None,
    "", "8", "garbage", "\x1b[2J", [], [0], [None] * 3, ["a"], [[[]]], {}, {"type": "x"},
    {"rope_type": "yarn", "factor": 0}, {"rope_type": "longrope", "short_factor": ["x"]},
    {"0": "a", "b": None}, 40 * "[", 1 << 62,
]  # fmt: skip
MORE = {
    "num_labels": 2, "id2label": {}, "rope_scaling": None, "rope_parameters": None,
    "torch_dtype": "float32", "dtype": "float32", "layer_types": None, "sliding_window": 8,
    "head_dim": 8, "quantization_config": None, "text_config": None, "n_group": 1,
    "topk_group": 1, "num_nextn_predict_layers": 0, "max_window_layers": 2,
    "use_sliding_window": False, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss"]


def planned(source):
    """Plan; return the plan or the error of ours that it ends in."""
    try:
        return make_plan(open_checkpoint(source), settings(6), 4, 12)
    except ReamStreamError as error:
        return error


@pytest.fixture(scope="module")
def copies(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    return {n: shutil.copytree(checkpoints(n), folder / n) for n in FAMILIES}


@bounds(max_examples=20)
@given(st.data())
def test_a_value_of_any_key_is_planned_or_refused(copies, checkpoints, data):
    check(copies, checkpoints, data)


@pytest.mark.slow
@bounds(max_examples=500)
@given(st.data())
def test_any_value_of_any_key_is_planned_or_refused(copies, checkpoints, data):
    check(copies, checkpoints, data)


def check(copies, checkpoints, data):
    name = data.draw(st.sampled_from(FAMILIES))
    config = json.loads((checkpoints(name) / "config.json").read_text(encoding="utf-8"))
    key = data.draw(st.sampled_from(sorted({*config, *MORE})))
    config[key] = data.draw(st.sampled_from(NASTY))
    (copies[name] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_SELF)
    planned(copies[name])
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 10
    assert (after.ru_maxrss - before.ru_maxrss) * 1024 < 1 << 30


REFUSED = {
    "experts a token": ({"num_experts_per_tok": -1}, "sends each token to -1 of 8 experts"),
    "more than there are": ({"num_experts_per_tok": 9}, "sends each token to 9 of 8 experts"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, the checkpoint"),
    "heads": ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000, which is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_that_cannot_be_are_damage_told_by_key(copies, checkpoints, name):
    changes, words = REFUSED[name]
    config = json.loads((checkpoints("qwen3_moe") / "config.json").read_text(encoding="utf-8"))
    path = copies["qwen3_moe"] / "config.json"
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
    error = planned(copies["qwen3_moe"])
    assert isinstance(error, DamagedError)
    assert words in str(error)


def test_labels_without_bounds_are_not_made(copies, checkpoints):
    config = json.loads((checkpoints("qwen3_moe") / "config.json").read_text(encoding="utf-8"))
    path = copies["qwen3_moe"] / "config.json"
    path.write_text(json.dumps({**config, "num_labels": 10**9}), encoding="utf-8")
    assert planned(copies["qwen3_moe"]).config["num_labels"] == 10**9


def test_what_transformers_raises_is_told_with_its_kind(copies, checkpoints):
    config = json.loads((checkpoints("qwen3_moe") / "config.json").read_text(encoding="utf-8"))
    path = copies["qwen3_moe"] / "config.json"
    path.write_text(json.dumps({**config, "hidden_act": "garbage"}), encoding="utf-8")
    error = planned(copies["qwen3_moe"])
    assert isinstance(error, UnsupportedModelError)
    assert "KeyError" in str(error)


@pytest.mark.parametrize(
    "number", ["000", "01", 5000 * "9", str(10**20), "-1", "\u0661"], ids=ascii
)
def test_numbers_in_names_that_are_none_are_refused(checkpoints, tmp_path, capsys, number):
    source = shutil.copytree(checkpoints("mixtral"), tmp_path / "source")
    tensors = load_tensors(source)
    named = {n.replace("experts.1.", f"experts.{number}."): t for n, t in tensors.items()}
    save_tensors(source, named)
    capsys.readouterr()
    assert main(["plan", str(source), "--experts", "4"]) in {3, 10}
    assert capsys.readouterr().err.count("\n") == 1
