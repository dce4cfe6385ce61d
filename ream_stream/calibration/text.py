"""A text file of any size as numbered documents, read one at a time.

A first pass notes where each document starts and how long it is, 16 bytes a
document, and refuses a file that cannot be used; after it documents are read
in any order. Neither pass holds more than one document.

- records: one JSON object a line, one of its fields is the document, a string or a
  chat (a list of messages, `chats`) that is rendered to one.
- anything else: plain text; a document is a piece of it that ends at a newline.
"""

import codecs
import json
import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from ream_stream.errors import UsageError
from ream_stream.method.rng import generator

from .chats import Chat, ChatError, chat_of
from .readers import READ, RECORD_BYTES, listed

_PIECE_BYTES = 1 << 16


Render = Callable[[Chat], str]
"""Renders a chat as text; raises ChatError with the reason if it cannot."""


class Documents(Protocol):
    """Numbered documents: a `TextFile`, a list of strings."""

    def __len__(self) -> int:
        """Return the number of documents."""

    def __getitem__(self, index: int, /) -> str:
        """Return one of them."""


class TextFile:
    """The documents of one file; blank ones are left out.

    Parameters
    ----------
    path
        A file in UTF-8; messages begin with it.
    field
        Field of each record that holds the text; None for plain text.
    content
        What is in the file, if that had to be unpacked; otherwise `path` is read.
    unit
        What a line of the content is in the file, for messages.
    min_characters
        Shorter documents are left out.
    render
        Makes text of a field that holds a chat; None if chats cannot be read.

    Raises
    ------
    UsageError
        The file cannot be read or has no text, with the place of what is wrong.
    """

    def __init__(
        self,
        path: Path,
        *,
        field: str | None,
        content: BinaryIO | None = None,
        unit: str = "line",
        min_characters: int = 0,
        render: Render | None = None,
    ) -> None:
        self.path = path
        self._field, self._content, self._unit = field, content, unit
        if content is not None:
            weakref.finalize(self, content.close)
        self._min_characters, self._render = min_characters, render
        self._start, self._length = array("q"), array("q")
        try:
            self._index()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}") from error
        if not self._start:
            least = f" of {min_characters} characters or more" if min_characters else ""
            raise UsageError(f"{path}: there is no text{least} in it")

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._start)

    def __getitem__(self, index: int, /) -> str:
        """Read one document."""
        with self._opened() as file:
            file.seek(self._start[index])
            content = file.read(self._length[index])
        try:
            return self._parse(content, self._start[index], line=None)
        except UsageError as error:
            raise UsageError(f"{self.path}: it changed while it was being read") from error

    def _index(self) -> None:
        with self._opened() as file:
            file.seek(0)
            bom = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
            file.seek(start := len(codecs.BOM_UTF8) if bom else 0)
            for line, content in enumerate(self._contents(file), start=1):
                if content.strip() and check_length(
                    self._parse(content, start, line), self._min_characters
                ):
                    self._start.append(start)
                    self._length.append(len(content))
                start += len(content)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """Give the content for the length of the block; what was unpacked stays open."""
        if self._content is not None:
            yield self._content
            return
        with self.path.open("rb") as file:
            yield file

    def _contents(self, file: BinaryIO) -> Iterator[bytes]:
        return _pieces(file) if self._field is None else _lines(file, self.path)

    def _parse(self, content: bytes, start: int, line: int | None) -> str:
        """Return the document in `content`, the bytes from `start` on."""
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {start + error.start}"
            raise UsageError(
                f"{self.path}: not UTF-8 text at {where} ({error.reason}); {READ}"
            ) from error
        if self._field is not None:
            return self._of_record(text, f"{self.path}: {self._unit} {line}")
        if "\0" in text:
            raise UsageError(f"{self.path}: not text, it has NUL characters; {READ}")
        return text.replace("\r\n", "\n")

    def _of_record(self, text: str, where: str) -> str:
        """Return the document of a record; `where` begins messages."""
        record = _record(text, where)
        field = self._field
        if field not in record:
            raise UsageError(
                f"{where} has no field {field!r}; --text-field names it "
                f"(here: {listed(record)})"
            )
        value, where = record[field], f"{where}: its field {field!r}"
        if isinstance(value, str):
            if not _is_whole(value):
                raise UsageError(f"{where} has half a surrogate pair")
            return value
        if not isinstance(value, list) or self._render is None:
            raise UsageError(f"{where} is not a string")
        try:
            return self._render(chat_of(value, record.get("tools")))
        except ChatError as error:
            raise UsageError(f"{where} is not a chat that can be rendered: {error}") from error


def check_length(text: str, min_characters: int) -> bool:
    """Tell whether a document is long enough, blanks around it aside; a blank one is not."""
    return len(text.strip()) >= max(1, min_characters)


def in_seeded_order(documents: Documents, seed: int) -> Iterator[str]:
    """Yield every document once, in an order that only `seed` and their number decide."""
    order = torch.randperm(len(documents), generator=generator(seed, 0, "calibration"))
    for index in order.numpy():
        yield documents[int(index)]


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """Cut a file after the last newline of each 64 KiB, or else after a whole character."""
    block = b""
    while len(block := block + file.read(_PIECE_BYTES - len(block))) == _PIECE_BYTES:
        _, whole_characters = codecs.utf_8_decode(block, "replace", False)
        cut = block.rfind(b"\n") + 1 or whole_characters
        yield block[:cut]
        block = block[cut:]
    if block:
        yield block


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    for number, line in enumerate(iter(lambda: file.readline(RECORD_BYTES + 1), b""), start=1):
        if len(line) > RECORD_BYTES:
            raise UsageError(f"{path}: line {number} is longer than {RECORD_BYTES >> 20} MiB")
        yield line


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise UsageError(f"{where} is not JSON that can be read: {error}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{where} is not a JSON object, {{...}}")
    return record


def _is_whole(text: str) -> bool:
    """Tell whether a text can be written as UTF-8: JSON escapes may be half a pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
