"""What a run will read, write and hold, as data; `planner.py` makes it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.formats import Stored
from ream_stream.checkpoint.header import TensorEntry
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.checkpoint.shard_fetcher import ShardFetcher
from ream_stream.checkpoint.shards import Shard
from ream_stream.model.expert_blocks import cut_experts
from ream_stream.model.families import Family
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.model.tensor_map import LayerTensors
from ream_stream.settings import Settings

from .refit_memory import ACTIVATIONS, HELD_BACK_SHARE
from .schedule import Budgets, Schedule

OUTPUTS = "attention outputs"
"""Memory part: attention outputs. If they are not kept, attention runs in each pass."""

SUMS = "sums of experts"
"""Memory part: partial sums of expert outputs, kept between blocks of experts."""

GRAMS = "products of activations"
"""Memory part: A_e of every expert, from which slices are chosen and narrowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """One decoder layer of the output, or a multi-token-prediction layer."""

    keys: LayerTensors
    """Tensors of the layer in the source."""

    shards: tuple[Shard, ...]
    """Shards of the layer in the output."""

    stack: ExpertStack | None
    """Experts of the layer in the output; None in a dense layer."""

    routers: Mapping[str, int]
    """Router-side tensors with their expert axis; empty in a dense layer."""

    table: str | None = None
    """Name of the table of experts by token id; None if the layer does not route by it."""

    def weight_bytes(self, entries: Mapping[str, TensorEntry]) -> int:
        """Return the bytes of the layer's tensors in the source and in the output."""
        read = sum(entries[name].nbytes for name in self.keys.names)
        return read + sum(shard.nbytes for shard in self.shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Inputs and outputs of a run; they follow from headers, settings and tokens alone."""

    settings: Settings
    """Settings of the run."""

    source: Checkpoint
    """Source checkpoint."""

    kept: Checkpoint = field(repr=False)
    """Source checkpoint without the layers that the output drops."""

    fetcher: ShardFetcher = field(repr=False)
    """Fetcher of the source's shards, layer by layer."""

    config: Mapping[str, Any]
    """Contents of the output's config.json."""

    quantization_file: Mapping[str, Any] | None
    """Contents of the output's hf_quant_config.json; None if it has none."""

    inherited: Mapping[str, Any] = field(repr=False)
    """Entries that the output's model card takes from the source's."""

    notes: tuple[str, ...]
    """Notes on unexpected properties of the run that do not prevent it."""

    family: Family
    """Family of the model."""

    num_experts: int
    """Experts of a source layer."""

    top_k: int
    """Number of experts that the router selects for a token."""

    routing_groups: int
    """Number of expert groups in the router; 1 without groups."""

    layers: tuple[LayerPlan, ...]
    """Decoder layers in order, followed by a multi-token-prediction layer with experts."""

    outside: tuple[Shard, ...]
    """Shards of the tensors outside the layers."""

    decoded: Mapping[str, Stored] = field(repr=False)
    """Quantized matrices beside the experts that are written as floats, by output name."""

    sequences: int
    """Number of calibration sequences."""

    sequence_length: int
    """Tokens of a sequence."""

    domains: int
    """Domains of the calibration set."""

    hidden_size: int
    """Hidden size, H."""

    @property
    def output_top_k(self) -> int:
        """Number of experts of the output that the router selects for a token."""
        return self.settings.top_k(self.top_k)

    @property
    def moe_layers(self) -> list[LayerPlan]:
        """Layers that have experts."""
        return [layer for layer in self.layers if layer.keys.stack]

    @property
    def experts(self) -> tuple[ExpertStack, ExpertStack]:
        """Experts of the first layer that has any, in the source and in the output."""
        layer = self.moe_layers[0]
        assert layer.keys.stack is not None
        assert layer.stack is not None
        return layer.keys.stack, layer.stack

    @property
    def refits(self) -> bool:
        """Whether the experts that stay are refitted."""
        return self.settings.refits(self.num_experts)

    @property
    def tracks_original(self) -> bool:
        """Whether the original model's own states are carried beside the others."""
        return self.settings.tracks_original(self.num_experts)

    @property
    def merges(self) -> bool:
        """Whether experts are compared and merged."""
        return self.settings.merges(self.num_experts)

    def leads_on(self, layer: LayerPlan) -> bool:
        """Tell whether what leaves a layer enters another."""
        return layer.keys.index < len(self.layers) - 1

    def propagates(self, layer: LayerPlan) -> bool:
        """Tell whether a layer is run again, once it was written, for the next."""
        is_moe = layer.keys.stack is not None
        again = self.settings.sequential or not is_moe
        return self.settings.runs_layers and self.leads_on(layer) and again

    def tracks_original_through(self, layer: LayerPlan) -> bool:
        """Tell whether a layer is run on the original model's own states."""
        return self.tracks_original and (self.leads_on(layer) or layer.keys.stack is not None)

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """Shape of the hidden states at a boundary."""
        return self.sequences, self.sequence_length, self.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the layers' forward pass."""
        dtype: torch.dtype = getattr(torch, self.settings.compute_dtype)
        return dtype

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states at one boundary; 0 if layers are not run."""
        if not self.settings.runs_layers:
            return 0
        tokens = self.sequences * self.sequence_length
        return tokens * self.hidden_size * self.dtype.itemsize

    @property
    def boundary_bytes(self) -> int:
        """Bytes of all hidden states at one boundary, the original model's too if carried."""
        return self.hidden_bytes * (2 if self.tracks_original else 1)

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(entry.nbytes for entry in self.source.entries.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the output's shards."""
        shards = [shard for layer in self.layers for shard in layer.shards]
        return sum(shard.nbytes for shard in [*shards, *self.outside])

    @property
    def listing_bytes(self) -> int:
        """Bytes of config, index, manifest and journal, about, and rather more."""
        shards = [*(shard for layer in self.layers for shard in layer.shards), *self.outside]
        nbytes = 4096 + 600 * len(shards) + len(json.dumps(self.config, indent=2))
        for shard in shards:
            nbytes += sum(len(tensor.name) + len(shard.name) + 20 for tensor in shard.tensors)
        # saliencies and groups, in the manifest and in a journal that is replaced
        return nbytes + 3 * len(self.layers) * (300 + 40 * self.num_experts)

    @property
    def staged_bytes(self) -> int:
        """Bytes of the largest layer, if it is written once more to be refitted."""
        if not self.refits:
            return 0
        return max(sum(s.nbytes for s in layer.shards) for layer in self.moe_layers)

    def output_checkpoint(self, folder: Path) -> Checkpoint:
        """Return the output as a checkpoint whose layer l is on disk once it was written.

        What is outside the layers is taken from the source; all of it, if no checkpoint is
        written.
        """
        if self.settings.observes:
            return self.kept
        entries = {}
        for layer in self.layers:
            for shard in layer.shards:
                position = len(shard.header())
                for tensor in shard.tensors:
                    entries[tensor.name] = TensorEntry(
                        name=tensor.name,
                        path=folder / shard.name,
                        dtype=tensor.dtype,
                        shape=tensor.shape,
                        start=position,
                        stop=position + tensor.nbytes,
                    )
                    position += tensor.nbytes
        inside = {name for layer in self.layers for name in layer.keys.names}
        outside = {n: e for n, e in self.kept.entries.items() if n not in inside}
        config = dict(self.config)
        if self.source.quantization:  # tells how what is taken from the source is stored
            config["quantization_config"] = self.source.quantization
        return Checkpoint(
            folder=folder,
            config=config,
            entries={**entries, **outside},
            stamps=self.source.stamps,
        )

    @property
    def others(self) -> Mapping[str, int]:
        """Bytes of the source's files that are copied, by name: none into statistics."""
        return {} if self.settings.observes else self.source.others

    @property
    def fixed_disk(self) -> dict[str, int]:
        """Bytes on disk at the high-water mark, by part, but for scratch stores."""
        return {
            "shards": self.output_bytes,
            "other files": sum(self.others.values()),
            "index, manifest and journal": self.listing_bytes,
            "hidden states": 2 * self.boundary_bytes,
            "layer before its refit": self.staged_bytes,
            "streamed shards": self.fetcher.peak_bytes,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Layout):
    """All that is known before a run starts."""

    source_model: StreamedModel = field(repr=False, compare=False)
    """Model of the source on the processor; runs of the plan move it to their device."""

    output_model: StreamedModel = field(repr=False, compare=False)
    """Model of the output on the processor; runs of the plan move it to their device."""

    budgets: Budgets
    """Limits on memory and disk."""

    schedule: Schedule
    """Schedule of the run on this machine."""

    memory: Mapping[str, int] = field(repr=False)
    """Peak of anonymous host memory by part, in bytes."""

    device_memory: Mapping[str, int] = field(repr=False)
    """Peak of device memory by part, in bytes; empty if layers run on the processor."""

    scratch: Mapping[str, int] = field(repr=False)
    """Bytes on disk, by part, that are kept between passes over a layer."""

    @property
    def num_batches(self) -> int:
        """Batches of the calibration set."""
        return -(-self.sequences // self.schedule.batch_sequences)

    @property
    def refit_blocks(self) -> list[range]:
        """Blocks of the experts that stay, whose activations a refit stores block by block.

        There is none where all of them are run at once, and their activations are kept as they
        are or computed again.
        """
        blocks = self.schedule.expert_blocks
        if not self.keeps(ACTIVATIONS) or (blocks == 1 and not self.device_memory):
            return []
        return cut_experts(self.settings.experts, blocks)

    @property
    def makes_activations_again(self) -> bool:
        """Whether each pass of a refit computes activations."""
        return self.refits and not self.keeps(ACTIVATIONS)

    @property
    def refit_repeats(self) -> float:
        """Number of passes of a refit over all tokens, after their sums."""
        iterations = (
            0 if self.schedule.solver.gathered else self.settings.method.refit_iterations
        )
        blocks = self.schedule.solver.column_blocks
        return HELD_BACK_SHARE + blocks * (iterations + HELD_BACK_SHARE) + blocks - 1

    @property
    def memory_bytes(self) -> int:
        """Anonymous host memory at its peak."""
        return sum(self.memory.values())

    @property
    def disk(self) -> dict[str, int]:
        """Bytes on disk at the high-water mark, by part."""
        return {**self.fixed_disk, **self.scratch}

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk at the high-water mark."""
        return sum(self.disk.values())

    def drops_states(self, layer: LayerPlan, cache_bytes: int | None = None) -> bool:
        """Tell whether states leave the page cache once used, so that weights stay in it.

        Parameters
        ----------
        layer
            The layer that is run on them.
        cache_bytes
            Memory that the page cache may take; None for what the plan leaves to it.
        """
        if cache_bytes is None:
            cache_bytes = self.budgets.available - self.memory_bytes
        weights = layer.weight_bytes(self.source.entries)
        return weights + 2 * self.boundary_bytes > cache_bytes

    def keeps_outputs(self, layer: LayerPlan) -> bool:
        """Tell whether what attention returns is kept for later passes over an MoE layer."""
        again = self.refits or self.propagates(layer) or self.schedule.expert_blocks > 1
        return again and self.keeps(OUTPUTS)

    def keeps(self, part: str) -> bool:
        """Tell whether something is kept from pass to pass, in memory or on disk."""
        return bool(self.memory.get(part) or self.scratch.get(part))
