"""Text in three domains for trying things out, none of it from the demo model's training.

general are the help topics of ``pydoc``, code is modules of the standard
library, math is generated. Nothing is downloaded, and equal Python versions
give equal text.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from pydoc_data import topics
from typing import Literal

from . import problems

Split = Literal["calibration", "test"]
"""Split of the documents; no document is in both."""

_PROBLEMS: Mapping[Split, tuple[int, int]] = {"calibration": (618, 512), "test": (314, 128)}
"""Seed and number of generated documents of each split."""


def documents(domain: str, split: Split) -> list[str]:
    """Return the documents of one key of `DOMAINS`, always in the same order."""
    return DOMAINS[domain](split)


def _general(split: Split) -> list[str]:
    named = topics.topics
    return [named[name] for name in sorted(named) if _split_of(name) == split]


def _code(split: Split) -> list[str]:
    """Return sources; modules that this Python does not have are left out."""
    library = Path(sysconfig.get_path("stdlib"))
    listed = resources.files(__package__).joinpath("code_modules.txt")
    names = listed.read_text(encoding="utf-8").split()
    paths = [library / name for name in names if _split_of(name) == split]
    # a module of another Python version may declare an encoding of its own
    return [
        path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()
    ]


def _math(split: Split) -> list[str]:
    seed, count = _PROBLEMS[split]
    return problems.documents(seed, count)


def _split_of(name: str) -> Split:
    """Return where a document belongs: one in four, by a hash of its name, is for tests."""
    return "test" if hashlib.sha256(name.encode()).digest()[0] % 4 == 0 else "calibration"


DOMAINS: Mapping[str, Callable[[Split], list[str]]] = {
    "general": _general,
    "code": _code,
    "math": _math,
}
