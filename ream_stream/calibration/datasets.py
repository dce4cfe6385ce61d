"""Documents of a part, whatever it is stored as.

What cannot be read at any place is unpacked once, into a file without a name: a
compressed file to what is in it, a table to JSON lines. The rest is `TextFile`'s.

- ``.jsonl`` and text, also as ``.gz`` and ``.zst``
- ``.parquet``, if pyarrow is installed
- a folder with such records: all of them; another folder: each text file is a document
- ``hf:OWNER/NAME/PATTERN``: files of a data set on the hub, as a folder of them
"""

import gzip
import hashlib
import importlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import gettempdir
from typing import Any, BinaryIO

from ream_stream import files as durable
from ream_stream.errors import UsageError

from .mix import HUB, Part
from .text import Documents, Render, TextFile, check_length

_COPY_BYTES = 1 << 20
_FILE_BYTES = 1 << 24
"""Larger files of a folder are data, not text that somebody wrote."""
_UNPACKED_BYTES, _UNPACKED_RATIO = 1 << 24, 100
"""What a text unpacks to at most; what is made to fill a disk unpacks to a thousand times."""


def open_documents(
    part: Part, *, field: str, min_characters: int = 0, render: Render | None = None
) -> Documents:
    """Open the documents of a part.

    Parameters
    ----------
    part
        Not a token file.
    field
        Field of a record that holds its text, unless the part names one.
    min_characters
        Shorter documents are left out.
    render
        Makes text of a field that holds a chat, a list of messages.

    Raises
    ------
    UsageError
        It cannot be read, or there is no text in it.
    """

    def opened(path: Path) -> Documents:
        return _file(path, part.field or field, min_characters, render)

    path = locate(part)
    if not path.is_dir():
        return opened(path)
    files = _files(path)
    records = [each for each in files if kind_of(each) == ".jsonl"]
    if records:
        return Chained([opened(each) for each in records])
    return TextFolder(path, files, min_characters=min_characters)


def locate(part: Part) -> Path:
    """Return the file or folder of a part; what is on the hub is fetched, once.

    Raises
    ------
    UsageError
        There is no such thing.
    """
    if part.source.startswith(HUB):
        return _fetch(part.source.removeprefix(HUB))
    path = Path(part.source)
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder")
    if not (path.is_file() or path.is_dir()):
        raise UsageError(f"{path}: not a file, and text is read more than once")
    return path


def digest_of(part: Part) -> str:
    """Return a SHA-256, hex, of a part's content: names in a folder count, dates do not."""
    path = locate(part)
    if not path.is_dir():
        return _file_digest(path)
    digest = hashlib.sha256()
    for each in _files(path):
        digest.update(f"{each.relative_to(path).as_posix()}\n{_file_digest(each)}\n".encode())
    return digest.hexdigest()


def kind_of(path: Path) -> str:
    """Return the suffix that decides how a file's content is read: ``.jsonl`` or its own."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ".jsonl"
    return Path(path.stem).suffix.lower() if suffix in UNPACKERS else suffix


class Chained:
    """The documents of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Documents]) -> None:
        self._sources = sources
        self._start = [0, *accumulate(len(each) for each in sources)]

    def __len__(self) -> int:
        """Return the number of documents of all sources."""
        return self._start[-1]

    def __getitem__(self, index: int, /) -> str:
        """Read one document."""
        source = bisect_right(self._start, index) - 1
        return self._sources[source][index - self._start[source]]


class TextFolder:
    """The text files of a folder, each a document; hidden and binary ones are left out.

    Raises
    ------
    UsageError
        There is no text in it.
    """

    def __init__(self, path: Path, files: Sequence[Path], *, min_characters: int) -> None:
        self._paths = []
        for file in files:
            if file.stat().st_size > _FILE_BYTES:
                continue
            text = self._text(file)
            if text is not None and check_length(text, min_characters):
                self._paths.append(file)
        if not self._paths:
            raise UsageError(f"{path}: there is no text in it")

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._paths)

    def __getitem__(self, index: int, /) -> str:
        """Read one file."""
        text = self._text(self._paths[index])
        if text is None:
            raise UsageError(f"{self._paths[index]}: it changed while it was being read")
        return text

    @staticmethod
    def _text(path: Path) -> str | None:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            return None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}") from error
        return None if "\0" in text else text.replace("\r\n", "\n")


def _file(path: Path, field: str, min_characters: int, render: Render | None) -> TextFile:
    unpack = UNPACKERS.get(path.suffix.lower())
    return TextFile(
        path,
        field=field if kind_of(path) == ".jsonl" else None,
        content=None if unpack is None else _unpacked(unpack(path, field)),
        min_characters=min_characters,
        render=render,
    )


def _unpacked(pieces: Iterable[bytes]) -> BinaryIO:
    with ExitStack() as stack:
        content = stack.enter_context(durable.scratch_file())
        for piece in pieces:
            with durable.space_for(Path(gettempdir())):
                content.write(piece)
        stack.pop_all()
        return content


def _files(folder: Path) -> list[Path]:
    """Return the files below a folder, hidden ones left out, in an order of their names."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    names = {path: path.relative_to(folder).parts for path in found}
    shown = [p for p in found if not any(name.startswith(".") for name in names[p])]
    return sorted(shown, key=lambda path: names[path])


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def _fetch(wanted: str) -> Path:
    """Fetch ``OWNER/NAME/PATTERN`` and return the folder it is in."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, _, rest = wanted.partition("/")
    name, _, pattern = rest.partition("/")
    if not owner or not name:
        raise UsageError(f"{HUB}{wanted}: write {HUB}OWNER/NAME or {HUB}OWNER/NAME/PATTERN")
    try:
        folder = snapshot_download(
            f"{owner}/{name}",
            repo_type="dataset",
            allow_patterns=[pattern or "*", f"{pattern}/*"] if pattern else None,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{HUB}{wanted}: it cannot be fetched ({reason})") from error
    return Path(folder)


def _gunzip(path: Path, field: str) -> Iterator[bytes]:
    del field
    return _copied(path, partial(gzip.open, path, "rb"))


def _unzstd(path: Path, field: str) -> Iterator[bytes]:
    """Decompress with Python 3.14's own module, or with zstandard if it is installed."""
    del field
    for module in ("compression.zstd", "zstandard"):
        try:
            library: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        return _copied(path, partial(library.open, path, "rb"))
    raise UsageError(
        f"{path}: this Python cannot read zstd; install zstandard, or unpack the file"
    )


def _copied(path: Path, opened: Callable[[], Any]) -> Iterator[bytes]:
    """Yield what a compressed file holds, piece by piece."""
    try:
        most, total = _UNPACKED_BYTES + _UNPACKED_RATIO * path.stat().st_size, 0
        with closing(opened()) as file:
            for piece in iter(lambda: file.read(_COPY_BYTES), b""):
                if (total := total + len(piece)) > most:
                    raise UsageError(f"{path}: it unpacks to more than {most} bytes")
                yield piece
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path}: it cannot be unpacked ({error})") from error


def _rows(path: Path, field: str) -> Iterator[bytes]:
    """Yield the rows of a parquet file as JSON lines of one column."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        broken: Any = importlib.import_module("pyarrow").ArrowException
    except ModuleNotFoundError:
        raise UsageError(
            f"{path}: reading parquet takes pyarrow: pip install ream-stream[parquet]"
        ) from None
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise UsageError(
                    f"{path}: it has no column {field!r}; --text-field names it "
                    f"(here: {', '.join(names)})"
                )
            for batch in table.iter_batches(columns=[field]):
                yield from _json_lines(field, batch.column(0).to_pylist())
    except (broken, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: not a parquet file that can be read ({reason})") from error


def _json_lines(field: str, values: Iterable[object]) -> Iterator[bytes]:
    for value in values:
        yield json.dumps({field: value if value is not None else ""}).encode() + b"\n"


UNPACKERS: Mapping[str, Callable[[Path, str], Iterator[bytes]]] = {
    ".gz": _gunzip,
    ".zst": _unzstd,
    ".parquet": _rows,
}
"""Pieces of what is in a file that cannot be read at any place, by its suffix."""
