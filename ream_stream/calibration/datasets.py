"""Documents of a part, whatever it is stored as.

- a file of text or of records, by its suffix (`readers`)
- a folder with records: all of them; another folder: each text file is a document
- ``hf:OWNER/NAME/PATTERN``: files of a data set on the hub, as a folder of them
- ``builtin:NAME``: texts that come with the package
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from ream_stream.errors import UsageError

from .builtin import Split, documents
from .mix import BUILTIN, HUB, Part
from .readers import READ, RECORDS, UNPACKERS, kind_of, open_content
from .text import Documents, Render, TextFile, check_length

_FILE_BYTES = 1 << 24
"""Largest text file that is read in a folder; larger files count as data and are skipped."""
_RECORDS_ONLY = frozenset({".jsonl", ".ndjson", ".parquet"})
_ABOUT = frozenset({"readme", "license", "licence"})


def open_documents(
    part: Part,
    *,
    field: str,
    min_characters: int = 0,
    render: Render | None = None,
    split: Split = "calibration",
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
    split
        Split that is taken of a built-in text.

    Raises
    ------
    UsageError
        It cannot be read, or there is no text in it.
    """
    if part.source.startswith(BUILTIN):
        found = documents(part.source.removeprefix(BUILTIN), split)
        return [text for text in found if check_length(text, min_characters)]

    def opened(path: Path) -> Documents:
        return _file(path, part.field or field, min_characters, render)

    path = locate(part)
    if not path.is_dir():
        return opened(path)
    files = _files(path)
    if records := _records(files):
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
    digest = hashlib.sha256()
    if part.source.startswith(BUILTIN):
        for text in documents(part.source.removeprefix(BUILTIN), "calibration"):
            digest.update(f"{len(text)}\n{text}".encode())
        return digest.hexdigest()
    path = locate(part)
    if not path.is_dir():
        return _file_digest(path)
    for each in _files(path):
        digest.update(f"{each.relative_to(path).as_posix()}\n{_file_digest(each)}\n".encode())
    return digest.hexdigest()


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
            raise UsageError(f"{path}: there is no text in it; {READ}")

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
    content, unit = open_content(path, field)
    return TextFile(
        path,
        field=field if kind_of(path) in RECORDS else None,
        content=content,
        unit=unit,
        min_characters=min_characters,
        render=render,
    )


def _records(files: Sequence[Path]) -> list[Path]:
    """Return the files that make a folder a data set; none if it is one of text files.

    JSON and tables also lie beside code: uncompressed ones count only if there is nothing
    else but files about them.
    """
    kinds = [(path, kind_of(path)) for path in files]
    sure = [
        path
        for path, kind in kinds
        if kind in _RECORDS_ONLY or (kind in RECORDS and path.suffix.lower() in UNPACKERS)
    ]
    others = [p for p, kind in kinds if kind not in RECORDS and p.stem.lower() not in _ABOUT]
    return sure or ([] if others else [path for path, kind in kinds if kind in RECORDS])


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
