"""Families as parameters of a test: those that are not tried often are slow."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tiny_families import MTP, TINY

SELDOM = (
    "afmoe",
    "axk1",
    "axk2",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "granitemoe_swa",
    "granitemoeshared",
    "hy_v3",
    "jamba",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "solar_open",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "granitemoehybrid",
    "hunyuan_v1_moe",
    "kimi_linear",
    "minimax",
    "phimoe",
    "qwen3_5_moe_text",
)
"""Families that share router and layout with another: most is tried with the slow tests."""


def families(*often: str) -> list[Any]:
    """All families, as parameters of a test; those that are not tried often are slow."""
    slow, often = pytest.mark.slow, often or tuple(TINY.keys() - set(SELDOM))
    return [n if n in often else pytest.param(n, marks=slow) for n in sorted(TINY)]


def families_in(kinds: Mapping[str, Sequence[Any]], *, seldom: bool = True) -> list[Any]:
    """All families in all kinds, as parameters; those of `SELDOM` are slow but in the first."""
    first = next(iter(kinds)) if seldom else None
    return [
        pytest.param(
            name,
            *values,
            id=f"{name}-{kind}",
            marks=[pytest.mark.slow] if name in SELDOM and kind != first else [],
        )
        for name in sorted(TINY)
        for kind, values in kinds.items()
    ]


def mtp_families() -> list[Any]:
    """Families whose multi-token-prediction layer is known, as parameters of a test."""
    slow = pytest.mark.slow
    often = {"deepseek_v3", "qwen3_next"}  # one under either kind of names
    return [n if n in often else pytest.param(n, marks=slow) for n in sorted(MTP)]
