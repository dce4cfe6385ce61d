"""Names of modules in a description of formats, such as a quantization_config.

They may name experts one by one: in lists of what is not quantized, in targets of a
group, as keys of settings layer by layer. When experts are dropped these names must
follow, or an engine looks for scales that a plain weight has not, or for an expert.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

_PATTERN = frozenset("*?[(|^$\\")
_EXPERT = re.compile(r"\.experts\.([0-9]{1,9})(?:\.|$)")
_EXPERT_OF_PATTERN = re.compile(r"\bexperts\\?\.([0-9]{1,9})(?:\\?\.|\*|\$|$)")
_NUMBER = re.compile(r"(?:^|\.)\d+(?:\.|$)")
_MODULE = re.compile(r"(?:^|\.)[A-Za-z_]\w*\.\d+(?:\.|$)")
"""Pattern of a numbered module in a name, such as ``layers.3``; no version, no size."""


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
    A name may lack its beginning, as ``mlp.gate`` does, or have another. One without the
    number of a layer or expert is always taken to be there: ``lm_head`` may be tied,
    ``visual`` a part that this checkpoint does without.
    """

    def __init__(self, names: Iterable[str], num_experts: int) -> None:
        self._paths: set[str] = set()
        for path in names:
            while path and path not in self._paths:
                self._paths.add(path)
                path = path.rpartition(".")[0]
        self._num_experts = num_experts
        self._text = "\n".join(["", *(f".{path}" for path in self._paths), ""])

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if _is_pattern(name):  # which modules it means cannot be said, but for one expert's
            match = _EXPERT_OF_PATTERN.search(name)
            return match is None or int(match[1]) < self._num_experts
        if match := _EXPERT.search(name):
            return int(match[1]) < self._num_experts
        number = _NUMBER.search(name)
        if number is None or name in self._paths:
            return True
        # servers name the parts around the decoder otherwise: what is before the first
        # numbered part does not count
        start = name.rfind(".", 0, number.start()) + 1
        return f".{name[start:]}\n" in self._text


def without_gone(described: Any, known: Container[str]) -> Any:  # noqa: ANN401 - JSON
    """Return a description of formats without the names of modules that are not known.

    Names are the keys of mappings and the strings in lists, at any depth. A group whose
    targets are all gone is left out. Everything else is returned as it is.
    """
    if isinstance(described, Mapping):
        followed = {
            key: without_gone(value, known)
            for key, value in described.items()
            if not _is_module(key) or key in known
        }
        return {k: v for k, v in followed.items() if not _lost_targets(described[k], v)}
    if isinstance(described, list):
        return [
            without_gone(value, known)
            for value in described
            if not _is_module(value) or value in known
        ]
    return described


def named_modules(described: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names of modules in a description, each with the key that it is under."""
    if isinstance(described, Mapping):
        yield from ((key, name) for name in described if _is_module(name))
        for inner, value in described.items():
            yield from named_modules(value, key if _is_module(inner) else inner)
    elif isinstance(described, list):
        for value in described:
            if _is_module(value):
                yield key, value
            else:
                yield from named_modules(value, key)


def _lost_targets(before: object, after: object) -> bool:
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return False
    return bool(before.get("targets")) and after.get("targets") == []


def _is_module(name: object) -> bool:
    """Tell whether a string names modules of one layer or expert, a pattern among them."""
    if not isinstance(name, str):
        return False
    return bool(_MODULE.search(name) or _EXPERT_OF_PATTERN.search(name))


def _is_pattern(name: str) -> bool:
    return name.startswith("re:") or not _PATTERN.isdisjoint(name)
