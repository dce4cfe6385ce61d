"""JSON and YAML of strangers, bounded: what they raise is of one kind, and in bounded time.

A file of ours may be damaged and a stranger's made to harm: deep nesting, names that occur
twice, numbers that are none, text that is none.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from .errors import DamagedError
from .source_access import open_source

MAX_JSON_BYTES = 200_000_000
"""Largest JSON file: the size of an index of a million tensors."""

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


def read_json(
    path: Path, most: int = MAX_JSON_BYTES, *, finite: bool = True, text: bool = True
) -> Any:  # noqa: ANN401
    """Read a JSON file; see `parse_json`.

    Raises
    ------
    DamagedError
        It is not JSON, or no regular file of at most `most` bytes.
    """
    try:
        with open_source(path) as file:
            if os.fstat(file.fileno()).st_size > most:
                raise DamagedError(f"{path} is not a file of at most {most} bytes")
            return parse_json(file.read(), finite=finite, text=text)
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing") from error
    except ValueError as error:
        raise DamagedError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_object(
    path: Path, most: int = MAX_JSON_BYTES, *, finite: bool = True
) -> dict[str, Any]:
    """Read a JSON object; see `read_json`."""
    value = read_json(path, most, finite=finite)
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is not a JSON object")
    return value


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
