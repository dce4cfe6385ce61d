"""What is in a file, as text or as one JSON record a line, whatever it is stored as.

What cannot be read at any place is unpacked once, into a file without a name: a
compressed file to what is in it, a list or table of records to JSON lines. Nothing here
holds more than one record, or a few rows of a table.
"""

import bz2
import codecs
import csv
import gzip
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, BinaryIO

from ream_stream import files
from ream_stream.errors import UsageError, space_for

from .json_list import elements

RECORD_BYTES = 1 << 24
"""Largest record, line or cell that is read; a longer one is refused."""

_COPY_BYTES = 1 << 20
_UNPACKED_BYTES, _UNPACKED_RATIO = 1 << 24, 100
"""Bytes and ratio that a compressed text may unpack to; a zip bomb has a ratio of 1000."""
_ROWS = 256
_SHOWN_FIELDS, _SHOWN_CHARACTERS = 10, 40


def kind_of(path: Path) -> str:
    """Return the suffix that tells how to read a file; that of compression does not."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in UNPACKERS else suffix


def open_content(path: Path, field: str) -> tuple[BinaryIO | None, str]:
    """Return what is in a file and what a line of it is there; None if it is the file itself.

    Raises
    ------
    UsageError
        It cannot be unpacked, with the reason.
    """
    with ExitStack() as stack:
        suffix, kind = path.suffix.lower(), kind_of(path)
        content: BinaryIO | None = None
        if suffix in UNPACKERS:
            content = stack.enter_context(_unpacked(_copied(path, UNPACKERS[suffix](path))))
        if (record := RECORDS.get(kind)) is not None:
            convert, unit = record
            source = content or stack.enter_context(_opened(path))
            lines = convert(source, path, field)
            if lines is not None:
                return _unpacked(lines), unit
            source.seek(0)
        if content is not None:
            stack.pop_all()
        return content, "line"


def listed(names: Iterable[str]) -> str:
    """Return names of fields for a message: the first of many, the start of long ones."""
    shown = (name[:_SHOWN_CHARACTERS] for name in list(names)[:_SHOWN_FIELDS])
    return ", ".join(shown) or "none"


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def _unpacked(pieces: Iterable[bytes]) -> BinaryIO:
    with ExitStack() as stack:
        content = stack.enter_context(files.scratch_file())
        for piece in pieces:
            with space_for(Path(gettempdir())):
                content.write(piece)
        content.seek(0)
        stack.pop_all()
        return content


# Compression


def _zstd(path: Path) -> Callable[[], Any]:
    """Decompress with Python 3.14's own module, or with zstandard if it is installed."""
    for module in ("compression.zstd", "zstandard"):
        try:
            library: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        return partial(library.open, path, "rb")
    raise UsageError(
        f"{path}: this Python cannot read zstd; install zstandard, or unpack the file"
    )


def _copied(path: Path, opened: Callable[[], Any]) -> Iterator[bytes]:
    """Yield what a compressed file holds, piece by piece."""
    try:
        with closing(opened()) as file:
            yield from _bounded(path, iter(lambda: file.read(_COPY_BYTES), b""))
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path}: it cannot be unpacked ({error})") from error


def _bounded(path: Path, pieces: Iterable[bytes]) -> Iterator[bytes]:
    most, total = _UNPACKED_BYTES + _UNPACKED_RATIO * path.stat().st_size, 0
    for piece in pieces:
        if (total := total + len(piece)) > most:
            raise UsageError(f"{path}: it unpacks to more than {most} bytes")
        yield piece


# Lists of records


def _json_records(file: BinaryIO, path: Path, field: str) -> Iterator[bytes] | None:
    """Return the records of a JSON list as lines; None if each line already is a record."""
    del field
    start = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
    while not start.strip() and (more := file.read(_COPY_BYTES)):
        start = start.strip() + more
    if start.lstrip().startswith(b"["):
        file.seek(0)
        return elements(file, path, most=RECORD_BYTES)
    line = start + file.readline(RECORD_BYTES)
    line = line.lstrip().partition(b"\n")[0]
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: neither a list of records, [{{...}}, ...], nor a record on each line"
        ) from error
    return None


# Tables


def _cells(file: BinaryIO, path: Path, field: str, *, delimiter: str) -> Iterator[bytes]:
    """Yield the rows of a table of text as JSON lines of one column."""
    # of the process, and only ever this; the module's own limit is less than a document
    csv.field_size_limit(RECORD_BYTES)
    rows = csv.reader(_text_lines(file, path), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if header.count(field) != 1:
            how = "no column" if field not in header else "several columns"
            raise UsageError(
                f"{path}: it has {how} {field!r}; --text-field names one "
                f"(here: {listed(header)})"
            )
        column = header.index(field)
        for row in rows:
            if row and len(row) != len(header):
                raise UsageError(
                    f"{path}: line {rows.line_num} has {len(row)} cells, "
                    f"the header {len(header)}"
                )
            yield _line({field: _cell(row[column])}) if row else b"\n"
    except csv.Error as error:
        raise UsageError(
            f"{path}: line {rows.line_num} ends in no row ({error}); a quote may be left open"
        ) from error


def _text_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(RECORD_BYTES + 1), b""), start=1):
        if len(line) > RECORD_BYTES:
            raise UsageError(f"{path}: line {number} is longer than {RECORD_BYTES >> 20} MiB")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}: line {number} is not UTF-8 text ({error.reason}); {READ}"
            ) from error
        if "\0" in text:
            raise UsageError(f"{path}: line {number} has a NUL character; {READ}")
        yield text


def _cell(text: str) -> object:
    """Return what a cell holds: its text, or the chat that is written in it as JSON."""
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    is_chat = bool(value) and all(
        isinstance(m, dict) and ("role" in m or "from" in m) for m in value
    )
    return value if is_chat else text


def _rows(file: BinaryIO, path: Path, field: str) -> Iterator[bytes]:
    """Yield the rows of a parquet file as JSON lines of one column, and of `tools`."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        broken: Any = importlib.import_module("pyarrow").ArrowException
    except ModuleNotFoundError:
        raise UsageError(
            f"{path}: reading parquet takes pyarrow: pip install ream-stream[parquet]"
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise UsageError(
                    f"{path}: it has no column {field!r}; --text-field names it "
                    f"(here: {listed(names)})"
                )
            columns = [name for name in (field, "tools") if name in names]
            batches = table.iter_batches(batch_size=_ROWS, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            lines = (_line(_without_nulls(r)) if r[field] is not None else b"\n" for r in rows)
            yield from _bounded(path, lines)
    except (broken, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: not a parquet file that can be read ({reason})") from error
    except TypeError as error:
        raise UsageError(f"{path}: its column {field!r} is neither text nor chats") from error


def _without_nulls(value: Any) -> Any:  # noqa: ANN401
    """Leave out null fields: a table has no other way to say that a row lacks one."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


_Convert = Callable[[BinaryIO, Path, str], Iterator[bytes] | None]

UNPACKERS: Mapping[str, Callable[[Path], Callable[[], Any]]] = {
    ".gz": lambda path: partial(gzip.open, path, "rb"),
    ".bz2": lambda path: partial(bz2.open, path, "rb"),
    ".zst": _zstd,
}
"""Functions that open a compressed file, by file suffix."""

RECORDS: Mapping[str, tuple[_Convert, str] | None] = {
    ".jsonl": None,
    ".ndjson": None,
    ".json": (_json_records, "record"),
    ".csv": (partial(_cells, delimiter=","), "row"),
    ".tsv": (partial(_cells, delimiter="\t"), "row"),
    ".parquet": (_rows, "row"),
}
"""Converters of record files to JSON lines, with the name of one record, by file suffix."""

READ = (
    f"read are text in UTF-8, records ({', '.join(RECORDS)}), both also compressed "
    f"({', '.join(UNPACKERS)}), and tokens (.safetensors)"
)
"""List of supported file types, for error messages about other files."""
