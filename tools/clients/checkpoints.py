"""Small checkpoints of families as the hub has them: their config keys, names and formats.

Servers read keys that transformers has defaults for, so config.json is written here as the
named model's is, with smaller numbers; weights are drawn so that logits differ.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ream_stream.checkpoint.formats import Fp8Block
from ream_stream.cli.demo import CHECKPOINT

_COMMON: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 4096,
}
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    # these two are as published: attention kernels are for them alone
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}

HUB: Mapping[str, Mapping[str, Any]] = {
    # Qwen/Qwen3-30B-A3B
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 32,
        "max_window_layers": 3,
        "mlp_only_layers": [],
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    # Qwen/Qwen1.5-MoE-A2.7B
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "max_window_layers": 3,
        "moe_intermediate_size": 128,
        "norm_topk_prob": False,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 256,
        "sliding_window": 2048,
        "use_sliding_window": False,
    },
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": 128,
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    # allenai/OLMoE-1B-7B-0924
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "intermediate_size": 128,
        "norm_topk_prob": False,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-5,
        "router_aux_loss_coef": 0.01,
    },
    # deepseek-ai/DeepSeek-V2
    "deepseek_v2": {
        **_LATENT,
        "architectures": ["DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 128,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 32,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 4,
        "pretraining_tp": 1,
        "routed_scaling_factor": 16.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    # deepseek-ai/DeepSeek-V3
    "deepseek_v3": {
        **_LATENT,
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 128,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 4,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
    },
    # zai-org/GLM-4.5-Air
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 32,
        "moe_intermediate_size": 128,
        "n_group": 1,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 4,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
        "vocab_size": 4224,
    },
    # openai/gpt-oss-20b, without its MXFP4
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "intermediate_size": 384,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_experts_per_tok": 4,
        "num_local_experts": 32,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "max_position_embeddings": 131072,
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    },
    # ibm-granite/granite-3.0-1b-a400m-base
    "granitemoe": {
        "architectures": ["GraniteMoeForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.03125,
        "embedding_multiplier": 6.0,
        "intermediate_size": 128,
        "logits_scaling": 3.0,
        "num_experts_per_tok": 4,
        "num_local_experts": 32,
        "output_router_logits": False,
        "residual_multiplier": 0.5,
        "router_aux_loss_coef": 0.0,
        "tie_word_embeddings": True,
    },
    # baidu/ERNIE-4.5-21B-A3B-PT
    "ernie4_5_moe": {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "moe_capacity": [64, 64, 64],
        "moe_gate": "topk",
        "moe_intermediate_size": 128,
        "moe_k": 4,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_experts": 32,
        "moe_num_shared_experts": 2,
        "moe_use_aux_free": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    # rednote-hilab/dots.llm1.base
    "dots1": {
        "architectures": ["Dots1ForCausalLM"],
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "head_dim": 32,
        "moe_intermediate_size": 128,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 32,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "sliding_window": None,
        "topk_group": 1,
        "topk_method": "noaux_tc",
    },
    # MiniMaxAI/MiniMax-M2
    "minimax_m2": {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1, 1, 1],
        "head_dim": 32,
        "intermediate_size": 128,
        "num_experts_per_tok": 4,
        "num_local_experts": 32,
        "qk_norm_type": "per_layer",
        "rope_theta": 5000000,
        "rotary_dim": 16,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_mtp": False,
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
}
"""config.json of families, beside what all have, by model type."""

SPECIAL_TOKENS = {"glm4_moe": ("[gMASK]", "<sop>", "<|user|>", "<|observation|>")}
"""Tokens that a converter looks for, beside the packaged tokenizer's."""

BUILT_IN = "built-in"
FP8 = "qwen3_moe FP8"
NAMES = (BUILT_IN, *HUB, FP8)
"""All sources: the packaged checkpoint, a drawn one of each family, and one in FP8."""


def write_source(name: str, folder: Path) -> Path:
    """Write a source of `NAMES` with the packaged tokenizer, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    if name == BUILT_IN:
        shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model_type = "qwen3_moe" if name == FP8 else name
    config = common_config(model_type)
    if name == FP8:
        config["moe_intermediate_size"] = 512  # slices are of whole blocks of 128
    text = json.dumps(config, indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    draw(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    if name == FP8:
        config["quantization_config"] = _encode(folder / "model.safetensors")
        text = json.dumps(config, indent=2)
    write_tokenizer(folder, SPECIAL_TOKENS.get(model_type, ()))
    # what transformers wrote last has its own key names
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def write_tokenizer(folder: Path, special: Sequence[str] = ()) -> None:
    """Write the packaged tokenizer, with more special tokens after its own."""
    for path in CHECKPOINT.glob("*token*.json"):
        shutil.copy(path, folder)
    path = folder / "tokenizer.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    for number, content in enumerate(special, start=len(known["model"]["vocab"])):
        known["added_tokens"].append(
            {**known["added_tokens"][0], "id": number, "content": content}
        )
    path.write_text(json.dumps(known), encoding="utf-8")


def common_config(model_type: str) -> dict[str, Any]:
    """Return config.json of a family."""
    return {"model_type": model_type, **_COMMON, **HUB[model_type]}


def draw(model: torch.nn.Module) -> None:
    """Draw weights for which hidden states keep their size and logits differ by about 2."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("inv_freq"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if key.endswith(("e_score_correction_bias", "bias", "sinks")):
                tensor.copy_(0.1 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.1 * noise)
            elif "embed" in key:
                tensor.copy_(noise)
            else:
                fan_in = tensor.shape[-1 if tensor.dim() == 2 else -2]
                tensor.copy_(noise * 1.5 * fan_in**-0.5)


def _encode(path: Path) -> dict[str, Any]:
    """Encode the linear layers of a checkpoint as FP8 models of the hub have them."""
    codec, tensors = Fp8Block(block=(128, 128)), {}
    for key, tensor in load_file(path).items():
        if key.endswith("proj.weight"):
            stem = key.removesuffix(".weight")
            parts = codec.encode(tensor.float())
            tensors |= {stem + suffix: part.contiguous() for suffix, part in parts.items()}
        else:
            tensors[key] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
