"""Text of strangers: JSON and YAML read within bounds, and text shown without control codes.

A file of ours may be damaged and a stranger's made to harm: deep nesting, names that occur
twice, numbers that are none. Text may hold codes that a terminal obeys, or characters that
change what a line seems to say: they are shown as the escapes that Python, JSON and bash know.
"""

import json
import math
import re
import shlex
from typing import Any

MOST_CHARACTERS = 10_000
"""Most characters that are shown as one piece."""

MAX_DEPTH = 64

MAX_YAML_CHARACTERS = 100_000
"""Longest YAML text; it takes a second to parse."""

_HALF_OF_A_PAIR = re.compile("\\\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def parse_json(data: bytes | str, *, finite: bool = True, text: bool = True) -> Any:  # noqa: ANN401
    """Parse a JSON document.

    Parameters
    ----------
    data
        The document.
    finite
        Whether NaN and infinite numbers are refused.
    text
        Whether strings that are no text are refused; else file names that are not UTF-8 are
        what Python makes of them.

    Raises
    ------
    ValueError
        In one line, why it is refused.
    """
    if isinstance(data, bytes):
        data = data.decode("utf-8-sig")
    hooks: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite}
    try:
        value = json.loads(data, object_pairs_hook=_unique, **(hooks if finite else {}))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_depth(value)
    if text and _HALF_OF_A_PAIR.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                "it holds half of a pair of code units, which is no text"
            ) from error
    return value


def parse_yaml(text: str) -> Any:  # noqa: ANN401 - YAML is of any type
    """Parse a YAML document: mappings, lists and text; what looks like a number is text too.

    Raises
    ------
    ValueError
        In one line, why it is refused.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.BaseLoader):  # type: ignore[misc] # makes no dates, numbers or merges
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ANN401
            value: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            if len(value) != len(node.value):
                raise ValueError("a name occurs twice")
            return value

    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"it has more than {MAX_YAML_CHARACTERS} characters")
    try:
        return yaml.load(text, Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def printable(text: str, *, keep: str = "", most: int | None = None) -> str:
    r"""Return text without control, format, bidirectional or lone surrogate characters.

    Parameters
    ----------
    text
        Anything; bytes of a file name that are not UTF-8 are shown as ``\xNN``.
    keep
        Characters that are left as they are.
    most
        Characters of a piece at most; what is longer is cut in its middle.
    """
    if most is not None and len(text) > most:
        half, cut = most // 2, len(text) - most
        text = f"{text[:half]}[... {cut} characters ...]{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else _escaped(c) for c in text)


def shell_words(words: list[str]) -> str:
    """Return words as one types them in bash; those that cannot be shown as ``$'...'``."""
    return " ".join(map(_quoted, words))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        )
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python tells a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if 0x7F < code <= 0xFF:  # \xNN would be a byte, to bash too
        return f"\\u{code:04x}"
    return character.encode("unicode_escape").decode()
