"""Renders chats with a checkpoint's template, which is a program of strangers.

It runs in a process of its own (`template_worker`), bounded in time and memory: a template
can loop for ever, or hold the interpreter in one arithmetic operation that no signal
handler interrupts.
"""

import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import template_worker
from .chats import KNOWN_ROLES, Chat, ChatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIMITS: Mapping[str, int] = {
    "seconds": 2,
    "wall_seconds": 40,
    "bytes": 1 << 30,
    "characters": 1 << 24,
}
"""Limits for one chat: processor seconds, wall seconds, memory and rendered characters."""


class ChatRenderer:
    """Makes text of chats, as the checkpoint was trained to see it.

    The process is started by the first chat and stays for the others; it ends with this
    object, and with its own requests if this process is killed.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._worker: subprocess.Popen[bytes] | None = None

    def __call__(self, chat: Chat) -> str:
        """Render a chat.

        Raises
        ------
        ChatError
            It cannot be rendered, with the reason and what the template is of.
        """
        owner = f"the chat template of {self._tokenizer.name_or_path}"
        request = {
            "template": self._template(chat),
            "variables": self._tokenizer.special_tokens_map,
            "messages": chat.messages,
            "tools": chat.tools,
        }
        answer = self._ask(request)
        if "error" in answer:
            raise ChatError(f"{owner} says: {answer['error']}")
        text: str = answer["text"]
        for message in chat.messages:
            content = message.get("content")
            lost = isinstance(content, str) and content.strip() not in text
            if lost and message["role"] not in KNOWN_ROLES:
                raise ChatError(f"{owner} leaves out messages of role {message['role']!r}")
        return text

    def _template(self, chat: Chat) -> str:
        if not self._tokenizer.chat_template:
            raise ChatError("the checkpoint's tokenizer has no chat template")
        try:
            template: object = self._tokenizer.get_chat_template(tools=chat.tools)
        except ValueError as error:
            raise ChatError(str(error)) from error
        if not isinstance(template, str):
            raise ChatError("the checkpoint's chat template is not text")
        return template

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        content = json.dumps(request, ensure_ascii=False).encode() + b"\n"
        if self._worker is None:
            self._worker = _start()
            weakref.finalize(self, _end, self._worker)
            loading = self._exchange(self._worker, json.dumps(dict(_LIMITS)).encode() + b"\n")
            if loading[template_worker.LOADING] is not None:
                raise ChatError(f"no process for it: {loading[template_worker.LOADING]}")
        return self._exchange(self._worker, content)

    def _exchange(self, worker: "subprocess.Popen[bytes]", content: bytes) -> dict[str, Any]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        line = b""
        try:
            with suppress(BrokenPipeError):
                worker.stdin.write(content)
                worker.stdin.flush()
                line = worker.stdout.readline()
        finally:
            if not line:  # it has ended, or whoever asked was interrupted
                self._worker = None
                status = _end(worker)
        if not line:
            return {"error": _ended(status)}
        answer: dict[str, Any] = json.loads(line)
        return answer


def _start() -> "subprocess.Popen[bytes]":
    path = Path(template_worker.__file__)
    try:
        return subprocess.Popen(
            # -P: a folder that the command is run in holds no modules
            [sys.executable, "-P", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # signals from a terminal are for this process, which ends the other
            start_new_session=True,
        )
    except OSError as error:
        raise ChatError(f"no process for it: {error.strerror or error}") from error


def _end(worker: "subprocess.Popen[bytes]") -> int:
    """End a worker and return what it ended with."""
    for stream in (worker.stdin, worker.stdout):
        with suppress(BrokenPipeError):
            if stream is not None:
                stream.close()
    worker.kill()
    return worker.wait()


def _ended(status: int) -> str:
    if -status in {signal.SIGPROF, signal.SIGALRM}:
        return f"it is not done in {_LIMITS['seconds']} seconds of processor time"
    return f"its process ended with status {status}"
