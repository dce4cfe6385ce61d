"""Llama 4, whose router scales what goes into an expert and not what comes out.

transformers repeats every token for every expert, times its score there (0 where it is
not sent), and runs all experts on all tokens. An expert makes 0 of 0, so the same sum comes
from the chosen experts alone, which are called as those of every other family are: with
inputs that are scaled already and coefficients of 1. A listener therefore gets
||f(g x)||, which is what the expert adds to the layer.

Letters in shapes: B sequences, L tokens of a sequence, T tokens, E experts, H hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ream_stream.errors import UnsupportedModelError

EXPERTS = "Llama4TextExperts"
"""Class name of the experts module of Llama 4."""


def route_scaled(layer: nn.Module) -> None:
    """Make the MoE blocks of a Llama 4 decoder layer call the selected experts only.

    Raises
    ------
    UnsupportedModelError
        Tokens are sent to several experts: their inputs are then as many.
    """
    for block in layer.modules():
        if type(getattr(block, "experts", None)).__name__ != EXPERTS:
            continue
        chosen: Any = block
        if chosen.top_k != 1:
            raise UnsupportedModelError(
                f"tokens are sent to {chosen.top_k} experts, whose inputs the router scales: "
                "only a single one is supported"
            )
        chosen.forward = _forward(chosen)


def _forward(block: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:  # noqa: ANN401
    def forward(hidden_BLH: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TH = hidden_BLH.reshape(-1, block.hidden_dim)
        score_TE, logits_TE = block.router(hidden_TH)
        # the router's own choice, which it does not return
        index_T1 = torch.topk(logits_TE, block.top_k, dim=1).indices
        scaled_TH = hidden_TH * score_TE.gather(1, index_T1)
        output_TH: Tensor = block.shared_expert(hidden_TH)
        weight_T1 = torch.ones_like(index_T1, dtype=hidden_TH.dtype)
        output_TH.add_(block.experts(scaled_TH, index_T1, weight_T1))
        return output_TH, logits_TE

    return forward
