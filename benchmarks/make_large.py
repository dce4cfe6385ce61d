"""Write a synthetic Qwen3-MoE checkpoint of any size, one tensor in memory at a time.

The defaults have layers of Qwen3-235B-A22B's shape, 128 experts and 4.8 GB of them in
each: four layers and the embeddings are 20.4 GB. Weights are slices of one block of random
numbers, each from a place of its own: experts differ, and a gigabyte takes a second or two.

    python benchmarks/make_large.py FOLDER [--layers 4] [--experts 128] [--hidden 4096] ...
"""

import argparse
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ream_stream import files as durable
from ream_stream.checkpoint.reader import INDEX
from ream_stream.checkpoint.shards import PlannedTensor, cut, name_shards, write_shard
from ream_stream.units import format_size

SHARD_BYTES = 2_500_000_000
"""Size of a file at most."""

BLOCK = 1 << 24
"""Random numbers that all weights are cut from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What the checkpoint is like."""

    layers: int = 4
    """Decoder layers, all of them with experts."""

    experts: int = 128
    """Experts of a layer."""

    top_k: int = 8
    """Experts a token is sent to."""

    hidden: int = 4096
    """Width of the hidden states."""

    inner: int = 1536
    """Neurons of an expert."""

    heads: int = 64
    """Query heads."""

    kv_heads: int = 4
    """Key and value heads."""

    head_dim: int = 128
    """Width of a head."""

    vocabulary: int = 32768
    """Rows of the embedding."""

    def config(self) -> dict[str, object]:
        """Return config.json."""
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.inner,
            "moe_intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_experts": self.experts,
            "num_experts_per_tok": min(self.top_k, self.experts),
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        }

    def layer(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the tensors of a decoder layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        prefix = f"model.layers.{index}."
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
            "self_attn.q_norm.weight": (self.head_dim,),
            "self_attn.k_norm.weight": (self.head_dim,),
            "self_attn.q_proj.weight": (query, self.hidden),
            "self_attn.k_proj.weight": (key, self.hidden),
            "self_attn.v_proj.weight": (key, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, query),
            "mlp.gate.weight": (self.experts, self.hidden),
        }
        for expert in range(self.experts):
            name = f"mlp.experts.{expert}."
            shapes[name + "gate_proj.weight"] = (self.inner, self.hidden)
            shapes[name + "up_proj.weight"] = (self.inner, self.hidden)
            shapes[name + "down_proj.weight"] = (self.hidden, self.inner)
        return {prefix + name: shape for name, shape in shapes.items()}

    def outside(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors outside the layers."""
        table = (self.vocabulary, self.hidden)
        return {
            "model.embed_tokens.weight": table,
            "lm_head.weight": table,
            "model.norm.weight": (self.hidden,),
        }


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Write the checkpoint, file after file.

    Returns
    -------
    int
        Bytes of its tensors.
    """
    random = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = [*(shape.layer(index) for index in range(shape.layers)), shape.outside()]
    shards = name_shards([cut(_planned(part), SHARD_BYTES) for part in parts])
    durable.make_directory(folder)
    durable.write_json(folder / "config.json", shape.config())
    weight_map, total = {}, 0
    for shard in [shard for files in shards for shard in files]:
        shapes = {tensor.name: tensor.shape for tensor in shard.tensors}
        write_shard(folder, shard, lambda name, shapes=shapes: _weights(random, name, shapes))
        weight_map.update(dict.fromkeys(shapes, shard.name))
        total += sum(tensor.nbytes for tensor in shard.tensors)
    durable.write_json(
        folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return total


def _planned(shapes: Mapping[str, tuple[int, ...]]) -> list[PlannedTensor]:
    return [PlannedTensor(name=n, dtype="BF16", shape=shape) for n, shape in shapes.items()]


def _weights(random: Tensor, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Return a norm of ones, or a matrix of random numbers that keeps a vector's length."""
    shape = shapes[name]
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    count, start = math.prod(shape), zlib.crc32(name.encode()) % len(random)
    times = -(-(start + count) // len(random))
    repeated = random.repeat(times) if times > 1 else random
    scale = 1.0 if "embed" in name else shape[-1] ** -0.5
    return (repeated[start : start + count] * scale).view(shape)


def main() -> None:
    """Write a checkpoint of the shape that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    wanted = Shape()
    for name in Shape.__dataclass_fields__:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(wanted, name))
    options = vars(parser.parse_args())
    folder = options.pop("folder")
    print(f"{format_size(write_checkpoint(folder, Shape(**options)))} in {folder}")


if __name__ == "__main__":
    main()
