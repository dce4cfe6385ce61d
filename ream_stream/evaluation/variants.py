"""What `compare` compares: methods by name, and methods with one part changed."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from ream_stream.compression.config import PRESETS, RunOptions
from ream_stream.compression.method_settings import default_group_size, settings_for
from ream_stream.errors import UsageError
from ream_stream.planning.serving_rules import DIVISOR
from ream_stream.planning.slice_shape import ExpertLayer
from ream_stream.settings import Method, Settings

REAM, REAP = PRESETS["ream"], PRESETS["reap"]

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **PRESETS,
    "frequency": {**REAP, "saliency": "frequency"},
    "energy without refit": {**PRESETS["energy"], "refit": "none"},
    # the parts of REAM that its figure 4 leaves out one by one
    "ream by frequency": {**REAM, "saliency": "frequency"},
    "ream without gate term": {**REAM, "gate_term": False},
    "ream without pseudo-pruning": {**REAM, "grouping": "mc-smoe"},
    "ream aligned by activations": {**REAM, "alignment": "activations"},
    "ream without alignment": {**REAM, "alignment": "none"},
    "ream not sequential": {**REAM, "sequential": False},
    # controls
    "reap not sequential": {**REAP, "sequential": False},
    "ream in random groups": {**REAM, "similarity": "random"},
    "ream by reap-softmax": {**REAM, "saliency": "reap-softmax"},
    "ream by reap-squared": {**REAM, "saliency": "reap-squared"},
    "reap-softmax": {**REAP, "saliency": "reap-softmax"},
    "reap-squared": {**REAP, "saliency": "reap-squared"},
    "ream with 512 similarity tokens": {**REAM, "similarity_tokens": 512},
    "ream with all similarity tokens": {**REAM, "similarity_tokens": 0},
    # what stays is fitted to what the original layer says
    "refitted ream": {**REAM, "refit": "down"},
    "refitted reap": {**REAP, "refit": "down"},
}
"""Fields of `Method` and `Settings` that differ from their defaults, by variant name."""

SETS: Mapping[str, tuple[str, ...]] = {
    "methods": ("ream", "reap", "hc-smoe", "mc-smoe", "frequency"),
    "ablation": (
        "ream",
        "ream by frequency",
        "ream without gate term",
        "ream without pseudo-pruning",
        "ream aligned by activations",
        "ream without alignment",
        "ream not sequential",
    ),
    "controls": (
        "ream",
        "reap",
        "reap not sequential",
        "ream in random groups",
        "ream without alignment",
        "reap-softmax",
        "reap-squared",
    ),
    "best": ("reap", "energy", "slices"),
    "refit": (
        "ream",
        "refitted ream",
        "reap",
        "refitted reap",
        "energy without refit",
        "energy",
    ),
}
"""Groups of variants by name."""


def named(names: str) -> tuple[str, ...]:
    """Return the variants of a comma-separated list of their names and of `SETS`.

    Raises
    ------
    UsageError
        A name is unknown.
    """
    found: list[str] = []
    for name in (each.strip() for each in names.split(",")):
        if name not in SETS and name not in VARIANTS:
            known = ", ".join([*SETS, *VARIANTS])
            raise UsageError(f"--methods: {name!r} is not known; there are: {known}")
        found += [each for each in SETS.get(name, (name,)) if each not in found]
    return tuple(found)


def settings_of(
    name: str,
    *,
    experts: int,
    layer: ExpertLayer,
    seed: int,
    compute_dtype: str,
    device_kind: str,
    group_size: int | None = None,
) -> Settings:
    """Return the settings of a variant; of slices as many as `experts` experts have neurons."""
    fields = dict(VARIANTS[name])
    if fields.get("slices"):
        options = RunOptions(
            source=Path(),
            keep=Fraction(experts, layer.count),
            any_count=bool(experts % DIVISOR),
            method=name,
            seed=seed,
        )
        return settings_for(
            options, layer, compute_dtype=compute_dtype, device_kind=device_kind
        )
    sequential = fields.pop("sequential", True)
    size = default_group_size(experts, layer.count) if group_size is None else group_size
    return Settings(
        experts=experts,
        method=Method(group_size=size, **fields),
        sequential=sequential,
        compute_dtype=compute_dtype,
        seed=seed,
        device_kind=device_kind,
    )
