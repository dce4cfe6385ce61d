"""What the code cannot read from headers or from transformers, family by family.

A new family is one entry here and one tiny checkpoint in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ream_stream import deferred
from ream_stream.checkpoint.config_json import text_config
from ream_stream.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

Scores = Callable[["Tensor"], "Tensor"]


def _softmax(logits_TE: Tensor) -> Tensor:
    return torch.softmax(logits_TE.float(), dim=-1)


def _sigmoid(logits_TE: Tensor) -> Tensor:
    return torch.sigmoid(logits_TE.float())


def _root_softplus(logits_TE: Tensor) -> Tensor:
    return torch.nn.functional.softplus(logits_TE.float()).sqrt()


def _groups(config: Any) -> int:  # noqa: ANN401
    for key in ("n_group", "num_expert_group"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return 1


def _deepseek_v2_groups(config: Any) -> int:  # noqa: ANN401
    return _groups(config) if config.topk_method == "group_limited_greedy" else 1


COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of config.json for the number of routed experts; a class may read several of them."""

TOP_K_KEYS = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
    *("experts_per_token", "moe_top_k"),
)
"""Keys of config.json for the number of experts that a token is routed to."""

WIDTH_KEYS = ("moe_intermediate_size", "intermediate_size")
"""Keys of config.json for the inner width of a routed expert; the first that is there."""

_COUNT_LISTS = ("moe_capacity",)
"""Keys of config.json for lists that may repeat the number of routed experts."""

_BY_LAYER = ("per_layer_config", "mtp_per_layer_config")
"""Keys of config.json for overrides in single layers."""

_GATE = ("gate.weight",)
_BIASED = ("gate.weight", "gate.e_score_correction_bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Number of experts that the router selects for a token, and their groups."""

    top_k: int
    """Number of experts that the router selects for a token."""

    groups: int
    """Number of expert groups in the router; 1 without groups."""

    groups_per_token: int
    """Number of expert groups that the router selects for a token."""

    def problem(self, experts: int) -> str | None:
        """Return why the router cannot choose among so many experts; None if it can."""
        groups, taken = self.groups, self.groups_per_token
        if not 1 <= taken <= groups:
            return f"the router chooses among {taken} of {groups} groups"
        if experts < self.top_k:
            return f"the router sends each token to {self.top_k} experts"
        if groups > 1 and (experts % groups or experts // groups < 2):
            return (
                f"the router works in {groups} groups, so the count must be a multiple of "
                f"{groups} with at least 2 experts in each"
            )
        if groups > 1 and (within := experts // groups * taken) < self.top_k:
            return (
                f"the router sends each token to {self.top_k} experts of {taken} in {groups} "
                f"groups, which would have {within}"
            )
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One Hugging Face ``model_type``; of a wrapper, that of its text decoder."""

    routers: tuple[str, ...] = _GATE
    """Router-side tensors by name inside the MoE block on disk; one axis is E."""

    table: str | None = None
    """Table of experts by token id, (V, K), in layers that route by it; it replaces the last
    of `routers` there."""

    score: Scores = _softmax
    """Computes router scores over all experts, before top-k, in float32, from the logits."""

    gives_scores: bool = False
    """Whether the router's first output holds scores; otherwise logits."""

    scales_inputs: bool = False
    """Whether the router scales the expert inputs; its second output then holds the logits."""

    groups: Callable[[Any], int] = _groups
    """Returns the number of expert groups in the router from the transformers config."""

    shared_counts: tuple[str, ...] = ()
    """Keys of config.json for the number of shared experts, whose width is then that number
    times the width of a routed one; empty if the shared width has a key of its own."""

    normalizes: Callable[[Any], bool] = lambda _config: True
    """Tells from the transformers config whether g equal logits in the place of one get a g-th
    of its router coefficient each; otherwise each gets all of it."""

    shares_bias: bool = False
    """Whether biases are added to scores of which g equal logits get a g-th each."""

    uncut: Callable[[Any, int], str | None] = lambda _config, _slices: None
    """Returns why experts cannot be cut into so many slices without a change of the function;
    None if they can."""

    def bias_shares(self, slices: int) -> int:
        """Return by what biases of the router are divided where experts are cut."""
        return slices if self.shares_bias else 1

    def routing(self, config: Any, top_k: int) -> Routing:  # noqa: ANN401
        """Return how tokens are routed, from the transformers config of the text decoder."""
        groups = self.groups(config)
        taken = int(getattr(config, "topk_group", None) or groups)
        return Routing(top_k=top_k, groups=groups, groups_per_token=taken)

    def router_tensors(self, block: str, names: Container[str]) -> tuple[list[str], str | None]:
        """Return the router-side tensors of a layer, and its table if it chooses by one.

        Parameters
        ----------
        block
            Prefix of its MoE block.
        names
            Of all tensors of the checkpoint.
        """
        routers = [block + suffix for suffix in self.routers]
        if self.table is None or (table := block + self.table) not in names:
            return routers, None
        return routers[:-1], table


def _grouped(config: Any, slices: int) -> str | None:  # noqa: ANN401
    if slices > 1 and _groups(config) > 1:
        return "its router ranks groups of experts by their two best, which would be one expert"
    return None


def _deepseek(**fields: Any) -> Family:  # noqa: ANN401
    """Return a family with the router of DeepSeek-V3: sigmoid, and a bias for the choice."""
    usual: dict[str, Any] = {
        "routers": _BIASED,
        "score": _sigmoid,
        "shared_counts": ("n_shared_experts", "num_shared_experts"),
        "normalizes": lambda config: bool(getattr(config, "norm_topk_prob", True)),
        "uncut": _grouped,
    }
    return Family(**{**usual, **fields})


def _alone(reason: str) -> Callable[[Any, int], str | None]:
    return lambda _config, slices: reason if slices > 1 else None


_GRANITE = Family(routers=("router.layer.weight",))

FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(),
    "qwen2_moe": Family(),
    "qwen3_next": Family(),
    "qwen3_5_moe_text": Family(),
    "qwen3_vl_moe_text": Family(),
    "olmoe": Family(),
    "flex_olmo": Family(),
    "mixtral": Family(),
    "minimax": Family(),
    "phimoe": Family(uncut=_alone("its router masks what is near its choice")),
    "mellum": Family(),
    "gpt_oss": Family(routers=("router.weight", "router.bias")),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoe_swa": Family(routers=("router.weight",)),
    "jamba": Family(routers=("router.weight",)),
    "hunyuan_v1_moe": Family(
        routers=("gate.wg.weight",),
        uncut=lambda _config, _slices: "its shared expert is as wide as the routed ones",
    ),
    "ernie4_5_moe": Family(
        routers=("gate.weight", "moe_statics.e_score_correction_bias"),
        shared_counts=("moe_num_shared_experts",),
        shares_bias=True,
    ),
    "gemma4_text": Family(
        routers=("router.proj.weight", "router.per_expert_scale"),
        score=lambda scores_TE: scores_TE.float(),
        gives_scores=True,
    ),
    "llama4_text": Family(
        routers=("router.weight",),
        score=_sigmoid,
        scales_inputs=True,
        uncut=_alone("its router chooses one expert and scales its input"),
    ),
    "deepseek_v2": Family(groups=_deepseek_v2_groups, shared_counts=("n_shared_experts",)),
    "deepseek_v3": _deepseek(),
    "deepseek_v32": _deepseek(),
    "deepseek_v4": _deepseek(
        routers=("gate.weight", "gate.bias"), table="gate.tid2eid", score=_root_softplus
    ),
    "kimi_k2": _deepseek(),
    "glm4_moe": _deepseek(),
    "glm4v_moe_text": _deepseek(),
    "glm4_moe_lite": _deepseek(),
    "glm_moe_dsa": _deepseek(),
    "dots1": _deepseek(),
    "solar_open": _deepseek(),
    "mimo_v2_flash": _deepseek(),
    "axk1": _deepseek(),
    "axk2": _deepseek(),
    "nemotron_h": _deepseek(shared_counts=()),
    "kimi_linear": _deepseek(),
    "bailing_hybrid": _deepseek(routers=("gate.weight", "gate.expert_bias")),
    "exaone_moe": _deepseek(routers=("gate.weight", "e_score_correction_bias")),
    "laguna": _deepseek(routers=("gate.weight", "experts.e_score_correction_bias")),
    "afmoe": _deepseek(routers=("router.gate.weight", "expert_bias")),
    "hy_v3": _deepseek(routers=("router.gate.weight", "expert_bias")),
    "lfm2_moe": _deepseek(routers=("gate.weight", "expert_bias")),
    "minimax_m2": _deepseek(routers=("gate.weight", "e_score_correction_bias")),
    "step3p5": _deepseek(routers=("gate.weight", "router_bias")),
    "flint": _deepseek(routers=_GATE),
}
"""Families by model type; each has a tiny checkpoint in tests/support/tiny_families.py."""

REFUSED: Mapping[str, str] = {
    "aria": "its experts have names of their own (fc1, fc2)",
    "aria_text": "its experts have names of their own (fc1, fc2)",
    "beam": "no published checkpoint was seen",
    "cohere2_moe": "its router scores the chosen experts alone, by a rule of the config",
    "dbrx": "transformers runs its experts in a way of its own",
    "ernie4_5_vl_moe": "it has two sets of experts of different widths in one layer",
    "hy_v4": "its layers pass more than hidden states on",
    "inkling_text": "its shared experts are routed too",
    "inkling2_text": "it stores gate and up rows in turn, in tensors of its own names",
    "jetmoe": "its attention has experts too",
    "kolibri1": "its router's bias is outside the block of experts",
    "longcat_flash": "transformers 5.23 loads no published checkpoint of it, nor what would be "
    "made of one: its class wants gates of the experts that only return their input",
    "minimax_m3_vl_text": "no published layout was seen",
    "qwen4_exp": "no published layout was seen",
    "step3": "transformers has no class for it",
    "switch_transformers": "it is an encoder and a decoder",
    "nllb-moe": "it is an encoder and a decoder",
}
"""Unsupported families with experts, and the reason."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json.

    Raises
    ------
    UnsupportedModelError
        It is not in the table.
    """
    model_type = str(text_config(config).get("model_type"))
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported: {REFUSED[model_type]}"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
            + (
                "; code that comes with a checkpoint is never run"
                if "auto_map" in config
                else ""
            )
        )
    return FAMILIES[model_type]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSizes:
    """Numbers of config.json that describe the routed experts of a layer."""

    count: int
    """Number of experts."""

    inner: int
    """Inner width of an expert."""

    top_k: int
    """Number of experts that a token is routed to."""


def resized_config(
    config: Mapping[str, Any], family: Family, before: ExpertSizes, after: ExpertSizes
) -> dict[str, Any]:
    """Return config.json with other sizes of the routed experts and nothing else changed.

    Shared experts keep their width: where it is told as a multiple of that of routed ones,
    the multiple changes.
    """
    config = with_expert_count(config, before.count, after.count)
    if before.top_k != after.top_k:
        config = _replaced(config, TOP_K_KEYS, {before.top_k: after.top_k})
    if before.inner != after.inner:
        text = text_config(config)
        told = [key for key in WIDTH_KEYS if text.get(key) in (before.inner, [before.inner])]
        key = told[0] if told else WIDTH_KEYS[0]
        config = _replaced(config, (key,), {before.inner: after.inner})
        shared = {
            count: count * before.inner // after.inner
            for key in family.shared_counts
            if type(count := text.get(key)) is int
        }
        config = _replaced(config, family.shared_counts, shared)
    return config


def with_expert_count(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """Return config.json with another number of experts and nothing else changed."""
    return _replaced(config, COUNT_KEYS, {before: after}, lists=_COUNT_LISTS)


def _replaced(
    config: Mapping[str, Any],
    keys: tuple[str, ...],
    numbers: Mapping[int, int],
    *,
    lists: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return config.json with other numbers under some keys.

    Under any key that may hold them, and layer by layer in lists. The document is patched as
    raw JSON: saving it through transformers would rename keys.
    """

    def other(value: Any) -> Any:  # noqa: ANN401
        return numbers.get(value, value) if type(value) is int else value

    patched = dict(config)
    for key, value in config.items():
        if key in {*keys, *lists} and isinstance(value, list):
            patched[key] = [other(each) for each in value]
        elif key in keys:
            patched[key] = other(value)
        elif key == "text_config" and isinstance(value, Mapping):
            patched[key] = _replaced(value, keys, numbers, lists=lists)
        elif key in _BY_LAYER and isinstance(value, Mapping):
            patched[key] = {
                layer: _replaced(each, keys, numbers, lists=lists)
                if isinstance(each, Mapping)
                else each
                for layer, each in value.items()
            }
    return patched


def told_counts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of experts in config.json by key.

    A list that gives one number layer by layer is that number.
    """
    text = text_config(config)
    found = {key: text[key] for key in COUNT_KEYS if key in text}
    return {
        key: value[0]
        if isinstance(value, list) and value and all(each == value[0] for each in value)
        else value
        for key, value in found.items()
    }
