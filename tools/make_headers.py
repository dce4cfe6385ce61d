"""Write header-only checkpoints in the shapes of models that fit on few machines.

    python tools/make_headers.py deepseek-v3 TARGET
    ream-stream plan TARGET --keep 75% --ram 16GiB

Names, shapes and dtypes are those of the published checkpoints in bf16, the layers of
multi-token prediction left out; the numbers themselves are not there. A few megabytes.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ream_stream.checkpoint.shards import PlannedTensor, cut, name_shards
from ream_stream.checkpoint.source import INDEX
from ream_stream.skeleton import build_skeleton

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
}


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
