"""How experts lie in a checkpoint: read from the tensors' names, never from the family's."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ream_stream.errors import DamagedError, UnsupportedModelError

from .expert_stack import ExpertMatrix, ExpertStack
from .formats import FLOATS, Part, Plain, Stored, detect
from .header import TensorEntry

_NUMBERED = re.compile(
    r"(?P<prefix>.+\.experts)\.(?P<expert>0|[1-9][0-9]{0,17})\.(?P<leaf>\w+)(?P<suffix>\.\w+)"
)

NUMBERED = {
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "w1": ("gate",),
    "w3": ("up",),
    "w2": ("down",),
}
"""Tensor names of the matrices of a single expert, with their parts; two naming schemes."""

STACKED = {
    "gate_up_proj": ("gate", "up"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "input_linear": ("gate", "up"),
    "output_linear": ("down",),
}
"""Tensor names of stacks with one matrix for each expert, with their parts."""

_BIAS = "_bias"
_STACKED = re.compile(
    rf"(?P<prefix>.+)\.(?P<leaf>{'|'.join(STACKED)})(?P<suffix>_bias|_blocks|_scales|\.\w+)?"
)
_WHOLE = [{"gate", "up", "down"}, {"up", "down"}]
"""Sets of parts that make a complete expert: gated, or without a gate."""

_Leaves = dict[str, dict[str, TensorEntry]]
"""Tensors by suffix, by leaf name."""


def find_experts(
    entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None = None
) -> dict[str, ExpertStack]:
    """Find the stacks of experts in a checkpoint, by prefix.

    Parameters
    ----------
    entries
        What the headers say, by full name.
    quantization
        ``quantization_config`` of config.json, if it has one.

    Raises
    ------
    DamagedError
        Expert numbers have gaps, or shapes within a layer differ.
    UnsupportedModelError
        Experts are stored in a way this version does not read.
    """
    numbered: dict[str, dict[int, _Leaves]] = {}
    stacked: dict[str, _Leaves] = {}
    for name, entry in entries.items():
        match = _NUMBERED.fullmatch(name)
        if match and match["leaf"] in NUMBERED:
            leaves = numbered.setdefault(match["prefix"], {}).setdefault(
                int(match["expert"]), {}
            )
            leaves.setdefault(match["leaf"], {})[match["suffix"]] = entry
            continue
        match = _STACKED.fullmatch(name)
        if match and (".experts." in name or len(entry.shape) > 2):
            leaves = stacked.setdefault(match["prefix"], {})
            leaves.setdefault(match["leaf"], {})[match["suffix"] or ""] = entry
        elif ".experts." in name and len(entry.shape) > 1:
            raise UnsupportedModelError(
                f"tensor {name!r} is of an expert, and not of a layout that is known: experts "
                "are read one by one, fused, stacked, or with biases as gpt-oss has them"
            )
    stacks = [_numbered(p, experts, entries, quantization) for p, experts in numbered.items()]
    stacks += [_stacked(p, leaves, entries, quantization) for p, leaves in stacked.items()]
    return {stack.prefix: stack for stack in sorted(stacks, key=lambda stack: stack.prefix)}


def _numbered(
    prefix: str,
    experts: dict[int, _Leaves],
    entries: Mapping[str, TensorEntry],
    quantization: Mapping[str, Any] | None,
) -> ExpertStack:
    if sorted(experts) != list(range(len(experts))):
        raise DamagedError(f"{prefix}: expert numbers have gaps: {_gaps(experts)} missing")
    for number in range(len(experts)):
        have = {part for leaf in experts[number] for part in NUMBERED[leaf]}
        if have not in _WHOLE or have != {
            part for leaf in experts[0] for part in NUMBERED[leaf]
        }:
            raise DamagedError(f"{prefix}.{number} lacks one of gate, up and down projection")
    matrices = []
    for leaf, tensors in experts[0].items():
        stored = detect(f"{prefix}.0.{leaf}", entries, quantization)
        matrices.append(
            ExpertMatrix(
                parts=NUMBERED[leaf],
                prefix=prefix,
                leaf=leaf,
                stored=stored,
                numbered=True,
                activation=_activation(stored, tensors),
            )
        )
    stack = _assemble(prefix, len(experts), matrices)
    _check_alike(stack, experts)
    return stack


def _check_alike(stack: ExpertStack, experts: dict[int, _Leaves]) -> None:
    """Refuse experts that are not all stored alike."""
    for matrix in stack.matrices:
        want = {part.suffix: (part.dtype, part.shape) for part in matrix.tensors}
        for number in range(stack.count):
            tensors = experts[number].get(matrix.leaf, {})
            for suffix in want.keys() | tensors.keys():
                entry = tensors.get(suffix)
                if entry is None or (entry.dtype, entry.shape) != want.get(suffix):
                    name = matrix.place(number) + suffix
                    found = "missing" if entry is None else f"{entry.dtype} {entry.shape}"
                    dtype, shape = want.get(suffix, ("no", "such tensor"))
                    raise DamagedError(
                        f"{name} is {found}, the other experts of the layer have "
                        f"{dtype} {shape}"
                    )


def _stacked(
    prefix: str,
    leaves: _Leaves,
    entries: Mapping[str, TensorEntry],
    quantization: Mapping[str, Any] | None,
) -> ExpertStack:
    stored = {leaf: detect(f"{prefix}.{leaf}", entries, quantization) for leaf in leaves}
    have = {part for leaf in leaves for part in STACKED[leaf]}
    if have not in _WHOLE:
        raise DamagedError(f"{prefix} lacks one of gate, up and down projection")
    counts = {leaf: found.count for leaf, found in stored.items()}
    count = next(iter(counts.values()))
    if count is None or set(counts.values()) != {count}:
        raise DamagedError(f"{prefix}: stacks of different numbers of experts: {counts}")
    biased = any(_BIAS in tensors for tensors in leaves.values())
    turned = _is_transposed(prefix, stored)
    matrices = []
    for leaf, tensors in leaves.items():
        matrix = ExpertMatrix(
            parts=STACKED[leaf],
            prefix=prefix,
            leaf=leaf,
            stored=stored[leaf],
            numbered=False,
            transposed=turned,
            # only gpt-oss has biases, and only its gate and up take turns
            interleaved=biased and len(STACKED[leaf]) == 2,
            activation=_activation(stored[leaf], tensors),
        )
        matrices.append(matrix)
        if biased:
            matrices.append(_bias(matrix, count, tensors.get(_BIAS)))
    return _assemble(prefix, count, matrices)


def _bias(matrix: ExpertMatrix, count: int, entry: TensorEntry | None) -> ExpertMatrix:
    place, outputs = matrix.place(0), matrix.shape[0]
    if entry is None or entry.shape != (count, outputs) or entry.dtype not in FLOATS:
        found = "missing" if entry is None else f"{entry.dtype} {entry.shape}"
        raise DamagedError(
            f"{place}{_BIAS} is {found}, floats of {(count, outputs)} were expected"
        )
    stored = Stored(
        prefix=place,
        codec=Plain(dtype=entry.dtype, suffix=_BIAS),
        rows=outputs,
        cols=1,
        count=count,
        activation=(),
    )
    return ExpertMatrix(
        parts=tuple(part + _BIAS for part in matrix.parts),
        prefix=matrix.prefix,
        leaf=matrix.leaf,
        stored=stored,
        numbered=False,
        interleaved=matrix.interleaved,
    )


def _is_transposed(prefix: str, stored: Mapping[str, Stored]) -> bool:
    """Tell from shapes whether inputs are rows; gate and up apart were never seen so."""
    down = next(found for leaf, found in stored.items() if STACKED[leaf] == ("down",))
    other = next((f for leaf, f in stored.items() if len(STACKED[leaf]) == 2), None)
    if other is None or (other.cols, other.rows) == (down.rows, 2 * down.cols):
        return False
    if (other.rows, other.cols) == (down.cols, 2 * down.rows):
        return True
    raise DamagedError(
        f"{prefix}: stacks of {(other.rows, other.cols)} and {(down.rows, down.cols)} are no "
        "gate, up and down projection of one width"
    )


def _assemble(prefix: str, count: int, matrices: list[ExpertMatrix]) -> ExpertStack:
    """Make a stack of matrices, whose shapes must belong together, in order of name.

    The order of tensors in a file, and of files, is any.
    """
    matrices = sorted(matrices, key=lambda matrix: (matrix.leaf, matrix.is_vector))
    (down,) = (matrix for matrix in matrices if matrix.parts == ("down",))
    hidden, inner = down.shape
    for matrix in matrices:
        if matrix.is_vector or matrix is down:
            continue
        want = (inner * len(matrix.parts), hidden)
        if matrix.shape != want:
            raise DamagedError(
                f"{matrix.place(0)} has shape {matrix.shape}, the other matrices of the "
                f"expert have {want}"
            )
    return ExpertStack(
        prefix=prefix, count=count, inner=inner, hidden=hidden, matrices=tuple(matrices)
    )


def _activation(stored: Stored, tensors: Mapping[str, TensorEntry]) -> tuple[Part, ...]:
    found = []
    for suffix in stored.activation:
        entry = tensors[suffix]
        shape = entry.shape if stored.count is None else entry.shape[1:]
        found.append(Part(suffix=suffix, dtype=entry.dtype, shape=shape))
    return tuple(found)


def _gaps(numbers: Iterable[int]) -> str:
    """Return the first few missing numbers, without counting up to the largest."""
    present = set(numbers)
    absent = (str(number) for number in range(max(present)) if number not in present)
    return ", ".join(itertools.islice(absent, 5))
