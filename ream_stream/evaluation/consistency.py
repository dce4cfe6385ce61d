"""What config.json and the tensors say of how weights are stored, held against each other.

Functions that yield a sentence for every contradiction, saying what and where.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from ream_stream.checkpoint.config_json import find_mtp
from ream_stream.checkpoint.formats import Modules, named_modules
from ream_stream.checkpoint.formats.codec import FLOATS
from ream_stream.checkpoint.reader import Checkpoint

_NUMBER = re.compile(r"\.\d+(?=\.)")


def format_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Compare whether there are quantized tensors with whether the config tells of any."""
    described = list(checkpoint.described())
    quantized = checkpoint.quantized
    if quantized and not described:
        yield f"{min(quantized)} is quantized, config.json has no quantization_config"
    if described and not quantized:
        yield f"{described[0][0]} has a quantization_config, no tensor is quantized"


def list_problems(
    checkpoint: Checkpoint, modules: Iterable[str], num_experts: int
) -> Iterator[str]:
    """Find the modules that descriptions of formats name, and that are gone.

    Parameters
    ----------
    checkpoint
        What is looked at.
    modules
        Of transformers' class, which names some otherwise than the checkpoint does.
    num_experts
        Experts of a layer.
    """
    known: Modules | None = None
    for file, described in checkpoint.described():
        for key, name in named_modules(described):
            known = known or Modules([*checkpoint.entries, *modules], num_experts)
            if name not in known:
                yield f"{file} names {name} in {key}: there is no such module"


def dtype_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Find floats whose dtype is not that of the same tensor in most layers.

    A correction bias that was rounded in one layer still loads, and routes otherwise.
    """
    apart = find_mtp(checkpoint.entries, checkpoint.config)
    kinds: dict[str, list[str]] = {}
    for name, entry in checkpoint.entries.items():
        if entry.dtype in FLOATS and name not in apart:
            kinds.setdefault(_NUMBER.sub(".N", name), []).append(name)
    for names in kinds.values():
        dtypes = Counter(checkpoint.entries[name].dtype for name in names)
        usual, _ = dtypes.most_common(1)[0]
        for name in names:
            if (dtype := checkpoint.entries[name].dtype) != usual:
                yield f"{name} is {dtype}, in most layers it is {usual}"
