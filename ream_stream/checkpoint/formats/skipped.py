"""Lists of modules in a quantization_config that are not quantized.

They may name experts one by one; when experts are renumbered or dropped, these
names must follow, or an engine looks for scales that a plain weight has not.
"""

from collections.abc import Callable, Mapping
from typing import Any

SKIP_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
"""Where the lists are: FP8 and MXFP4, MiniMax, compressed-tensors, modelopt."""

_PATTERN = frozenset("*?[(|^$\\")


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
            names = (n if _is_pattern(n) else rename(n) for n in listed)
            renamed[key] = list(dict.fromkeys(name for name in names if name is not None))
    return renamed


def _is_pattern(name: str) -> bool:
    return name.startswith("re:") or not _PATTERN.isdisjoint(name)
