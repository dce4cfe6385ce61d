"""What the code cannot read from headers or from transformers, family by family.

A new family is one entry here and one tiny checkpoint in the tests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import UnsupportedModelError

Score = Literal["softmax", "sigmoid"]

SCORES: Mapping[Score, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: torch.softmax(logits_TE.float(), dim=-1),
    "sigmoid": lambda logits_TE: torch.sigmoid(logits_TE.float()),
}
"""Router scores over all experts, before top-k, in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One Hugging Face ``model_type``."""

    count_keys: tuple[str, ...]
    """Keys of config.json that may hold the number of routed experts."""

    routers: tuple[str, ...]
    """Router-side tensors, as they are named inside the MoE block on disk; one axis is E."""

    score: Score = "softmax"
    """Key of `SCORES`."""

    groups: Callable[[Any], int] = lambda config: 1
    """Groups of experts the router selects in, from the transformers config."""


def _sigmoid_groups(config: Any) -> int:  # noqa: ANN401
    return int(config.n_group or 1)


def _deepseek_v2_groups(config: Any) -> int:  # noqa: ANN401
    return int(config.n_group or 1) if config.topk_method == "group_limited_greedy" else 1


_BIASED_GATE = ("gate.weight", "gate.e_score_correction_bias")

FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(
        count_keys=("num_experts", "num_local_experts"), routers=("gate.weight",)
    ),
    "qwen2_moe": Family(
        count_keys=("num_experts", "num_local_experts"), routers=("gate.weight",)
    ),
    "qwen3_next": Family(
        count_keys=("num_experts", "num_local_experts"), routers=("gate.weight",)
    ),
    "olmoe": Family(count_keys=("num_experts", "num_local_experts"), routers=("gate.weight",)),
    "mixtral": Family(
        count_keys=("num_local_experts", "num_experts"), routers=("gate.weight",)
    ),
    "deepseek_v2": Family(
        count_keys=("n_routed_experts",), routers=("gate.weight",), groups=_deepseek_v2_groups
    ),
    "deepseek_v3": Family(
        count_keys=("n_routed_experts",),
        routers=_BIASED_GATE,
        score="sigmoid",
        groups=_sigmoid_groups,
    ),
    "glm4_moe": Family(
        count_keys=("n_routed_experts",),
        routers=_BIASED_GATE,
        score="sigmoid",
        groups=_sigmoid_groups,
    ),
    "dots1": Family(
        count_keys=("n_routed_experts",),
        routers=_BIASED_GATE,
        score="sigmoid",
        groups=_sigmoid_groups,
    ),
    "minimax_m2": Family(
        count_keys=("num_local_experts",),
        routers=("gate.weight", "e_score_correction_bias"),
        score="sigmoid",
    ),
    "ernie4_5_moe": Family(
        count_keys=("moe_num_experts",),
        routers=("gate.weight", "moe_statics.e_score_correction_bias"),
    ),
    "hunyuan_v1_moe": Family(count_keys=("num_experts",), routers=("gate.wg.weight",)),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json.

    Raises
    ------
    UnsupportedModelError
        It is not in the table, or it is quantized.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
            + (
                "; code that comes with a checkpoint is never run"
                if "auto_map" in config
                else ""
            )
        )
    if config.get("quantization_config"):
        described: Any = config["quantization_config"]
        method = described.get("quant_method") if isinstance(described, Mapping) else None
        raise UnsupportedModelError(
            f"the checkpoint is quantized ({method or 'an unnamed method'}): "
            "quantized sources are not supported yet"
        )
    return FAMILIES[model_type]


def with_expert_count(config: Mapping[str, Any], family: Family, count: int) -> dict[str, Any]:
    """Return config.json with another number of experts and nothing else changed.

    A count given layer by layer stays a list. The document is patched as raw
    JSON: saving it through transformers would rename keys.
    """
    patched = dict(config)
    for key in family.count_keys:
        if key in patched:
            old = patched[key]
            patched[key] = [count] * len(old) if isinstance(old, Sequence) else count
    return patched
