"""Lists of modules in a quantization_config that are not quantized.

They may name experts one by one; when experts are renumbered or dropped, these
names must follow, or an engine looks for scales that a plain weight has not.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

SKIP_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
"""Where the lists are: FP8 and MXFP4, MiniMax, compressed-tensors, modelopt."""

_PATTERN = frozenset("*?[(|^$\\")
_EXPERT = re.compile(r"\.experts\.(\d+)(?:\.|$)")
_NUMBER = re.compile(r"(?:^|\.)\d+(?:\.|$)")


class Modules:
    """The modules that a list may name.

    Parameters
    ----------
    names
        Of tensors or modules.
    num_experts
        Experts of a layer.

    Notes
    -----
    A name may lack its beginning, as ``mlp.gate`` does. One without the number of a layer
    or expert is always taken to be there: ``lm_head`` may be tied, ``visual`` a part that
    this checkpoint does without.
    """

    def __init__(self, names: Iterable[str], num_experts: int) -> None:
        self._paths: set[str] = set()
        for path in names:
            while path and path not in self._paths:
                self._paths.add(path)
                path = path.rpartition(".")[0]
        self._num_experts = num_experts
        self._text = "\n".join(["", *(f".{path}" for path in self._paths), ""])

    def __contains__(self, name: str) -> bool:
        if match := _EXPERT.search(name):
            return int(match[1]) < self._num_experts
        if not _NUMBER.search(name) or name in self._paths:
            return True
        return f".{name}\n" in self._text


def rename_skipped(
    quantization: Mapping[str, Any], rename: Callable[[str], str | None]
) -> dict[str, Any]:
    """Return a quantization_config whose lists of skipped modules follow a renaming.

    Parameters
    ----------
    quantization
        As it stands in config.json; other keys are returned as they are.
    rename
        Gives a module's new name (the same, for most), or None if it is gone.

    Notes
    -----
    Patterns (``re:...``, ``*``) are kept: which modules they meant cannot be said
    in general. Order is kept, and names that become equal are listed once.
    """
    renamed = dict(quantization)
    for key in SKIP_KEYS:
        listed = quantization.get(key)
        if isinstance(listed, list):
            names = (n if is_pattern(n) else rename(n) for n in listed)
            renamed[key] = list(dict.fromkeys(name for name in names if name is not None))
    return renamed


def is_pattern(name: str) -> bool:
    """Tell whether a listed name stands for several modules."""
    return name.startswith("re:") or not _PATTERN.isdisjoint(name)
