"""A 3-layer Qwen3-MoE in memory, compressed layer by layer with the method's own functions.

This is the whole method without any streaming: transformers runs the model, a
hook catches what enters a layer's experts, and every expert runs on every token.

Letters in shapes: T tokens, E experts, K experts a token, H hidden, I inner width.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, normalize, silu
from transformers import Qwen3MoeForCausalLM

from ream_stream.method.alignment import (
    ALIGNMENTS,
    Neurons,
    Pair,
    activation_cost,
    align,
    match,
)
from ream_stream.method.expert import Expert, reorder
from ream_stream.method.grouping import GROUPINGS, Evidence
from ream_stream.method.merging import MERGES, merge
from ream_stream.method.saliency import SALIENCIES, RoutedSums, merge_weights
from ream_stream.method.similarity import (
    LogitGram,
    MeanActivations,
    distance,
    expert_similarity,
    gate_similarity,
)

DATA = Path(__file__).parent / "data" / "qwen3moe-12x3"
NUM_LAYERS, NUM_EXPERTS, INNER, TOP_K = 3, 12, 24, 2
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Variant:
    saliency: str = "reap-softmax"
    similarity: str = "plain"
    gate_term: bool = True
    grouping: str = "ream"
    group_size: int = 4
    alignment: str = "activations"
    """A key of ALIGNMENTS, or of `RELEASED_COSTS` below."""
    merge: str = "saliency"
    sequential: bool = True
    keep: int = 9


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer is compressed from."""

    x_TH: torch.Tensor
    experts: list[Expert]
    router_EH: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What became of a layer."""

    saliency_E: torch.Tensor
    groups: list[list[int]]
    orders: dict[int, list[int]] = field(default_factory=dict)
    """Of each absorbed expert's neurons."""
    experts: dict[int, Expert] = field(default_factory=dict)
    """By centroid."""


class SmallQwen:
    def __init__(self):
        self._model = Qwen3MoeForCausalLM.from_pretrained(
            DATA / "model", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._input_ids = load_file(DATA / "calibration.safetensors")["input_ids"].long()

    def layer(self, index):
        block = self._block(index)
        pairs = zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)
        return Layer(
            x_TH=self._expert_inputs(index),
            experts=[Expert(*both.detach().chunk(2), down.detach()) for both, down in pairs],
            router_EH=block.gate.weight.detach(),
        )

    def replace(self, index, experts):
        """Keep the given experts, by centroid, and their rows of the router."""
        kept, block = sorted(experts), self._block(index)
        fused = [torch.cat([experts[expert].gate_IH, experts[expert].up_IH]) for expert in kept]
        down = [experts[expert].down_HI for expert in kept]
        block.experts.num_experts = block.gate.num_experts = len(kept)
        block.experts.gate_up_proj = torch.nn.Parameter(torch.stack(fused))
        block.experts.down_proj = torch.nn.Parameter(torch.stack(down))
        block.gate.weight = torch.nn.Parameter(block.gate.weight[kept])

    def _block(self, index):
        return self._model.model.layers[index].mlp

    @torch.no_grad()
    def _expert_inputs(self, index):
        caught = []
        hook = self._block(index).register_forward_pre_hook(
            lambda _, inputs: caught.append(inputs[0].flatten(0, 1))
        )
        self._model.model(input_ids=self._input_ids, use_cache=False)
        hook.remove()
        return caught[0]


def compress(variant, adopt=lambda _, groups: groups):
    """Yield the layer before and after; `adopt(index, groups)` may swap centroids."""
    model = SmallQwen()
    layers = (SmallQwen() if not variant.sequential else model).layer
    for index in range(NUM_LAYERS):
        layer = layers(index)
        activations = [inner_activation(expert, layer.x_TH) for expert in layer.experts]
        evidence = observe(variant, layer, activations)
        groups = GROUPINGS[variant.grouping](
            evidence, variant.keep, group_size=variant.group_size, routing_groups=1
        )
        done = Compressed(saliency_E=evidence.saliency_E, groups=adopt(index, groups))
        merge_groups(variant, layer, activations, done)
        model.replace(index, done.experts)
        yield layer, done


def inner_activation(expert, x_TH):
    return silu(linear(x_TH, expert.gate_IH)) * linear(x_TH, expert.up_IH)


def observe(variant, layer, activations):
    """Steps 1 and 3: saliency, mean outputs and distances, in two batches."""
    sums = RoutedSums(NUM_EXPERTS)
    means = MeanActivations(NUM_EXPERTS, INNER, similarity=variant.similarity, device=CPU)
    gram = LogitGram(NUM_EXPERTS, device=CPU)
    outputs = [
        linear(a_TI, expert.down_HI)
        for a_TI, expert in zip(activations, layer.experts, strict=True)
    ]
    norm_TE = torch.stack([output_TH.norm(dim=1) for output_TH in outputs], dim=1)
    for batch in torch.arange(len(layer.x_TH)).split(500):
        logits_TE = linear(layer.x_TH[batch], layer.router_EH)
        score_TE = logits_TE.softmax(dim=1)
        score_TK, topk_TK = score_TE.topk(TOP_K)
        gate_TK = score_TK / score_TK.sum(dim=1, keepdim=True)
        sums.update(topk_TK, gate_TK, score_TK, norm_TE[batch].gather(1, topk_TK))
        gram.update(logits_TE)
        for expert in range(NUM_EXPERTS):
            means.add(expert, activations[expert][batch], score_TE[:, expert])
    mean_EH = torch.stack(
        [
            expert.down_HI.double() @ mean_I
            for expert, mean_I in zip(layer.experts, means.mean_EI(), strict=True)
        ]
    )
    gate_EE = gate_similarity(gram.gram_EE) if variant.gate_term else None
    return Evidence(
        saliency_E=SALIENCIES[variant.saliency](sums),
        distance_EE=distance(expert_similarity(mean_EH), gate_EE),
        mean_EH=mean_EH,
    )


def merge_groups(variant, layer, activations, done):
    """Steps 5 and 6: fill in `orders` and `experts`."""
    projected = project_as_released(layer.experts)
    weight_E = merge_weights(done.saliency_E)
    neurons = [Neurons(*pair) for pair in zip(layer.experts, activations, strict=True)]
    for centroid, *absorbed in done.groups:
        aligned = [layer.experts[centroid]]
        for member in absorbed:
            if variant.alignment in RELEASED_COSTS:
                cost = RELEASED_COSTS[variant.alignment]
                order_I = match(cost(centroid, member, activations, projected))
            else:
                pair = Pair(neurons[centroid], neurons[member])
                order_I = align(ALIGNMENTS[variant.alignment], pair)
            done.orders[member] = order_I.tolist()
            aligned.append(reorder(layer.experts[member], order_I))
        share_G = MERGES[variant.merge](weight_E[[centroid, *absorbed]])
        done.experts[centroid] = merge(share_G.tolist(), aligned, torch.float32)


def project_as_released(experts, components=64):
    """Return each expert's neurons as the release compares them, with an exact SVD."""
    rows = torch.cat([torch.cat([gate, up, down.T], dim=1) for gate, up, down in experts])
    rows = normalize(rows.double(), dim=1)
    rows = rows - rows.mean(dim=0)
    _, scale, directions = torch.linalg.svd(rows, full_matrices=False)
    projected = rows @ (directions[:components].T * scale[:components])
    return normalize(projected, dim=1).chunk(len(experts))


def released_weights(centroid, member, activations, projected):
    del activations
    return torch.cdist(projected[centroid], projected[member])


def released_both(centroid, member, activations, projected):
    return activation_cost(activations[centroid], activations[member]) + torch.cdist(
        projected[centroid], projected[member]
    )


RELEASED_COSTS = {"released-weights": released_weights, "released-both": released_both}
