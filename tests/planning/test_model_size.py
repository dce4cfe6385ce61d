"""How large models are said to be."""

import shutil

import pytest
import quantized
import torch
from tiny_checkpoints import add_mtp, load_tensors
from tiny_runs import plan_for, settings, some_tokens

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.planning.model_size import context_length, model_size, stored_as


# each has another key for the experts of a token, or another layout of the experts
@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", "ernie4_5_moe", "hunyuan_v1_moe", "gemma4_text", "kimi_linear", "gpt_oss"],
)
def test_parameters_are_the_numbers_of_the_files_and_the_selected_experts_those_of_the_model(
    checkpoints, family
):
    folder = checkpoints(family)
    checkpoint = open_checkpoint(folder)
    size, plan = model_size(checkpoint), plan_for(folder, some_tokens(), settings(6))
    assert size.total == sum(tensor.numel() for tensor in load_tensors(folder).values())
    assert size.top_k == plan.top_k
    expert = sum(count * each for count, each in size.experts) // plan.num_experts
    assert size.total - size.active == (plan.num_experts - plan.top_k) * expert
    # router rows go with their experts
    assert size.with_experts(6) == model_size(plan.output_model.checkpoint)


@pytest.mark.parametrize("name", ["deepseek_v3-fp8", "gpt_oss-mxfp4", "qwen3_moe-nvfp4"])
def test_quantized_parameters_count_as_the_floats_that_they_stand_for(tmp_path, name):
    coded, plain = quantized.write(tmp_path, name, torch.bfloat16)
    one, other = open_checkpoint(coded), open_checkpoint(plain)
    assert model_size(one).total == model_size(other).total
    assert model_size(one).active == model_size(other).active
    assert (stored_as(one), stored_as(other)) == (one_scheme(name), "BF16")


def one_scheme(name):
    return {"fp8": "fp8-block", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}[name.rpartition("-")[2]]


def test_a_multi_token_prediction_layer_is_not_counted(checkpoints, tmp_path):
    source = checkpoints("deepseek_v3")
    folder = shutil.copytree(source, tmp_path / "mtp")
    assert add_mtp(folder, "deepseek_v3")
    assert model_size(open_checkpoint(folder)) == model_size(open_checkpoint(source))


def test_what_config_json_does_not_tell_is_unknown():
    assert context_length({"max_position_embeddings": "many"}) is None
    assert context_length({"text_config": {"max_position_embeddings": 64}}) == 64
    assert context_length({"model_max_length": 128}) == 128
