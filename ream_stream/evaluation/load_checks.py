"""Whether an output loads and runs: what `verify` does only if it is asked to."""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from ream_stream.checkpoint.config_json import find_mtp
from ream_stream.checkpoint.quantized import is_cache_scale, tensors_of
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.method.rng import generator
from ream_stream.model.finite import is_finite
from ream_stream.model.meta_model import get_tensor, places
from ream_stream.model.streamed_model import Batch, StreamedModel
from ream_stream.model.tensor_map import shape_of

from .checks import Check, Subject

TOKENS = 16
"""Length of the sequence that the check runs."""


def _places(subject: Subject) -> Iterator[str]:
    """Compare the checkpoint with all that transformers' class has, vision tower included.

    A multi-token-prediction layer with experts is one decoder layer more of that class.

    Experts of the text decoder have their shapes checked by `StreamedModel`, and what
    transformers computes from several tensors is only looked for.
    """
    model, entries = subject.model, subject.checkpoint.entries
    whole, kind = model.model, type(model.model).__name__
    state, reached = whole.state_dict(), set(whole.all_tied_weights_keys)
    apart = {*find_mtp(entries, subject.checkpoint.config), *cache_scales(subject.checkpoint)}
    experts = tuple(stack.prefix + "." for stack in subject.stacks.values())
    origin = model.map.placed(_floats(model))
    for place, target, _, converter in places(whole, origin):
        name = origin[place]
        if target in state:
            reached |= set(_parts(target, converter))
            if converter is None and not name.startswith(experts):
                shape = shape_of(name, model.quantized, entries)
                expected = tuple(get_tensor(whole, target).shape)
                if shape != expected:
                    yield f"{name} has shape {shape}, {kind} {expected}"
        elif name not in apart and not _any(whole._keys_to_ignore_on_load_unexpected, name):
            yield f"{name} has no place in {kind}"
    for target in sorted(set(state) - reached):
        if not _any(whole._keys_to_ignore_on_load_missing, target):
            yield f"no tensor is loaded into {target} of {kind}"


def cache_scales(checkpoint: Checkpoint) -> list[str]:
    """Return the scales of cached keys and values, if any weight is quantized.

    They are servers' business: no class of transformers has a place for them.
    """
    if checkpoint.quantization is None:
        return []
    return sorted(name for name in checkpoint.entries if is_cache_scale(name))


def _parts(target: str, converter: WeightConverter | None) -> Iterator[str]:
    """Yield all that is made of a tensor whose first part is loaded into `target`."""
    first, *others = converter.target_patterns if converter else [target]
    yield target
    for other in others:
        yield target.replace(first, other, 1)


def _floats(model: StreamedModel) -> list[str]:
    """Return the names of all tensors, of quantized ones those of their floats."""
    coded = {name for stored in model.quantized.values() for name in tensors_of(stored)}
    return [*(n for n in model.checkpoint.entries if n not in coded), *model.quantized]


def _any(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _run(subject: Subject) -> Iterator[str]:
    """Run some tokens through all layers, one layer in memory at a time, in bfloat16."""
    model = subject.model
    vocabulary: int = model.text_config.vocab_size
    drawn = generator(0, 0, "verify")
    ids_BL = torch.randint(vocabulary, (1, TOKENS), generator=drawn)
    batch, hidden_BLH = Batch(input_ids_BL=ids_BL, attention_mask_BL=None), torch.empty(0)
    with model.open_outside():
        for index in range(len(model.layers)):
            with model.open_layer(index):
                entering: Tensor | None = hidden_BLH if index else None
                leaving_BLH = model.run_layer(index, batch, entering)
            if not is_finite(leaving_BLH):
                yield f"what leaves layer {index} is not finite"
                return
            if index < model.num_layers:
                hidden_BLH = leaving_BLH
        if not is_finite(model.logits(batch, hidden_BLH)):
            yield "the logits are not finite"


LOAD = Check(
    name="load",
    good="transformers has a place for every tensor, and a tensor for every place",
    problems=_places,
    needs=("headers", "experts", "model"),
)
"""Check of ``--load``."""

RUN = Check(
    name="run",
    good=f"{TOKENS} tokens run through all layers with finite logits",
    problems=_run,
    needs=("headers", "experts", "model"),
)
"""Check of ``--run``."""
