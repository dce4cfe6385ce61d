"""The elements of a JSON list, one at a time: the list may be larger than memory."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ream_stream.errors import UsageError

_READ_CHARACTERS = 1 << 20
_BLANK = " \t\r\n"
_ONE_LINE = {ord("\r"): " ", ord("\n"): " "}


def elements(file: BinaryIO, path: Path, *, most: int) -> Iterator[bytes]:
    """Yield each object of a list as a line of JSON; messages begin with `path`.

    Raises
    ------
    UsageError
        It is not a list of objects of at most `most` characters, with the record.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        reader = _Reader(text, path, most)
        reader.take()
        ends = reader.peek() == "]"
        if ends:
            reader.take()
        while not ends:
            yield reader.element()
            found = reader.take()
            if found not in {",", "]"}:
                raise UsageError(f"{reader.where} is followed by no comma and no end")
            ends = found == "]"
        if reader.peek():
            raise UsageError(f"{path}: something follows the list of records")
    finally:
        text.detach()


class _Reader:
    """A piece of the text, and where in it the next character is."""

    def __init__(self, text: io.TextIOWrapper, path: Path, most: int) -> None:
        self._text, self._path, self._most = text, path, most
        self._decode = json.JSONDecoder().raw_decode
        self._piece, self._at, self._number = "", 0, 0

    @property
    def where(self) -> str:
        """Prefix of error messages."""
        return f"{self._path}: record {self._number}"

    def peek(self) -> str:
        """Return the next character that is not blank; empty at the end."""
        while True:
            while self._at < len(self._piece) and self._piece[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._piece) or not self._more():
                return self._piece[self._at : self._at + 1]

    def take(self) -> str:
        """Return the same, and go on behind it."""
        found = self.peek()
        self._at += 1
        return found

    def element(self) -> bytes:
        """Return the next object."""
        self._number += 1
        if self.peek() != "{":
            raise UsageError(f"{self.where} is not a JSON object, {{...}}")
        while True:
            try:
                _, end = self._decode(self._piece, self._at)
            except json.JSONDecodeError as error:
                length = len(self._piece) - self._at
                if length > self._most or not self._more():
                    raise UsageError(f"{self.where} {self._reason(error, length)}") from error
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{self.where} is not JSON to be read: {error}") from error
            else:
                # line breaks in JSON are blanks between its tokens
                line = self._piece[self._at : end].translate(_ONE_LINE)
                self._at = end
                return line.encode() + b"\n"

    def _reason(self, error: json.JSONDecodeError, length: int) -> str:
        size = f", or longer than {self._most >> 20} MiB" if length > self._most else ""
        return f"is not JSON{size}: {error.msg}"

    def _more(self) -> bool:
        """Read as much again as is held, and drop what was used; tell whether there was any."""
        held = self._piece[self._at :]
        try:
            read = self._text.read(max(len(held), _READ_CHARACTERS))
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.where} is not UTF-8 text ({error.reason})") from error
        self._piece, self._at = held + read, 0
        return bool(read)
