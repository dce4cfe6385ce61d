"""A tiny checkpoint of each family, as its files lie on the hub, and runs over them.

Weights are drawn from a seed and differ in scale between tensors: biases, norms and the
routers' correction biases are not what they are initialized to, so that a part left out
or taken twice is seen. Three experts a token: sums of two do not depend on their order.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ream_stream.calibration.tokens import Tokens, from_tensors
from ream_stream.checkpoint.config_json import MTP_KEYS
from ream_stream.checkpoint.reader import Checkpoint, open_checkpoint
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.events import Event, LayerDone
from ream_stream.model.hidden_states import HiddenStates
from ream_stream.model.streamed_model import Batch, StreamedModel
from ream_stream.planning.plan import Plan
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Schedule, Solver
from ream_stream.settings import Method, Settings

CPU = torch.device("cpu")
EXPERTS, TOP_K, VOCABULARY = 8, 3, 64
INDEX = "model.safetensors.index.json"

_SHAPE = {
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


_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}


_BIASED = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
_FIRST_DENSE = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}

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
            **_FIRST_DENSE,
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
        config={**_FIRST_DENSE, **_MOE, **_LATENT, "n_group": 2, "topk_group": 1},
        count_key="n_routed_experts",
        routers=_BIASED,
        shard_size="30KB",
        dense=(0,),
    ),
    "glm4_moe": Tiny(
        config={
            **_FIRST_DENSE,
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
            **_LINEAR,
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
            **_FIRST_DENSE,
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
            **_LINEAR,
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
            **_FIRST_DENSE,
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
            **_FIRST_DENSE,
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

SELDOM = (
    "afmoe",
    "axk1",
    "axk2",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "granitemoe_swa",
    "granitemoeshared",
    "hy_v3",
    "jamba",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "solar_open",
    "bailing_hybrid",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "granitemoehybrid",
    "kimi_linear",
    "minimax",
    "phimoe",
    "qwen3_5_moe_text",
)
"""Families that share router and layout with another: most is tried with the slow tests."""


def families(*often: str) -> list[Any]:
    """All families, as parameters of a test; those that are not tried often are slow."""
    slow, often = pytest.mark.slow, often or tuple(TINY.keys() - set(SELDOM))
    return [n if n in often else pytest.param(n, marks=slow) for n in sorted(TINY)]


def families_in(kinds: Mapping[str, Sequence[Any]]) -> list[Any]:
    """All families in the first kind and the others in all, as parameters of a test."""
    return [
        pytest.param(
            name,
            *values,
            id=f"{name}-{kind}",
            marks=[pytest.mark.slow] if name in SELDOM and kind != next(iter(kinds)) else [],
        )
        for name in sorted(TINY)
        for kind, values in kinds.items()
    ]


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype, **changes: Any) -> Path:
    """Write the checkpoint of a family, with the config keys that the hub has."""
    tiny = TINY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **{**_SHAPE, **tiny.config, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(("inv_freq", "tokens_per_expert")):
                continue
            if key.endswith("tid2eid"):
                drawn = torch.rand(len(tensor), EXPERTS, generator=generator)
                tensor.copy_(drawn.argsort(dim=1)[:, : tensor.shape[1]])
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if key.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.data = 0.1 * noise.to(torch.promote_types(dtype, tiny.bias_dtype))
            else:
                tensor.copy_(0.3 * noise if tensor.dim() > 1 else tensor + 0.2 * noise)
    size = {} if tiny.shard_size is None else {"max_shard_size": tiny.shard_size}
    model.save_pretrained(folder, **size)
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in ("num_experts", "num_local_experts"):
        if key in values:
            values[tiny.count_key] = values.pop(key)
    values |= {key: 0 for key in MTP_KEYS if key in values}  # there is none yet
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    if tiny.fuse:
        save_tensors(folder, fused(load_tensors(folder)))
    if tiny.published:
        save_tensors(folder, _published(load_tensors(folder), tiny))
    (folder / "tokenizer.json").write_text('{"is": "not read here"}', encoding="utf-8")
    return folder


def _published(tensors: Mapping[str, torch.Tensor], tiny: Tiny) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in tiny.published.items():
            name = re.sub(pattern, replacement, name)
        is_wide = tiny.wide is not None and re.search(tiny.wide, name)
        renamed[name] = tensor.float() if is_wide else tensor
    return renamed


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
"""Those that have it under a prefix of its own."""


def mtp_families() -> list[Any]:
    """They, as parameters of a test."""
    slow = pytest.mark.slow
    often = {"deepseek_v3", "qwen3_next"}  # one under either kind of names
    return [n if n in often else pytest.param(n, marks=slow) for n in sorted(MTP)]


def add_mtp(folder: Path, name: str, *, path: str | None = None) -> set[str]:
    """Give a checkpoint a layer for multi-token prediction; return the names of its tensors."""
    path = path or TINY[name].path
    tensors, config = load_tensors(folder), read_config(folder)
    text = config.get("text_config", config)
    like = f"{path}.{MTP[name]}."
    block = {k.removeprefix(like): t for k, t in tensors.items() if k.startswith(like)}
    width, vocabulary = text["hidden_size"], text["vocab_size"]
    head = {"shared_head.head.weight": (vocabulary, width)}
    count_key = (
        "mtp_num_hidden_layers" if name.startswith("qwen") else "num_nextn_predict_layers"
    )
    if name in BESIDE:
        inner, outer = "mtp.layers.0.", "mtp."
        # published so: stacked in the decoder, one by one here
        block, head = unfused(block), {}
        parts = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    elif name == "deepseek_v4":
        inner = outer = "mtp.0."
        parts, head = ("enorm", "hnorm", "e_proj", "norm"), {"h_proj.weight": (width, width)}
    else:
        inner = outer = f"{path}.{text['num_hidden_layers']}."
        parts = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    shapes = {f"{part}.weight": (width,) for part in parts}
    shapes[f"{parts[2]}.weight"] = (width, width if "h_proj.weight" in head else 2 * width)
    draw = torch.Generator().manual_seed(5)
    added = {
        outer + key: (len(shape) + torch.randn(shape, generator=draw)).mul(0.3)
        for key, shape in {**shapes, **head}.items()
    }
    added = {key: tensor.to(torch.bfloat16) for key, tensor in added.items()}
    for key, tensor in block.items():
        # codes and scales of quantized matrices stay
        native = tensor.dtype in {torch.bfloat16, torch.float32} and "scale" not in key
        noise = 0.1 * torch.randn(tensor.shape, generator=draw) if native else 0
        added[inner + key] = (tensor + noise).to(tensor.dtype) if native else tensor.clone()
    save_tensors(folder, {**tensors, **added})
    text[count_key] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return set(added)


def fused(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack the experts of each layer, gate above up."""
    rest = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    for prefix in {
        key.split(".experts.")[0] + ".experts" for key in tensors.keys() - rest.keys()
    }:
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{e}.{part}_proj.weight"] for e in range(EXPERTS)])
            for part in ("gate", "up", "down")
        )
        rest[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        rest[f"{prefix}.down_proj"] = down
    return rest


def unfused(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo `fused`."""
    split: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        prefix, _, leaf = key.partition(".experts.")
        if leaf == "gate_up_proj":
            parts = dict(zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True))
        elif leaf == "down_proj":
            parts = {"down": tensor}
        else:
            split[key] = tensor
            continue
        for part, stack in parts.items():
            for expert, matrix in enumerate(stack):
                split[f"{prefix}.experts.{expert}.{part}_proj.weight"] = matrix.contiguous()
    return split


STACKED = re.compile(
    r".*(\.experts\.(gate|down)_\D+|moe\.(in|out)put_linear\.weight|moe\.\w+_proj\.weight)"
)
"""Names of tensors that hold all experts of a layer."""


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint with safetensors' own reader."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make a checkpoint of one file of these tensors; its other files stay."""
    for path in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        path.unlink()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def scatter_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], files: int = 3) -> None:
    """Make a checkpoint of several files, each tensor in a drawn one; its other files stay."""
    save_tensors(folder, {})
    (folder / "model.safetensors").unlink()
    draw = torch.Generator().manual_seed(3)
    where = torch.randint(files, (len(tensors),), generator=draw).tolist()
    weight_map = {
        name: f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        for name, number in zip(sorted(tensors), where, strict=True)
    }
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name, own in weight_map.items() if own == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def split_by_layer(folder: Path) -> Path:
    """Give each of the three layers of a checkpoint a shard, and a fourth to the rest."""
    tensors, weight_map = load_tensors(folder), {}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for name in tensors:
        layer = int(name.split(".")[2]) if ".layers." in name else 3
        weight_map[name] = f"model-0000{layer + 1}-of-00004.safetensors"
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in tensors if weight_map[n] == shard}, folder / shard)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / INDEX).write_text(index, encoding="utf-8")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it stands."""
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values


def some_tokens(
    sequences: int = 4, length: int = 12, *, seed: int = 0, padded: bool = False
) -> Tokens:
    """Draw tokens; padded, the first sequence begins with padding and the last ends with it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, length)
    ids_SL = torch.randint(2, VOCABULARY - 2, shape, generator=generator)
    tensors = {"input_ids": ids_SL}
    if padded:
        mask_SL = torch.ones_like(ids_SL)
        mask_SL[0, :4], mask_SL[-1, -3:] = 0, 0
        tensors["attention_mask"] = mask_SL
    return from_tensors(tensors, description="drawn")


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a model makes of a batch."""

    hidden: list[torch.Tensor]
    """What leaves each decoder layer."""
    logits: torch.Tensor


Inputs = Sequence[tuple[torch.Tensor, torch.Tensor | None]]
"""Ids and mask of each batch."""


def same_in(name: str, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Return how a family's states are compared: as bits, but for two in float32.

    On a batch of one row, last bits of jamba's layers change from process to process. Llama 4
    runs each expert on all tokens in transformers, and products of more rows have others.
    """
    wavers = name in {"jamba", "llama4", "llama4_text"} and dtype == torch.float32
    return partial(torch.allclose, rtol=1e-4, atol=1e-4) if wavers else torch.equal


def routed_to(args: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return inputs, experts and coefficients of what an experts module was called with.

    That of Llama 4 gets each token for every expert, times 0 but for the one it is sent to.
    """
    if len(args) == 3:
        return args
    each_ETH = args[0].view(EXPERTS, -1, args[0].shape[-1])
    index_T1 = each_ETH.abs().sum(-1).argmax(0)[:, None]
    return each_ETH.sum(0), index_T1, torch.ones_like(index_T1, dtype=each_ETH.dtype)


@torch.no_grad()
def forward_in_transformers(folder: Path, dtype: torch.dtype, inputs: Inputs) -> list[Forward]:
    """Load the whole model as users do, all its tensors and no others, and run it."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    model.eval()
    for parameter in model.parameters():
        # our experts are aligned; a mapped stack is so by accident, which decides last bits
        if parameter.dim() == 3:
            parameter.data = parameter.data.clone()
    hidden: list[torch.Tensor] = []
    for layer in model.model.layers:
        # several states of a token are one row of ours
        layer.register_forward_hook(
            lambda _module, _args, output: hidden.append(
                (output[0] if isinstance(output, tuple) else output).flatten(2)
            )
        )
    forwards = []
    for ids_BL, mask_BL in inputs:
        hidden.clear()
        logits = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
        forwards.append(Forward(hidden=[*hidden], logits=logits))
    return forwards


def forward_streamed(folder: Path, dtype: torch.dtype, inputs: Inputs) -> list[Forward]:
    """Run the model layer by layer, each on all batches."""
    model = StreamedModel(open_checkpoint(folder), dtype, CPU)
    batches = [Batch(input_ids_BL=ids, attention_mask_BL=mask) for ids, mask in inputs]
    hidden: list[list[torch.Tensor]] = [[] for _ in batches]
    with model.open_outside():
        for index in range(model.num_layers):
            with model.open_layer(index):
                for batch, so_far in zip(batches, hidden, strict=True):
                    entering = so_far[-1] if so_far else None
                    so_far.append(model.run_layer(index, batch, entering))
        return [
            Forward(hidden=states, logits=model.logits(batch, states[-1]))
            for batch, states in zip(batches, hidden, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left, and what was seen of it on the way."""

    plan: Plan
    tokens: Tokens
    output: Path
    events: list[Event]
    hidden: dict[int, torch.Tensor]
    """What the run itself computed to leave each layer but the last, (S, L, H)."""

    @property
    def manifest(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(
            (self.output / "ream_stream.json").read_text(encoding="utf-8")
        )
        return values

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.output)

    def files(self) -> dict[str, bytes]:
        """Everything in the output, the work folder aside."""
        return {p.name: p.read_bytes() for p in self.output.iterdir() if p.is_file()}

    def shards(self) -> dict[str, bytes]:
        return {n: data for n, data in self.files().items() if n.endswith(".safetensors")}


def settings(experts: int = 6, *, dtype: str = "float32", **fields: Any) -> Settings:
    """Settings of a run; fields of the method may be given beside the run's own."""
    names = Method.__dataclass_fields__
    method = Method(**{key: fields.pop(key) for key in list(fields) if key in names})
    if "dtype_out" in fields:
        fields["dtype"] = fields.pop("dtype_out")
    return Settings(experts=experts, method=method, compute_dtype=dtype, **fields)


def plan_for(source: Path, tokens: Tokens, wanted: Settings) -> Plan:
    return make_plan(
        open_checkpoint(source), wanted, tokens.num_sequences, tokens.sequence_length
    )


SCHEDULE = Schedule(
    batch_sequences=4,
    expert_blocks=1,
    resident_experts=0,
    solver=Solver(preconditioner="blocks", gathered=False, column_blocks=1),
    threads=1,
)


def scheduled(plan: Plan, **fields: Any) -> Plan:
    """Return a plan that goes through layers in another way."""
    return replace(plan, schedule=replace(plan.schedule, **fields))


def run_plan(plan: Plan, tokens: Tokens, output: Path) -> Run:
    """Compress, and read each boundary's hidden states while they are there."""
    workspace = Workspace(output=output, work=output / ".ream-stream")
    events: list[Event] = []
    hidden: dict[int, Tensor] = {}

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, LayerDone) and event.layer + 1 < len(plan.layers):
            hidden[event.layer] = _read_states(plan, workspace, event.layer + 1)

    with workspace.locked():
        compress(plan, tokens, workspace, device=CPU, report=report)
    return Run(plan=plan, tokens=tokens, output=output, events=events, hidden=hidden)


def run(source: Path, output: Path, wanted: Settings, tokens: Tokens | None = None) -> Run:
    tokens = tokens or some_tokens()
    return run_plan(plan_for(source, tokens, wanted), tokens, output)


def _read_states(plan: Plan, workspace: Workspace, boundary: int) -> torch.Tensor:
    states = HiddenStates(
        workspace.hidden(boundary), plan.hidden_shape, plan.dtype, plan.schedule.batch_sequences
    )
    return torch.cat([states.read(number) for number in range(plan.num_batches)])
