"""Vision-language checkpoints: the text decoder is compressed, all else is copied."""

import json
from functools import cache

import pytest
import torch
from test_pipeline import groups_by_layer, same_bits
from tiny_checkpoints import load_tensors, read_config, save_tensors
from tiny_families import FIRST_DENSE, LINEAR, SHAPE, TINY, TOP_K
from tiny_runs import forward_streamed, run, same_in, settings, some_tokens
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ream_stream.errors import UnsupportedModelError
from ream_stream.evaluation.source_diff import against
from ream_stream.evaluation.verify import verify
from ream_stream.model.meta_model import build_skeleton

TEXT = {
    **SHAPE,
    "pad_token_id": 0,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": TOP_K,
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
WRAPPERS = {
    "qwen3_5_moe": {
        "num_experts": 8,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "rope_parameters": {**ROTARY, "partial_rotary_factor": 1.0},
        **LINEAR,
    },
    "qwen3_vl_moe": {"num_experts": 8, "rope_parameters": ROTARY},
    "gemma4": {
        **TINY["gemma4_text"].config,
        "moe_intermediate_size": 24,
    },
    "llama4": {
        **TINY["llama4_text"].config,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "kimi_k25": {"model_type": "deepseek_v3", **TINY["deepseek_v3"].config},
    "step3p7": {
        "n_routed_experts": 8,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "share_expert_dim": 16,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "swiglu_limits": [0.0, 0.0, 0.5],
        "moe_router_scaling_factor": 2.0,
    },
    "glm4v_moe": {
        **FIRST_DENSE,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {**ROTARY, "partial_rotary_factor": 1.0},
    },
}
VISION = {
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_attention_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 8,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
NAMES = [
    name if name == "qwen3_vl_moe" else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(WRAPPERS)
]
COUNT = {
    "qwen3_5_moe": "num_experts",
    "qwen3_vl_moe": "num_experts",
    "gemma4": "num_experts",
    "step3p7": "moe_num_experts",
}


def write(folder, name):
    default = CONFIG_MAPPING[name]()
    tokens = (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    )
    given = {key: 63 for key in tokens if hasattr(default, key)}
    if default.vision_config is not None:
        given["vision_config"] = {
            k: v for k, v in VISION.items() if hasattr(default.vision_config, k)
        }
    config = AutoConfig.for_model(name, text_config={**TEXT, **WRAPPERS[name]}, **given)
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText._model_mapping[type(config)]
    model = kind._from_config(config, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() > 1 and not key.endswith("inv_freq"):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=draw))
    model.save_pretrained(folder)
    tensors = load_tensors(folder)
    if name == "kimi_k25":  # transformers 5.23 gives the decoder's layers another name
        tensors = {
            key.replace("model.blocks.", "model.layers."): t for key, t in tensors.items()
        }
    if name == "qwen3_vl_moe":  # published with inputs as rows
        tensors = {
            key: t.transpose(1, 2).contiguous()
            if ".experts." in key and _is_plain(key, t)
            else t
            for key, t in tensors.items()
        }
    tensors["mtp.norm.weight"] = torch.ones(3)
    save_tensors(folder, tensors)
    values = read_config(folder)
    text = values["text_config"]
    for key in ("num_local_experts", "n_routed_experts"):
        if name in COUNT and key in text:
            text[COUNT[name]] = text.pop(key)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def _is_plain(key, tensor):
    return tensor.shape[1] == (48 if key.endswith("gate_up_proj") else 32)


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    return cache(lambda name: write(tmp_path_factory.mktemp("wrappers") / name, name))


@torch.no_grad()
def logits_in_transformers(folder, dtype, ids_BL, mask_BL):
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.data = parameter.data.clone()
    return model.eval()(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_the_text_decoder_of_a_wrapper_has_the_bits_of_the_whole(wrapper, name):
    folder, tokens = wrapper(name), some_tokens(padded=True)
    for mask_BL in (None, tokens.attention_mask_SL):
        inputs = [(tokens.input_ids_SL, mask_BL)]
        for dtype in (torch.float32, torch.bfloat16):
            want = logits_in_transformers(folder, dtype, *inputs[0])
            same = same_in(name, dtype)
            assert same(forward_streamed(folder, dtype, inputs)[0].logits, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_is_compressed_and_all_but_its_decoder_copied(wrapper, tmp_path, name):
    source = wrapper(name)
    done = run(source, tmp_path / "out", settings(6))
    findings = [*verify(done.output, load=True, run=True), *against(done.output, source)]
    assert [finding.message for finding in findings if not finding.ok] == []
    assert groups_by_layer(done)
    want, have = load_tensors(source), load_tensors(done.output)
    decoder = "model.layers." if name == "step3p7" else "language_model"
    rest = [key for key in want if ".layers." not in key or decoder not in key]
    assert {"mtp.norm.weight"} <= set(rest)
    assert all(same_bits(have[key], want[key]) for key in rest)
    before, after = read_config(source), read_config(done.output)
    changed = {k for k in before if before[k] != after[k]}
    assert changed == {"text_config"}
    text = {k for k, v in before["text_config"].items() if v != after["text_config"][k]}
    assert len(text) == 1
    assert after["text_config"][text.pop()] == 6
    ids_BL = done.tokens.input_ids_SL
    want = logits_in_transformers(done.output, torch.float32, ids_BL, None)
    ours = forward_streamed(done.output, torch.float32, [(ids_BL, None)])[0].logits
    assert same_in(name, torch.float32)(ours, want)


def test_a_decoder_that_transformers_has_in_a_wrapper_alone_is_refused_without_it():
    with pytest.raises(UnsupportedModelError, match="of no model that gives logits"):
        build_skeleton({"model_type": "step3p5"}, torch.bfloat16, torch.device("cpu"))
