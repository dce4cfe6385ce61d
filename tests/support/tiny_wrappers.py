"""A tiny checkpoint of each vision-language wrapper, as its files lie on the hub."""

import json

import torch
from tiny_checkpoints import load_tensors, read_config, save_tensors
from tiny_families import FIRST_DENSE, LINEAR, SHAPE, TINY, TOP_K
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

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
COUNT = {
    "qwen3_5_moe": "num_experts",
    "qwen3_vl_moe": "num_experts",
    "gemma4": "num_experts",
    "step3p7": "moe_num_experts",
}


def write_wrapper(folder, name):
    """Write the checkpoint of a wrapper, with the config keys that the hub has."""
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
