"""A tiny checkpoint of each family, as its files lie on the hub.

Weights are drawn from a seed and differ in scale between tensors: biases, norms and the
routers' correction biases are not what they are initialized to, so that a part left out
or taken twice is seen.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_families import BESIDE, EXPERTS, MTP, SHAPE, TINY, Tiny
from transformers import AutoConfig, AutoModelForCausalLM

from ream_stream.checkpoint.config_json import MTP_KEYS

INDEX = "model.safetensors.index.json"


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype, **changes: Any) -> Path:
    """Write the checkpoint of a family, with the config keys that the hub has."""
    tiny = TINY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **{**SHAPE, **tiny.config, **changes})
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
