"""How experts lie in a checkpoint: read from the tensors' names, never from the family's."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ream_stream.errors import DamagedError, UnsupportedModelError

from .header import TensorEntry

_EXPERT = re.compile(r"(?P<prefix>.+\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")

PARTS = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
"""The two sets of names under which an expert's three matrices are published."""

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """Names of one expert's tensors."""

    gate: str
    """Of the (I, H) matrix under the activation."""

    up: str
    """Of the (I, H) matrix beside it."""

    down: str
    """Of the (H, I) matrix."""

    def parts(self) -> tuple[str, str, str]:
        """Return gate, up, down."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertStack:
    """The routed experts of one layer, each stored by itself."""

    prefix: str
    """What their names begin with: ``model.layers.3.mlp.experts``."""

    experts: tuple[ExpertNames, ...]
    """By expert."""

    inner: int
    """I, the inner width."""

    hidden: int
    """H, the hidden size."""

    dtype: str
    """Of all their tensors, in the format's spelling."""

    @property
    def block(self) -> str:
        """Return the prefix of the MoE block, with its dot: ``model.layers.3.mlp.``."""
        return self.prefix.removesuffix("experts")

    def renamed(self, name: str, expert: int, new_expert: int) -> str:
        """Return the name of an expert's tensor after the expert got a new number."""
        start = f"{self.prefix}.{expert}."
        return f"{self.prefix}.{new_expert}.{name.removeprefix(start)}"


def find_experts(entries: Mapping[str, TensorEntry]) -> dict[str, ExpertStack]:
    """Find the stacks of experts in a checkpoint, by prefix.

    Raises
    ------
    DamagedError
        Expert numbers have gaps, or shapes within a layer differ.
    UnsupportedModelError
        Experts are stored in a way this version does not read.
    """
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in entries:
        match = _EXPERT.fullmatch(name)
        if match and match["part"] in PARTS:
            parts = found.setdefault(match["prefix"], {}).setdefault(int(match["expert"]), {})
            parts[PARTS[match["part"]]] = name
        elif ".experts." in name:
            raise UnsupportedModelError(
                f"tensor {name!r}: experts are stored fused, quantized or with biases; "
                "this version reads experts stored one by one as bf16, fp16 or fp32 weights"
            )
    return {
        prefix: _stack(prefix, experts, entries) for prefix, experts in sorted(found.items())
    }


def _stack(
    prefix: str, experts: dict[int, dict[str, str]], entries: Mapping[str, TensorEntry]
) -> ExpertStack:
    if sorted(experts) != list(range(len(experts))):
        raise DamagedError(f"{prefix}: expert numbers have gaps: {_gaps(experts)} missing")
    names = []
    for number in range(len(experts)):
        if set(experts[number]) != {"gate", "up", "down"}:
            raise DamagedError(f"{prefix}.{number} lacks one of gate, up and down projection")
        names.append(ExpertNames(**experts[number]))
    first = entries[names[0].gate]
    if len(first.shape) != 2:
        raise DamagedError(f"{first.name} has shape {first.shape}, a matrix was expected")
    inner, hidden = first.shape
    if first.dtype not in FLOATS:
        raise UnsupportedModelError(
            f"{first.name} is stored as {first.dtype}: quantized experts are not supported yet"
        )
    for expert in names:
        for name, shape in zip(
            expert.parts(), [(inner, hidden), (inner, hidden), (hidden, inner)], strict=True
        ):
            if (entries[name].shape, entries[name].dtype) != (shape, first.dtype):
                raise DamagedError(
                    f"{name} is {entries[name].dtype} {entries[name].shape}, "
                    f"the other experts of the layer have {first.dtype} {shape}"
                )
    return ExpertStack(
        prefix=prefix, experts=tuple(names), inner=inner, hidden=hidden, dtype=first.dtype
    )


def _gaps(numbers: Iterable[int]) -> str:
    """Return the first few missing numbers, without counting up to the largest."""
    present = set(numbers)
    absent = (str(number) for number in range(max(present)) if number not in present)
    return ", ".join(itertools.islice(absent, 5))
