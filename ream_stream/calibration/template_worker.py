"""The process that renders chats; `chat_templates` starts it as a script, by its path.

It imports nothing of ours, reads one request a line and answers each with a line. The kernel
ends it when one request takes too long, whatever the template does at that moment: so also
where nobody is left to end it.
"""

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

LOADING = "loading"
"""Key of the worker's first line: an error, or None once the worker is ready."""

_DATE = (2024, 7, 26)
"""Fixed date for templates that write today's date: the default of Llama's templates."""


def main() -> None:
    """Answer requests until there are no more."""
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    limits = json.loads(source.readline())
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF, signal.SIGALRM})
    try:
        from transformers.utils import chat_template_utils
    except (ImportError, OSError, MemoryError) as error:
        _answer(answers, {LOADING: f"{type(error).__name__}: {error}"})
        return
    # the same text must be made on every day
    vars(chat_template_utils)["datetime"] = _FixedDate
    _bound_memory(limits["bytes"])
    _answer(answers, {LOADING: None})
    for line in source:
        signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
        signal.setitimer(signal.ITIMER_REAL, limits["wall_seconds"])
        try:
            answer = {"text": _rendered(json.loads(line), limits["characters"])}
            json.dumps(answer, ensure_ascii=False).encode()
        except Exception as error:  # noqa: BLE001 - a template can raise anything
            answer = {"error": _said(error, limits["bytes"])}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(answers, answer)


class _FixedDate:
    """Stands for `datetime.datetime`."""

    @staticmethod
    def now() -> Any:  # noqa: ANN401
        from datetime import datetime

        return datetime(*_DATE)


def _rendered(request: dict[str, Any], most: int) -> str:
    """Render one chat; parts of text are joined for a template that does not know them."""
    messages = request["messages"]
    parts = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    try:
        text = _render(request, messages)
        known = not any(_is_shown(part, text) for part in parts)
    except Exception:
        if not parts:
            raise
        known = False
    if not known:
        text = _render(request, [_joined(message) for message in messages])
    if len(text) > most:
        raise ValueError(f"it makes a text of more than {most} characters")
    return text


def _render(request: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    there = [{k: v for k, v in message.items() if v is not None} for message in messages]
    rendered: Any = render_jinja_template(
        conversations=[there],
        tools=request["tools"],
        chat_template=request["template"],
        **request["variables"],
    )
    return str(rendered[0][0])


def _is_shown(part: list[Any], text: str) -> bool:
    """Tell whether a list of parts was put into the text as such."""
    written = (str(part), json.dumps(part), json.dumps(part, ensure_ascii=False))
    return any(each in text for each in written)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _said(error: Exception, most_bytes: int) -> str:
    """Return what a template's error says, in one line."""
    if isinstance(error, MemoryError):
        return f"it takes more than {most_bytes >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if isinstance(error, UnicodeEncodeError):
        return "it makes half a surrogate pair"
    line = getattr(error, "lineno", None)
    where = "" if line is None else f"line {line} of the template: "
    # what the C library says is a number and its words
    said = getattr(error, "message", None) or (error.args[-1] if error.args[1:] else error)
    text = " ".join(str(said).split())
    return f"{where}{text[:300] or type(error).__name__}"


def _bound_memory(most_bytes: int) -> None:
    """Bound what is taken from now on, and keep it from writing files."""
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    statm = Path("/proc/self/statm")
    if not statm.exists():  # elsewhere than on Linux the kernel does not bound it anyway
        return
    taken = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = taken + most_bytes
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _answer(answers: BinaryIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
