"""What a hub answers, checked before it becomes a path, a size or memory: it may be anyone's.

Every answer that huggingface_hub gets in this process passes `_check`: its headers become
names in the hub's cache, and its body is read into memory or onto the disk.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from ream_stream.errors import DamagedError
from ream_stream.file_access import is_inside

from .other_files import COMMIT

MAX_ANSWER_BYTES = 32_000_000
"""Largest answer that is no file: ten times a list of `MAX_FILES` files."""

MAX_FILES = 10_000
"""Most files of a repository."""

MAX_NAME_BYTES = 255
"""Longest name of a file or folder; no file system allows more."""

TIMEOUT = httpx2.Timeout(300, connect=30)
"""Seconds without data before a request fails; huggingface_hub has no limit for some."""

_ETAG = re.compile(r'(W/)?"?\w[\w.+=:-]{0,127}"?', re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")

_most: ContextVar[int] = ContextVar("most", default=MAX_ANSWER_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file of a repository."""

    size: int
    """Size of the file in bytes."""

    sha256: str | None
    """SHA-256 of the content, hex; the hub gives it for large files only."""


@contextmanager
def answers_of_at_most(nbytes: int) -> Iterator[None]:
    """Allow answers of this size in the block, on this thread; small ones in any case."""
    token = _most.set(max(nbytes, 1 << 20))
    try:
        yield
    finally:
        _most.reset(token)


def checked_commit(sha: Any) -> str:  # noqa: ANN401 - the hub's
    """Return a full commit hash.

    Raises
    ------
    DamagedError
        It is none.
    """
    if not isinstance(sha, str) or not COMMIT.fullmatch(sha):
        raise DamagedError(f"the hub answers with a commit {_shown(sha)}, which is no hash")
    return sha


def checked_files(siblings: Iterable[Any] | None) -> dict[str, RemoteFile]:
    """Return the files of a repository by name, as ``model_info`` lists them.

    Raises
    ------
    DamagedError
        One has a name that is no path inside a folder, two have names that a file system
        takes for one, or one has an impossible size or digest.
    """
    files: dict[str, RemoteFile] = {}
    known: dict[str, str] = {}
    folders: set[str] = set()
    for sibling in siblings or ():
        name, size, lfs = sibling.rfilename, sibling.size, sibling.lfs
        _check_name(name)
        alike = unicodedata.normalize("NFC", name).casefold()
        if alike in known:
            raise DamagedError(f"the hub lists {_shown(known[alike])} and {_shown(name)}")
        known[alike] = name
        folders.update(str(parent) for parent in PurePosixPath(alike).parents)
        if len(known) > MAX_FILES:
            raise DamagedError(f"the hub lists more than {MAX_FILES} files")
        digest = lfs.sha256 if lfs else None
        if type(size) is not int or not 0 <= size < 1 << 62 or (lfs and lfs.size != size):
            raise DamagedError(f"the hub tells no size of {_shown(name)}: {_shown(size)}")
        if lfs and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise DamagedError(f"the hub tells no SHA-256 of {_shown(name)}: {_shown(digest)}")
        files[name] = RemoteFile(size=size, sha256=digest)
    if both := sorted(folders & known.keys()):
        raise DamagedError(f"the hub lists {_shown(known[both[0]])} as a file and a folder")
    return files


def _check_name(name: Any) -> None:  # noqa: ANN401 - the hub's
    good = (
        isinstance(name, str)
        and name.isprintable()
        and "\\" not in name
        and is_inside(name)
        and len(name) <= 4 * MAX_NAME_BYTES
        and all(len(part.encode()) <= MAX_NAME_BYTES for part in name.split("/"))
    )
    if not good:
        raise DamagedError(f"the hub lists a file {_shown(name)}, which is no name to write to")


def _check(response: httpx2.Response) -> None:
    """Look at the headers of an answer, and let its body be no longer than is allowed.

    Raises
    ------
    DamagedError
        They are not what a hub may answer.
    """
    host, most = response.request.url.host, _most.get()
    commit, length = (response.headers.get(k) for k in ("X-Repo-Commit", "Content-Length"))
    if commit is not None:
        checked_commit(commit)
        for key in ("ETag", "X-Linked-ETag"):
            etag = response.headers.get(key)
            # of the answers to HEAD, they are names of files in the cache
            if response.request.method == "HEAD" and etag and not _ETAG.fullmatch(etag):
                raise DamagedError(f"{host} answers with an {key} {_shown(etag)}")
    if response.request.method == "HEAD":
        return
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DamagedError(f"{host} answers compressed, which was not asked for")
    if length is not None and not (length.isdecimal() and int(length[:20]) <= most):
        raise DamagedError(f"{host} answers with {_shown(length)} bytes, {most} are expected")
    response.stream = _Bounded(response, most)


class _Bounded(httpx2.SyncByteStream):
    """The body of an answer, up to a number of bytes."""

    def __init__(self, response: httpx2.Response, most: int) -> None:
        self._stream: Any = response.stream
        self._host, self._most = response.request.url.host, most

    def __iter__(self) -> Iterator[bytes]:
        total = 0
        for piece in self._stream:
            total += len(piece)
            if total > self._most:
                raise DamagedError(
                    f"{self._host} answers with more than the {self._most} bytes expected"
                )
            yield piece

    def close(self) -> None:
        self._stream.close()


def _client() -> httpx2.Client:
    client = default_client_factory()
    client.headers["Accept-Encoding"] = "identity"  # bytes that come are bytes that count
    client.timeout = TIMEOUT
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _check]}
    return client


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


set_client_factory(_client)
