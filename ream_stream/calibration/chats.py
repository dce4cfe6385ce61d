"""What a chat in a record is: its messages and tools, checked before a template sees them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""Roles that a template may shorten or leave out on purpose, such as earlier reasoning."""

_SHAREGPT_ROLES: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}


class ChatError(Exception):
    """A chat, or the template that should render it, is invalid."""


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation; every message is a mapping with a ``role``."""

    messages: list[dict[str, Any]]
    """Messages of the chat in order; at least one."""

    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the assistant may call; None if the chat has no tools."""


def chat_of(messages: Sequence[Any], tools: object = None) -> Chat:
    """Check a list of messages and what stands in the column ``tools`` of its record.

    A message is ``{"role": ..., "content": ...}`` or, as ShareGPT writes it,
    ``{"from": ..., "value": ...}``. Content is text, a list of parts of text, or null if
    the message has something else, such as tool calls.

    Raises
    ------
    ChatError
        It is not one chat of text, with the reason.
    """
    if not messages:
        raise ChatError("it has no messages")
    if isinstance(messages[0], list):
        raise ChatError("it holds a list of chats; a record holds one")
    chat = Chat([_message(m, n) for n, m in enumerate(messages, start=1)], _tools(tools))
    try:
        json.dumps([chat.messages, chat.tools], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ChatError("it has half a surrogate pair") from error
    return chat


def _message(value: object, number: int) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(value, dict):
        raise ChatError(f"{where} is not an object with a role and content")
    if "role" not in value and "from" in value:
        value = _of_sharegpt(value, where)
    if not isinstance(value.get("role"), str) or not value["role"].strip():
        raise ChatError(f"{where} has no role")
    if all(value[key] is None for key in value if key != "role"):
        raise ChatError(f"{where} has no content")
    content = value.get("content")
    if isinstance(content, list):
        for part in content:
            _check_part(part, where)
    elif not isinstance(content, str | None):
        raise ChatError(f"{where}: its content is neither text nor a list of parts")
    return value


def _of_sharegpt(value: dict[str, Any], where: str) -> dict[str, Any]:
    speaker = value["from"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        known = ", ".join(sorted(_SHAREGPT_ROLES))
        raise ChatError(f"{where} is from {speaker!r}, which is none of {known}")
    if not isinstance(value.get("value"), str):
        raise ChatError(f"{where} has no text under value")
    return {"role": _SHAREGPT_ROLES[speaker], "content": value["value"]}


def _check_part(part: object, where: str) -> None:
    if not isinstance(part, dict):
        raise ChatError(f"{where}: a part of its content is not an object with type and text")
    if part.get("type") != "text":
        raise ChatError(f"{where} has a part of type {part.get('type')!r}; only text is used")
    if not isinstance(part.get("text"), str):
        raise ChatError(f"{where} has a part of type 'text' without text")


def _tools(value: object) -> list[dict[str, Any]] | None:
    """Return the tools of a record; data sets also keep them as JSON in a string."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ChatError("its field 'tools' is not JSON") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ChatError("its field 'tools' is not a list of objects")
    return value
