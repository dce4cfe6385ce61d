"""The key-value cache of one sequence, as servers keep it, from a model's shapes alone.

Numbers of a token are those of the projections that make keys and values; of latent attention
(MLA) those of its latent and rotary part, which is what servers keep. Layers whose state does
not grow with the context are not counted.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ream_stream.errors import UsageError
from ream_stream.model.meta_model import find_decoder
from ream_stream.model.streamed_model import StreamedModel

NUMBER_BYTES = 2
"""Bytes of a number in the cache."""

_LATENT = "kv_a_proj_with_mqa"
_KEYS, _VALUES = "k_proj", "v_proj"

_LENGTHS: Mapping[str, Callable[[Any, int], int]] = {
    "full_attention": lambda _config, context: context,
    "indexed_attention": lambda _config, context: context,
    "sliding_attention": lambda config, context: min(context, config.sliding_window),
    "chunked_attention": lambda config, context: min(context, config.attention_chunk_size),
    **dict.fromkeys(("linear_attention", "mamba", "moe", "mlp"), lambda _config, _context: 0),
}
"""Tokens that a layer keeps of a context, by its entry in ``layer_types``."""


def cache_bytes(model: StreamedModel, context: int) -> int:
    """Return the bytes of one sequence's cache.

    Parameters
    ----------
    model
        The model; only its shapes count. Multi-token-prediction layers are left out.
    context
        Tokens of the sequence.

    Raises
    ------
    UsageError
        A layer keeps something whose size is not known.
    """
    config = model.text_config
    decoder = find_decoder(model.model)[1][: model.num_layers]
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(decoder)
    numbers = 0
    for index, (layer, kind) in enumerate(zip(decoder, kinds, strict=False)):
        if kind not in _LENGTHS:
            raise UsageError(
                f"--fits: what layer {index} of {config.model_type} keeps of a token ({kind}) "
                "is not known; give --target-size, the size of the weights alone"
            )
        if tokens := _LENGTHS[kind](config, context):
            numbers += tokens * _token_numbers(layer, config, index)
    return NUMBER_BYTES * numbers


def _token_numbers(layer: nn.Module, config: Any, index: int) -> int:  # noqa: ANN401
    """Return how many numbers a layer with attention keeps of a token."""
    # of an indexer, which has projections of the same names, one key is kept
    widths = {
        name.rpartition(".")[2]: module.out_features
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and "indexer" not in name
    }
    if _LATENT in widths:
        return widths[_LATENT] + (getattr(config, "index_head_dim", None) or 0)
    if _KEYS in widths and _VALUES in widths:
        return widths[_KEYS] + widths[_VALUES]
    raise UsageError(
        f"--fits: layer {index} of {config.model_type} has no keys and values of a known size; "
        "give --target-size, the size of the weights alone"
    )
