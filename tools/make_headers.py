"""Write header-only checkpoints in the shapes of models that fit on few machines.

    python tools/make_headers.py deepseek-v3 TARGET
    ream-stream plan TARGET --keep 75% --ram 16GiB

Names, shapes and dtypes are those of the published checkpoints in bf16, the layers of
multi-token prediction left out; of DeepSeek-V4 those of the published one, in FP4 and FP8,
with that layer. The numbers themselves are not there. A few megabytes.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ream_stream.checkpoint.formats import Codec, Fp8Block, Mxfp4
from ream_stream.checkpoint.reader import INDEX
from ream_stream.checkpoint.shards import PlannedTensor, cut, name_shards
from ream_stream.model.meta_model import build_skeleton

SHARD_BYTES = 5_000_000_000

_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "deepseek-v3": {
        **_DEEPSEEK,
        "vocab_size": 129280,
        "n_routed_experts": 256,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 163840,
    },
    "kimi-k2": {
        **_DEEPSEEK,
        "vocab_size": 163840,
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "max_position_embeddings": 131072,
    },
    "glm-4.6": {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": 151552,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 92,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 160,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 1,
        "topk_group": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "partial_rotary_factor": 0.5,
        "rope_theta": 1000000.0,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 202752,
        "tie_word_embeddings": False,
    },
    "deepseek-v4-flash": {
        "model_type": "deepseek_v4",
        "architectures": ["DeepseekV4ForCausalLM"],
        "vocab_size": 129280,
        "hidden_size": 4096,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 43,
        "num_hash_layers": 3,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-06,
        "sliding_window": 128,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
        "compress_rope_theta": 160000,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "max_position_embeddings": 1048576,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    },
}

_V4_NAMES = {
    r"^model\.": "",
    r"^embed_tokens\.": "embed.",
    r"^lm_head\.": "head.",
    r"^hc_head\.hc_": "hc_head_",
    r"\.self_attn\.": ".attn.",
    r"\.mlp\.": ".ffn.",
    r"\.input_layernorm\.": ".attn_norm.",
    r"\.post_attention_layernorm\.": ".ffn_norm.",
    r"\.(attn|ffn)_hc\.": r".hc_\1_",
    r"\.sinks$": ".attn_sink",
    r"\.compressor\.indexer\.scorer\.": ".indexer.",
    r"\.compressor\.indexer\.q_b_proj\.": ".indexer.wq_b.",
    r"\.compressor\.indexer\.": ".indexer.compressor.",
    r"\.compressor\.kv_norm\.": ".compressor.norm.",
    r"\.position_bias$": ".ape",
    r"\.shared_experts\.gate_proj\.": ".shared_experts.w1.",
    r"\.shared_experts\.up_proj\.": ".shared_experts.w3.",
    r"\.shared_experts\.down_proj\.": ".shared_experts.w2.",
    r"\.q_a_proj\.": ".wq_a.",
    r"\.q_b_proj\.": ".wq_b.",
    r"\.q_a_norm\.": ".q_norm.",
    r"\.kv_proj\.": ".wkv.",
    r"\.gate_proj\.": ".wgate.",
    r"\.o_([ab])_proj\.": r".wo_\1.",
    r"\.e_score_correction_bias$": ".bias",
}
"""Patterns in the names of transformers' class, and what they are in published files."""

_V4_FP8 = re.compile(
    r".*(\.attn\.(wq_[ab]|wkv|wo_[ab])|indexer\.wq_b|shared.*|\d\.[eh]_proj)\.weight"
)
_V4_FLOAT32 = re.compile(r".*(hc_\w+|attn_sink|\.ape|\.bias)")
_V4_DENSE = Fp8Block(scale_suffix=".scale", scale_dtype="F8_E8M0", power_of_two=True)
_V4_EXPERT = Mxfp4(
    code_suffix=".weight",
    scale_suffix=".scale",
    grouped=False,
    code_dtype="I8",
    scale_dtype="F8_E8M0",
)


def write_headers(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config, index and shards of a model, each shard as far as its header."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (shards,) = name_shards([cut(list(_tensors(config)), SHARD_BYTES)])
    for shard in shards:
        (folder / shard.name).write_bytes(shard.header())
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _tensors(config: Mapping[str, Any]) -> Iterator[PlannedTensor]:
    """Yield the tensors of a checkpoint, the fused experts of transformers one by one."""
    model = build_skeleton(config, torch.bfloat16, torch.device("cpu"))
    if config["model_type"] == "deepseek_v4":
        yield from _deepseek_v4(model.state_dict(), config)
        return
    for name, tensor in model.state_dict().items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            dtype = "F32" if leaf == "e_score_correction_bias" else "BF16"
            yield PlannedTensor(name=name, dtype=dtype, shape=tuple(tensor.shape))
            continue
        count, rows, width = tensor.shape
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for expert in range(count):
            for part in parts:
                yield PlannedTensor(
                    name=f"{prefix}.{expert}.{part}.weight",
                    dtype="BF16",
                    shape=(rows // len(parts), width),
                )


def _deepseek_v4(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Iterator[PlannedTensor]:
    """Yield the tensors of a published DeepSeek-V4: FP4 experts, most else FP8."""
    for name, shape in _v4_shapes(state, config).items():
        prefix, _, leaf = name.rpartition(".")
        if prefix.endswith(".experts"):
            parts = ("w1", "w3") if leaf == "gate_up_proj" else ("w2",)
            rows = shape[1] // len(parts)
            for expert in range(shape[0]):
                for part in parts:
                    yield from _coded(f"{prefix}.{expert}.{part}", rows, shape[2], _V4_EXPERT)
        elif _V4_FP8.fullmatch(name):
            yield from _coded(prefix, *shape, _V4_DENSE)
        else:
            dtype = "F32" if _V4_FLOAT32.fullmatch(name) else "BF16"
            dtype = "I64" if leaf == "tid2eid" else dtype
            yield PlannedTensor(name=name, dtype=dtype, shape=shape)


def _v4_shapes(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all floats by their published names, experts stacked."""
    shapes = {}
    for name, tensor in state.items():
        for pattern, replacement in _V4_NAMES.items():
            name = re.sub(pattern, replacement, name)
        shapes[name] = tuple(tensor.shape)
    # the layer of multi-token prediction is like one of those without compressed keys
    for name, shape in list(shapes.items()):
        if name.startswith("layers.1.") and not name.endswith("tid2eid"):
            shapes[name.replace("layers.1.", "mtp.0.")] = shape
        elif name.startswith("hc_head_"):
            shapes[f"mtp.0.{name}"] = shape
    width = config["hidden_size"]
    shapes["mtp.0.ffn.gate.bias"] = (config["n_routed_experts"],)
    shapes |= {f"mtp.0.{part}.weight": (width,) for part in ("enorm", "hnorm", "norm")}
    return shapes | {f"mtp.0.{part}.weight": (width, width) for part in ("e_proj", "h_proj")}


def _coded(prefix: str, rows: int, cols: int, codec: Codec) -> Iterator[PlannedTensor]:
    for part in codec.parts(rows, cols):
        yield PlannedTensor(name=prefix + part.suffix, dtype=part.dtype, shape=part.shape)


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=list(CONFIGS))
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    write_headers(options.target, CONFIGS[options.model])


if __name__ == "__main__":
    main()
