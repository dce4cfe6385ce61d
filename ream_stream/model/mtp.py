"""Multi-token-prediction layers: extra layers that guess the token after the next.

They stand beside the decoder under names of their own, with experts and a router as a
decoder layer has, and read the same counts of config.json. One with experts is run as one
more decoder layer of the family's own class, behind the last. With h(t) what the decoder's
final norm gives for a token and e(t + 1) the embedding of the next, what enters it is::

    W [enorm(e(t + 1)); hnorm(h(t))]

Where layers pass several states of a token on, each of them enters, and what leaves the last
layer is taken as it is::

    W_e enorm(e(t + 1)) + W_h hnorm(h(t))

docs/concepts/method.md has the sources.

Letters in shapes: B sequences of a batch, L tokens of a sequence, S states of a token,
H hidden.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ream_stream.checkpoint.config_json import MTP_KEYS, find_mtp, text_config


class NextToken(nn.Module):
    """Joins what the decoder made of each token with the token that follows it.

    Parameters
    ----------
    norm
        Class of the family's norms.
    config
        Of the text decoder.
    """

    is_normed: ClassVar[bool] = True
    """Whether the layer gets states after the decoder's final norm."""

    def __init__(self, norm: type[nn.Module], config: Any) -> None:  # noqa: ANN401
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = norm(width, eps=eps), norm(width, eps=eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden_BLH: Tensor, embedded_BLH: Tensor) -> Tensor:
        """Return the layer's input, from normed states and the next tokens' embeddings."""
        both = [self.enorm(embedded_BLH), self.hnorm(hidden_BLH)]
        joined_BLH: Tensor = self.eh_proj(torch.cat(both, dim=-1))
        return joined_BLH


class NextTokenOfStates(nn.Module):
    """Joins several states of each token with the next token; see `NextToken`."""

    is_normed: ClassVar[bool] = False
    """Whether the layer gets states after the decoder's final norm; see `NextToken`."""

    def __init__(self, norm: type[nn.Module], config: Any) -> None:  # noqa: ANN401
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = norm(width, eps=eps), norm(width, eps=eps)
        self.e_proj, self.h_proj = (nn.Linear(width, width, bias=False) for _ in "eh")

    def forward(self, hidden_BLSH: Tensor, embedded_BLH: Tensor) -> Tensor:
        """Return the layer's input, (B, L, S, H)."""
        embedded_BLH = self.e_proj(self.enorm(embedded_BLH))
        joined_BLSH: Tensor = embedded_BLH.unsqueeze(2) + self.h_proj(self.hnorm(hidden_BLSH))
        return joined_BLSH


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """Names and layer types of a family's multi-token-prediction layer."""

    experts: str
    """Pattern of the experts' prefix; ``LAST`` is the number of decoder layers."""

    names: tuple[tuple[str, str], ...]
    """Patterns of names with their replacements; ``LAYER`` is the path of the layer."""

    layer_type: str | None = None
    """Entry in ``layer_types`` if the config has none; None for the last layer's entry."""

    mlp_type: str = "sparse"
    """Entry in ``mlp_layer_types``."""

    joins: Callable[[type[nn.Module], Any], nn.Module] = NextToken
    """Makes the module that joins hidden states and next-token embeddings."""

    def place(self, name: str, layer: str) -> str:
        """Return the name of one of its tensors as if it were of decoder layer `layer`."""
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement.replace("LAYER", layer), name)
        return name


_BEHIND = Wiring(
    experts=r"(?:.+\.)?layers\.LAST\..+",
    names=((r"(\.layers\.\d+)\.(enorm|hnorm|eh_proj)\.", r"\1.next_token.\2."),),
)
"""Wiring of an MTP layer that is numbered after the last decoder layer."""

_BESIDE = Wiring(
    experts=r"mtp\.layers\.0\..+",
    names=(
        (r"^mtp\.layers\.0\.", "LAYER."),
        (r"^mtp\.fc\.", "LAYER.next_token.eh_proj."),
        (r"^mtp\.pre_fc_norm_embedding\.", "LAYER.next_token.enorm."),
        (r"^mtp\.pre_fc_norm_hidden\.", "LAYER.next_token.hnorm."),
    ),
    layer_type="full_attention",
)
"""Wiring of an MTP layer with its own prefix."""

_OF_STATES = Wiring(
    experts=r"mtp\.0\..+",
    names=(
        (r"^mtp\.0\.(enorm|hnorm|e_proj|h_proj)\.", r"LAYER.next_token.\1."),
        (r"^mtp\.0\.", "LAYER."),
    ),
    layer_type="sliding_attention",
    mlp_type="moe",
    joins=NextTokenOfStates,
)
"""Wiring of an MTP layer with a numbered prefix of its own and several states a token."""

WIRINGS: Mapping[str, Wiring] = {
    "deepseek_v3": _BEHIND,
    "deepseek_v32": _BEHIND,
    "deepseek_v4": _OF_STATES,
    "kimi_k2": _BEHIND,
    "glm4_moe": _BEHIND,
    "glm4_moe_lite": _BEHIND,
    "glm_moe_dsa": _BEHIND,
    "qwen3_next": _BESIDE,
    "qwen3_5_moe_text": _BESIDE,
    "mellum": replace(_BESIDE, layer_type="sliding_attention"),
}
"""Wirings by model type; for a wrapper by the type of its text decoder."""


def find_wiring(prefixes: Iterable[str], config: Mapping[str, Any]) -> Wiring | None:
    """Return how the layer with experts is wired; None if there is none, or it is not known.

    Parameters
    ----------
    prefixes
        Of all experts of a checkpoint.
    config
        config.json.
    """
    found = find_mtp(prefixes, config)
    if not found or why_unknown(found, config):
        return None
    return WIRINGS[text_config(config)["model_type"]]


def why_unknown(prefixes: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Return why layers whose experts have these prefixes cannot be run; None if they can."""
    text, found = text_config(config), sorted(prefixes)
    wiring = WIRINGS.get(str(text.get("model_type")))
    if wiring is None:
        return f"what enters those of model type {text.get('model_type')!r} is not known"
    if len(found) > 1:
        return f"there are {len(found)} of them, and published models have one"
    pattern = wiring.experts.replace("LAST", str(text.get("num_hidden_layers")))
    if not re.fullmatch(pattern, found[0]):
        return f"model type {text['model_type']!r} has other names for them"
    if text.get("mtp_use_dedicated_embeddings"):
        return "it has embeddings of its own"
    ratios, layers = text.get("compress_ratios"), text.get("num_hidden_layers")
    if isinstance(ratios, list) and isinstance(layers, int) and any(ratios[layers:]):
        return "compress_ratios of config.json has it look at compressed keys"
    return None


def lengthen(config: Any, wiring: Wiring) -> None:  # noqa: ANN401
    """Change the config of a text decoder to that of one with such a layer behind the last."""
    if getattr(config, "layer_types", None):
        told = getattr(config, "mtp_layer_types", None) or [wiring.layer_type]
        config.layer_types = [*config.layer_types, told[0] or config.layer_types[-1]]
    for key, entry in (("mlp_layer_types", wiring.mlp_type), ("indexer_types", "full")):
        if getattr(config, key, None):
            setattr(config, key, [*getattr(config, key), entry])
    config.num_hidden_layers += 1


def without_mtp(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with no such layers."""
    patched = {key: 0 if key in MTP_KEYS else value for key, value in config.items()}
    text = text_config(config)
    if text is not config:
        patched["text_config"] = without_mtp(text)
    return patched
