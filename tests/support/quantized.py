"""Tiny checkpoints in the formats that models are published in, and their floats.

Encoding is done by the codecs, which are tested by themselves. The floats that a test
compares with come from the definitions in plain_formats, by another way than the product's.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plain_formats
import torch
from tiny_checkpoints import load_tensors, read_config, save_tensors, unfused, write_checkpoint
from tiny_families import TINY

from ream_stream.checkpoint.formats import Codec, Fp8Block, Fp8Scaled, Int4, Mxfp4, Nvfp4

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A family as it is published quantized."""

    family: str
    codec: Codec
    config: Mapping[str, Any]
    """quantization_config."""
    floats: Callable[[Tensors], Any]
    """Decodes a matrix from its parts, with numpy."""
    dense: bool = False
    """Whether attention and shared experts are quantized too."""
    beside: Codec | None = None
    """How, if otherwise than experts."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says of it beside that."""
    fuse: bool = False
    """Whether experts are stacked before."""


def _compressed(weights: Mapping[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


# blocks that divide none of the shapes
_BLOCK = (12, 20)
_FP8 = {"quant_method": "fp8", "weight_block_size": list(_BLOCK)}
_CHANNEL = _compressed({"num_bits": 8, "type": "float", "strategy": "channel"})
_INT4 = _compressed(
    {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
)
_NVFP4 = _compressed({"num_bits": 4, "type": "float", "strategy": "tensor_group"})


def _block(parts: Tensors) -> Any:
    return plain_formats.fp8_block(parts[".weight"], parts[".weight_scale_inv"], _BLOCK)


def _divided(parts: Tensors) -> Any:
    packed, scale = parts[".weight_packed"], parts[".weight_scale"]
    return plain_formats.nvfp4(packed, scale, parts[".weight_global_scale"], divides=True)


def _multiplied(parts: Tensors) -> Any:
    packed, scale = parts[".weight"], parts[".weight_scale"]
    return plain_formats.nvfp4(packed, scale, parts[".weight_scale_2"], divides=False)


def _deepseek_v4(parts: Tensors) -> Any:
    code, scale = parts[".weight"], parts[".scale"]
    if code.dtype == torch.int8:
        return plain_formats.mxfp4(code, scale)
    return plain_formats.fp8_block(code, scale, _BLOCK)


PUBLISHED: Mapping[str, Published] = {
    "deepseek_v3-fp8": Published(
        family="deepseek_v3",
        codec=Fp8Block(block=_BLOCK),
        config=_FP8,
        floats=_block,
        dense=True,
    ),
    "minimax_m2-fp8": Published(
        family="minimax_m2",
        codec=Fp8Block(block=_BLOCK),
        config=_FP8,
        floats=_block,
        dense=True,
    ),
    "qwen3_5_moe_text-fp8": Published(
        family="qwen3_5_moe_text", codec=Fp8Block(block=_BLOCK), config=_FP8, floats=_block
    ),
    "glm4_moe-fp8-channel": Published(
        family="glm4_moe",
        codec=Fp8Scaled(per_row=True, scale_dtype="BF16"),
        config=_CHANNEL,
        floats=lambda parts: plain_formats.fp8_scaled(parts[".weight"], parts[".weight_scale"]),
        dense=True,
    ),
    "deepseek_v3-int4": Published(
        family="deepseek_v3",
        codec=Int4(group=8),
        config=_INT4,
        floats=lambda parts: plain_formats.int4(
            parts[".weight_packed"], parts[".weight_scale"], int(parts[".weight_shape"][1])
        ),
    ),
    "qwen3_moe-nvfp4": Published(
        family="qwen3_moe", codec=Nvfp4(), config=_NVFP4, floats=_divided
    ),
    "glm4_moe-nvfp4-modelopt": Published(
        family="glm4_moe",
        codec=Nvfp4(
            code_suffix=".weight", outer_suffix=".weight_scale_2", outer_shape=(), divides=False
        ),
        config={"quant_method": "modelopt", "quant_algo": "NVFP4"},
        floats=_multiplied,
    ),
    "deepseek_v4-fp4": Published(
        family="deepseek_v4",
        codec=Mxfp4(
            code_suffix=".weight",
            scale_suffix=".scale",
            grouped=False,
            code_dtype="I8",
            scale_dtype="F8_E8M0",
        ),
        config={**_FP8, "scale_fmt": "ue8m0"},
        told={"expert_dtype": "fp4"},
        floats=_deepseek_v4,
        dense=True,
        beside=Fp8Block(
            block=_BLOCK, scale_suffix=".scale", scale_dtype="F8_E8M0", power_of_two=True
        ),
    ),
    "gpt_oss-mxfp4": Published(
        family="gpt_oss",
        codec=Mxfp4(),
        config={"quant_method": "mxfp4"},
        floats=lambda parts: plain_formats.mxfp4(parts["_blocks"], parts["_scales"]),
    ),
}


def write(folder: Path, name: str, dtype: torch.dtype) -> tuple[Path, Path]:
    """Write a quantized checkpoint, and one of its floats in `dtype`; return both folders."""
    published = PUBLISHED[name]
    plain = write_checkpoint(folder / "floats", published.family, dtype)
    coded = write_checkpoint(folder / "coded", published.family, torch.bfloat16)
    tensors = load_tensors(coded)
    if TINY[published.family].fuse:  # the quantized ones are not fused
        tensors = unfused(tensors)
    quantized: Tensors = {}
    floats: Tensors = {}
    for key, tensor in tensors.items():
        if not _is_quantized(published, key, tensor):
            quantized[key] = tensor
            floats[key] = tensor.to(dtype) if tensor.dtype == torch.bfloat16 else tensor
        elif tensor.dim() == 3:  # gpt-oss: the floats have inputs as rows, the codes do not
            each = [_coded(published, matrix.T, dtype) for matrix in tensor]
            for suffix in each[0][0]:
                quantized[key + suffix] = torch.stack([parts[suffix] for parts, _ in each])
            floats[key] = torch.stack([value.T for _, value in each])
        else:
            codec = published.beside if ".experts." not in key else None
            parts, floats[key] = _coded(published, tensor, dtype, codec)
            prefix = key.removesuffix(".weight")
            quantized |= {prefix + suffix: part for suffix, part in parts.items()}
            if name == "qwen3_moe-nvfp4" and ".experts." in key:
                number = float(key.split(".")[5])
                quantized[prefix + ".input_global_scale"] = torch.tensor([10.0 + number])
    save_tensors(coded, quantized)
    save_tensors(plain, {key: tensor.contiguous() for key, tensor in floats.items()})
    path = coded / "config.json"
    config = read_config(coded)
    config |= {"quantization_config": dict(published.config), **published.told}
    path.write_text(json.dumps(config), encoding="utf-8")
    return coded, plain


def _is_quantized(published: Published, key: str, tensor: torch.Tensor) -> bool:
    if ".experts." in key:
        return not key.endswith("_bias")
    kind = ("_proj.weight", "kv_a_proj_with_mqa.weight", "w1.weight", ".attn.wo_a.weight")
    return published.dense and key.endswith(kind) and tensor.dim() == 2


def _coded(
    published: Published, matrix: torch.Tensor, dtype: torch.dtype, codec: Codec | None = None
) -> tuple[Tensors, torch.Tensor]:
    parts = (codec or published.codec).encode(matrix.float().contiguous())
    value = torch.from_numpy(published.floats(parts)).to(dtype)
    return parts, value
