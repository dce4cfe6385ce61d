"""Numbers of experts that servers refuse, and what the plan says of others."""

import json

import pytest
import torch
from command_line import call
from tiny_checkpoints import read_config, write_checkpoint
from tiny_runs import (
    forward_in_transformers,
    forward_streamed,
    plan_for,
    run,
    settings,
    some_tokens,
)

from ream_stream.errors import UsageError
from ream_stream.model.families import with_expert_count
from ream_stream.planning.serving_limits import check_served


@pytest.mark.parametrize("experts", [4, 24, 96, 100, 384, 410])
def test_a_multiple_of_4_or_all_there_are_may_be_kept(experts):
    check_served(experts, 410, 1)


@pytest.mark.parametrize(
    ("experts", "groups", "multiple"), [(103, 1, 4), (154, 8, 8), (410, 6, 12)]
)
def test_other_numbers_are_refused_with_who_refuses_them_and_what_to_do(
    experts, groups, multiple
):
    with pytest.raises(UsageError) as caught:
        check_served(experts, 512, groups)
    said = str(caught.value)
    assert said.startswith(f"--experts {experts}: ")
    for words in ("TensorRT-LLM", f"keep a multiple of {multiple},", "--any-count"):
        assert words in said


def test_the_plan_refuses_a_number_unless_any_will_do(capsys, checkpoints):
    source = checkpoints("olmoe")
    status, out, err = call(capsys, "plan", source, "--experts", 6)
    assert (status, out) == (2, "")
    assert "--any-count" in err
    known = json.loads(call(capsys, "plan", source, "--experts", 6, "--any-count", "--json")[1])
    assert [note.split(":")[0] for note in known["notes"]] == [
        "TensorRT-LLM, FlashInfer", "SGLang, AITER (ROCm)", "vLLM",
    ]  # fmt: skip
    assert call(capsys, "plan", source, "--experts", 4)[0] == 0
    kept = json.loads(call(capsys, "plan", source, "--experts", 8, "--json")[1])
    assert kept["notes"] == []


def test_notes_stand_under_the_number_in_the_table(capsys, checkpoints):
    out = call(capsys, "plan", checkpoints("olmoe"), "--experts", 4)[1]
    at = next(
        n for n, line in enumerate(out.splitlines()) if line.startswith("experts a layer")
    )
    assert out.splitlines()[at + 1].split()[:3] == ["note", "vLLM:", "works"]


def test_a_list_that_repeats_the_number_follows_it():
    config = {"moe_num_experts": 64, "moe_capacity": [64, 64, 128]}
    assert with_expert_count(config, 64, 48) == {
        "moe_num_experts": 48,
        "moe_capacity": [48, 48, 128],
    }


def test_layers_that_send_tokens_to_different_numbers_of_experts(tmp_path):
    folder = write_checkpoint(tmp_path / "source", "hunyuan_v1_moe", torch.bfloat16)
    config = {**read_config(folder), "moe_topk": [2, 4, 3]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UsageError, match="sends each token to 4 experts"):
        plan_for(folder, some_tokens(), settings(3))
    done = run(folder, tmp_path / "out", settings(6))
    assert read_config(done.output)["moe_topk"] == [2, 4, 3]
    inputs = [(done.tokens.input_ids_SL, None)]
    [full] = forward_in_transformers(done.output, torch.float32, inputs)
    [streamed] = forward_streamed(done.output, torch.float32, inputs)
    assert torch.equal(streamed.logits, full.logits)
