"""The config of a tiny model of each family, as published checkpoints have it.

Three experts a token: sums of two do not depend on their order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

EXPERTS, TOP_K, VOCABULARY = 8, 3, 64

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MOE = {"num_experts_per_tok": TOP_K, "moe_intermediate_size": 16}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One family."""

    config: Mapping[str, Any]
    count_key: str
    """Where published checkpoints have the number of experts."""
    routers: tuple[str, ...] = ("mlp.gate.weight",)
    """Tensors of a layer with an axis of experts, beside the experts."""
    shard_size: str | None = None
    """One file if None."""
    dense: tuple[int, ...] = ()
    """Layers without experts."""
    top_k: int = TOP_K
    path: str = "model.layers"
    """Of the layers in the file."""
    fuse: bool = False
    """Whether experts are stacked by hand: transformers writes them one by one."""
    published: Mapping[str, str] = field(default_factory=dict)
    """Patterns in names that transformers writes, and what they are in published files."""
    wide: str | None = None
    """Pattern in names of what is float32 in published files, whatever else is."""
    bias_dtype: torch.dtype = torch.float32
    """Of a router's correction bias on disk, where the other tensors may be narrower."""


LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}


_BIASED = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
FIRST_DENSE = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}

TINY: Mapping[str, Tiny] = {
    "qwen3_moe": Tiny(
        config={"num_experts": EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1], **_MOE},
        count_key="num_experts",
        shard_size="40KB",
        dense=(1,),
    ),
    "qwen2_moe": Tiny(
        config={
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            **_MOE,
        },
        count_key="num_experts",
    ),
    "mixtral": Tiny(
        config={"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
        count_key="num_local_experts",
        routers=("block_sparse_moe.gate.weight",),
        shard_size="60KB",
    ),
    "olmoe": Tiny(
        config={"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "clip_qkv": 2.0},
        count_key="num_experts",
    ),
    "deepseek_v2": Tiny(
        config={
            **FIRST_DENSE,
            **_MOE,
            **_LATENT,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
        },
        count_key="n_routed_experts",
        dense=(0,),
    ),
    "deepseek_v3": Tiny(
        config={**FIRST_DENSE, **_MOE, **_LATENT, "n_group": 2, "topk_group": 1},
        count_key="n_routed_experts",
        routers=_BIASED,
        shard_size="30KB",
        dense=(0,),
    ),
    "glm4_moe": Tiny(
        config={
            **FIRST_DENSE,
            **_MOE,
            "attention_bias": True,
            "use_qk_norm": True,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
        count_key="n_routed_experts",
        routers=_BIASED,
        dense=(0,),
    ),
    "qwen3_next": Tiny(
        config={
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [2],
            "num_hidden_layers": 4,
            **LINEAR,
            **_MOE,
        },
        count_key="num_experts",
        shard_size="50KB",
        dense=(2,),
    ),
    "minimax_m2": Tiny(
        config={"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
        count_key="num_local_experts",
        routers=("block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"),
        shard_size="70KB",
    ),
    "ernie4_5_moe": Tiny(
        config={
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
            "tie_word_embeddings": True,
        },
        count_key="moe_num_experts",
        routers=("mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"),
        dense=(0,),
    ),
    "hunyuan_v1_moe": Tiny(
        config={
            "num_experts": EXPERTS,
            "moe_topk": TOP_K,
            "intermediate_size": 16,
            "tie_word_embeddings": True,
        },
        count_key="num_experts",
        routers=("mlp.gate.wg.weight",),
    ),
    "dots1": Tiny(
        config={
            **FIRST_DENSE,
            **_MOE,
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        count_key="n_routed_experts",
        routers=_BIASED,
        shard_size="45KB",
        dense=(0,),
        # transformers runs it in float32, whatever the file has
        bias_dtype=torch.bfloat16,
    ),
    "qwen3_5_moe_text": Tiny(
        config={
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            **LINEAR,
            **_MOE,
        },
        count_key="num_experts",
        shard_size="60KB",
        fuse=True,
    ),
    "gpt_oss": Tiny(
        config={
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            # its activation works on all rows at once, in vectors: fewer would leave a tail
            "intermediate_size": 32,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        count_key="num_local_experts",
        routers=("mlp.router.weight", "mlp.router.bias"),
    ),
    "granitemoe": Tiny(
        config={
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
        count_key="num_local_experts",
        routers=("block_sparse_moe.router.layer.weight",),
    ),
    "granitemoehybrid": Tiny(
        config={
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "shared_intermediate_size": 16,
        },
        count_key="num_local_experts",
        routers=("block_sparse_moe.router.layer.weight",),
    ),
    "gemma4_text": Tiny(
        config={
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": 16,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 5,
        },
        count_key="num_experts",
        routers=("router.proj.weight", "router.per_expert_scale"),
    ),
    "llama4_text": Tiny(
        config={
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size": 16,
            "intermediate_size_mlp": 24,
            "moe_layers": [0, 2],
            "attention_chunk_size": 5,
            "no_rope_layers": [1, 0, 1],
            "floor_scale": 4,
        },
        count_key="num_local_experts",
        routers=("feed_forward.router.weight",),
        dense=(1,),
        top_k=1,
    ),
    "phimoe": Tiny(
        config={"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        count_key="num_local_experts",
        routers=("block_sparse_moe.gate.weight",),
        top_k=2,
    ),
    "minimax": Tiny(
        config={
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
        },
        count_key="num_local_experts",
        routers=("block_sparse_moe.gate.weight",),
    ),
    "glm4_moe_lite": Tiny(
        config={
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            **_MOE,
            **_LATENT,
        },
        count_key="n_routed_experts",
        routers=_BIASED,
        dense=(0,),
    ),
    "glm_moe_dsa": Tiny(
        config={
            **FIRST_DENSE,
            **_MOE,
            **_LATENT,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            **_INDEXER,
        },
        count_key="n_routed_experts",
        routers=_BIASED,
        dense=(0,),
    ),
    "deepseek_v32": Tiny(
        config={
            **FIRST_DENSE,
            **_MOE,
            **_LATENT,
            **_INDEXER,
            "n_group": 2,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        count_key="n_routed_experts",
        routers=_BIASED,
        dense=(0,),
    ),
    "deepseek_v4": Tiny(
        config={
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "num_experts_per_tok": TOP_K,
            "num_key_value_heads": 1,
            # one number under two names; its experts are published in groups of 32 columns
            "intermediate_size": 32,
            "moe_intermediate_size": 32,
            # small enough to clip some
            "swiglu_limit": 0.5,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "o_groups": 2,
            "o_lora_rank": 8,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "sliding_window": 5,
            "layer_types": [
                "compressed_sparse_attention",
                "sliding_attention",
                "heavily_compressed_attention",
            ],
            "compress_rates": {
                "compressed_sparse_attention": 2,
                "heavily_compressed_attention": 4,
            },
            "num_hash_layers": 1,
            "num_nextn_predict_layers": 0,
            **_INDEXER,
        },
        count_key="n_routed_experts",
        routers=("ffn.gate.weight", "ffn.gate.bias"),
        path="layers",
        published={
            r"^model\.embed_tokens\.": "embed.",
            r"^model\.hc_head\.": "",
            r"^hc_": "hc_head_",
            r"^model\.": "",
            r"\.attn\.norm\.": ".attn.kv_norm.",
        },
        wide=r"(^|\.)hc_|attn_sink|\.ape$",
    ),
    "nemotron_h": Tiny(
        config={
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 16,
            "layers_block_type": ["moe", "attention", "moe"],
            "moe_latent_size": 24,
            "n_group": 1,
            "topk_group": 1,
            **_MOE,
        },
        count_key="n_routed_experts",
        routers=("mixer.gate.weight", "mixer.gate.e_score_correction_bias"),
        dense=(1,),
        path="backbone.layers",
    ),
    "kimi_linear": Tiny(
        config={
            "num_experts": EXPERTS,
            "num_experts_per_token": TOP_K,
            "moe_intermediate_size": 16,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_expert_group": 1,
            "topk_group": 1,
            "linear_attn_config": {"head_dim": 8, "num_heads": 4},
            **_LATENT,
        },
        count_key="num_experts",
        routers=(
            "block_sparse_moe.gate.weight",
            "block_sparse_moe.gate.e_score_correction_bias",
        ),
        dense=(0,),
    ),
    "bailing_hybrid": Tiny(
        config={
            "num_experts": EXPERTS,
            "num_experts_per_token": TOP_K,
            "moe_intermediate_size": 16,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_expert_group": 2,
            "topk_group": 1,
            "layer_group_size": 2,
            "num_nextn_predict_layers": 0,
            **_LATENT,
        },
        count_key="num_experts",
        routers=("mlp.gate.weight", "mlp.gate.expert_bias"),
        dense=(0,),
    ),
}


_QWEN = {"num_experts": EXPERTS, **_MOE}
_ROUTED = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, **_MOE}


def _also(config: Mapping[str, Any], **fields: Any) -> Tiny:
    keys = ("n_routed_experts", "num_experts", "num_local_experts")
    return Tiny(config=config, count_key=next(key for key in keys if key in config), **fields)


TINY = {
    **TINY,
    "flex_olmo": _also(_QWEN),
    "mellum": _also({"num_local_experts": EXPERTS, "sliding_window": 5, **_MOE}),
    "granitemoeshared": _also(
        {**TINY["granitemoe"].config, "shared_intermediate_size": 16},
        routers=TINY["granitemoe"].routers,
    ),
    "granitemoe_swa": _also(
        {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
        routers=("block_sparse_moe.router.weight",),
    ),
    "jamba": _also(
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
        },
        routers=("feed_forward.router.weight",),
    ),
    "solar_open": _also({**_ROUTED, "n_shared_experts": 1}, routers=_BIASED),
    "mimo_v2_flash": _also(
        {**_ROUTED, "first_k_dense_replace": 1}, routers=_BIASED, dense=(0,)
    ),
    "axk1": _also({**_ROUTED, **_LATENT}, routers=_BIASED, dense=(0,)),
    "axk2": _also({**_ROUTED, **_LATENT, **_INDEXER}, routers=_BIASED, dense=(0,)),
    "exaone_moe": _also(
        {**_QWEN, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        routers=("mlp.gate.weight", "mlp.e_score_correction_bias"),
        dense=(0,),
    ),
    "laguna": _also(
        _QWEN,
        routers=("mlp.gate.weight", "mlp.experts.e_score_correction_bias"),
        dense=(0,),
    ),
    "afmoe": _also(
        {**_QWEN, "num_dense_layers": 1},
        routers=("mlp.router.gate.weight", "mlp.expert_bias"),
        dense=(0,),
    ),
    "hy_v3": _also(_QWEN, routers=("mlp.router.gate.weight", "mlp.expert_bias"), dense=(0,)),
    "lfm2_moe": _also(
        {
            **_QWEN,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_dense_layers": 1,
        },
        routers=("feed_forward.gate.weight", "feed_forward.expert_bias"),
        dense=(0,),
    ),
    "flint": _also(_QWEN, dense=(0, 1)),
}

MTP = {
    "deepseek_v3": 1,
    "deepseek_v32": 1,
    "deepseek_v4": 1,
    "glm4_moe": 1,
    "glm4_moe_lite": 1,
    "glm_moe_dsa": 1,
    "mellum": 1,
    "qwen3_next": 3,
    "qwen3_5_moe_text": 1,
}
"""Families whose multi-token-prediction layer is known, and a layer that has its shapes."""

BESIDE = ("mellum", "qwen3_next", "qwen3_5_moe_text")
"""Families that have that layer under a prefix of its own."""
