"""Checkpoints on the Hugging Face hub.

For a plan only small files and the headers of the shards are fetched: a folder with the
first bytes of each shard is all that `checkpoint.source` needs. A run has the whole
checkpoint in the hub's own cache, or, streamed, each shard for as long as a layer needs it.
Whatever is fetched is of one commit, and every shard has the SHA-256 that the hub tells.

huggingface_hub finds the token (``hf auth login``, ``HF_TOKEN``); it is in no message here
and in no file.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from ream_stream import files as durable
from ream_stream.errors import DamagedError, OverBudgetError, ReamStreamError, UsageError
from ream_stream.file_access import FileRange, digest, free_bytes, open_source, read_object
from ream_stream.units import format_size

from .config_json import lacks_mtp
from .header import MAX_HEADER_BYTES, Stamp, TensorEntry, read_header
from .hub_answers import (
    RemoteFile,
    answers_of_at_most,
    checked_commit,
    checked_files,
)
from .other_files import WEIGHTS
from .reader import INDEX, SINGLE, Checkpoint, read_config

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""Pattern of a checkpoint on the hub: ``ORG/NAME`` or ``ORG/NAME@REVISION``."""

THREADS = 8
"""Number of threads that fetch files at the same time."""

TRIES = 6
"""Number of attempts to fetch a file."""

WAIT_SECONDS = 1.0
"""Pause before the second attempt; each later pause is twice as long."""

_FIRST_BYTES = 1 << 20
_REFUSED = {
    401: "it does not exist, or takes a token: set HF_TOKEN or run hf auth login",
    403: "your token has no access to it: ask for it on its page",
    404: "it does not exist, or takes a token: set HF_TOKEN or run hf auth login",
}
_DOWN = (httpx2.HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)
_NOT_UNDERSTOOD = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""Exceptions that huggingface_hub raises for a malformed answer."""

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """One commit of a repository on the hub."""

    repo: str
    """Repository on the hub, ``ORG/NAME``."""

    commit: str
    """Full commit hash; all later requests use it."""

    files: Mapping[str, RemoteFile] = field(repr=False)
    """Files of the repository by name."""


def find(text: str) -> Remote:
    """Ask the hub for a repository.

    Raises
    ------
    UsageError
        It does not exist, or one may not read it.
    ReamStreamError
        The hub cannot be reached.
    """
    match = HUB_ID.fullmatch(text)
    if match is None:
        raise UsageError(f"{text} is neither a folder nor ORG/NAME[@REVISION] on the hub")
    repo, revision = match["repo"], match["revision"]
    return described(
        text, lambda: HfApi().model_info(repo, revision=revision, files_metadata=True)
    )


def described(text: str, ask: Callable[[], ModelInfo]) -> Remote:
    """Return the hub's answer as huggingface_hub parses it, checked.

    Raises
    ------
    DamagedError
        It is not what a hub may answer.
    """
    info = _retried(text, ask)
    commit, files = checked_commit(info.sha), checked_files(info.siblings)
    return Remote(repo=text.partition("@")[0], commit=commit, files=files)


def fetch_headers(remote: Remote) -> Path:
    """Fetch what a plan needs, a few megabytes; return the folder it is in.

    The shards in it end after their headers. It is kept for the next time, beside the
    hub's own cache.
    """
    owner, _, name = remote.repo.partition("/")
    folder = Path(constants.HF_HOME) / "ream-stream" / owner / remote.commit / name
    _fetch_all(remote, _small(remote), folder)
    missing = [name for name in shards(remote, folder) if not (folder / name).is_file()]
    with ThreadPoolExecutor(THREADS) as pool:
        for name, data in zip(
            missing, pool.map(partial(_header, remote), missing), strict=True
        ):
            durable.write_bytes(folder / name, data)
    return folder


def shards(remote: Remote, folder: Path) -> list[str]:
    """Return the names of the shards that the index in `folder` names and the hub has.

    And of other files, if layers that config.json tells of may be in one.
    """
    tensors, named, config = set[str](), {SINGLE}, folder / "config.json"
    if (folder / INDEX).is_file():
        weight_map = read_object(folder / INDEX).get("weight_map")
        weight_map = weight_map if isinstance(weight_map, dict) else {}
        tensors = set(weight_map)
        named = {name for name in weight_map.values() if isinstance(name, str)}
    if config.is_file() and lacks_mtp(tensors, read_config(folder)):
        named |= {name for name in remote.files if name.endswith(".safetensors")}
    # what the hub lacks or is no name is for the parser of the folder to refuse
    return sorted(name for name in named & set(remote.files) if "/" not in name)


def download(remote: Remote) -> Path:
    """Fetch all of a checkpoint into the hub's cache; return its folder.

    Raises
    ------
    DamagedError
        A shard does not have the digest that the hub tells.
    """
    weights = [n for n in remote.files if n.endswith(".safetensors") and "/" not in n]
    return _fetch_all(remote, [*_small(remote), *weights])


def _small(remote: Remote) -> list[str]:
    """Return the names of what is no weights: config, index, tokenizer, code."""
    return [
        name
        for name in remote.files
        if (name == INDEX or not WEIGHTS.fullmatch(name))
        and not any(part.startswith(".") for part in name.split("/"))
    ]


def _fetch_all(remote: Remote, names: Sequence[str], local: Path | None = None) -> Path:
    """Fetch files into a folder of their own, or into the hub's cache; return the folder.

    Raises
    ------
    OverBudgetError
        The disk has no room for them.
    """
    home = Path(constants.HF_HOME if local else constants.HF_HUB_CACHE)
    cache = home / repo_folder_name(repo_id=remote.repo, repo_type="model")
    folder = local or cache / "snapshots" / remote.commit
    size = sum(remote.files[name].size for name in names if not (folder / name).exists())
    free = free_bytes(home)
    if size > free:
        raise OverBudgetError(
            f"{remote.repo} has {format_size(size)} to fetch, {format_size(free)} are free on "
            f"the disk of {home}; with --stream only a few shards are there at a time"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda name: _fetch(remote, name, folder, local), names):
            pass
    return folder


def _fetch(remote: Remote, name: str, folder: Path, local: Path | None) -> None:
    """Fetch a file into a folder, and once more if it is not what the hub told of it."""

    def fetch(*, again: bool) -> None:
        with answers_of_at_most(remote.files[name].size):
            hf_hub_download(
                remote.repo,
                name,
                revision=remote.commit,
                local_dir=local,
                force_download=again,
            )

    _retried(f"{remote.repo}/{name}", lambda: fetch(again=False))
    if not _is_whole(remote, name, folder / name):
        _retried(f"{remote.repo}/{name}", lambda: fetch(again=True))
        if not _is_whole(remote, name, folder / name):
            raise DamagedError(
                f"{folder / name} is not what {remote.repo} has: its size, SHA-256 or commit "
                "is another; fetch it again"
            )


def streamed(checkpoint: Checkpoint, remote: Remote, folder: Path) -> Checkpoint:
    """Return a checkpoint whose shards are fetched into `folder` when they are needed.

    Parameters
    ----------
    checkpoint
        Of the folder that `fetch_headers` gave.
    remote
        Where the shards are.
    folder
        Where they are put, and deleted from after their last use.
    """
    disable_progress_bars()  # a run shows its own
    entries = {
        name: replace(entry, path=folder / entry.path.name)
        for name, entry in checkpoint.entries.items()
    }
    shards = _Shards(remote, folder, entries)
    return replace(
        checkpoint,
        entries=entries,
        stamps=shards.stamps,
        commit=remote.commit,
        fetch=shards.fetch,
    )


class _Shards:
    """Shards of a repository, fetched into a folder one after another."""

    def __init__(
        self, remote: Remote, folder: Path, entries: Mapping[str, TensorEntry]
    ) -> None:
        self._remote, self._folder = remote, folder
        self._planned: dict[Path, dict[str, TensorEntry]] = {}
        for name, entry in entries.items():
            self._planned.setdefault(entry.path, {})[name] = entry
        self.stamps: dict[Path, Stamp] = {}

    def fetch(self, path: Path) -> None:
        """Make sure that a shard is there, whole and as it was planned."""
        if path in self.stamps and path.is_file():
            return
        if not _is_whole(self._remote, path.name, path):  # one that a killed run left may be
            durable.remove(path)
            incoming = self._folder / "incoming"
            durable.make_directory(incoming)
            _fetch(self._remote, path.name, incoming, incoming)
            durable.adopt(incoming / path.name, path)
        if read_header(path) != self._planned[path]:
            raise DamagedError(
                f"{self._remote.repo}: {path.name} has another header than it had for the plan"
            )
        self.stamps[path] = Stamp.of(path)


def push(
    output: Path, names: Iterable[str], repo: str, *, private: bool, revision: str | None
) -> str:
    """Publish files of an output; return where they are.

    All are in one commit: nobody sees half of them.

    Raises
    ------
    UsageError
        One may not write there.
    DamagedError
        A file is a link that leads out of the output, or no file.
    """
    api, operations = HfApi(), []
    for name in names:
        open_source(output / name, (output.resolve(),)).close()
        operations.append(CommitOperationAdd(name, output / name))
    _retried(repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
    if revision is not None:
        _retried(repo, lambda: api.create_branch(repo, branch=revision, exist_ok=True))

    def upload() -> str:
        try:
            done = api.create_commit(
                repo,
                operations,
                revision=revision,
                commit_message="Upload a compressed checkpoint",
            )
        except RuntimeError as error:
            # what a thread of an upload met is the cause of an error that says only where
            raise (error.__cause__ or error) from None
        return str(done.commit_url)

    return _retried(repo, upload)


def _header(remote: Remote, name: str) -> bytes:
    """Return the first bytes of a shard, up to the end of its header."""
    size = remote.files[name].size

    def read() -> bytes:
        data, wanted = bytearray(), 8
        url = hf_hub_url(remote.repo, name, revision=remote.commit)
        while len(data) < wanted:
            stop = max(_FIRST_BYTES, wanted)
            headers = {**build_hf_headers(), "Range": f"bytes=0-{stop - 1}"}
            with (
                # a server may answer with the whole file: no more of it is read
                answers_of_at_most(size),
                get_session().stream("GET", url, headers=headers) as response,
            ):
                hf_raise_for_status(response)
                data.clear()
                for piece in response.iter_bytes(1 << 16):
                    data += piece
                    if len(data) >= stop:
                        break
            if len(data) < 8:
                raise DamagedError(f"{remote.repo}: {name} is no safetensors file")
            wanted = 8 + int.from_bytes(data[:8], "little")
            if wanted > MAX_HEADER_BYTES or wanted > size:
                raise DamagedError(
                    f"{remote.repo}: {name} announces a header of {wanted} bytes"
                )
            if len(data) < wanted and len(data) < stop:
                raise httpx2.RemoteProtocolError("the answer ended early")
        return bytes(data[:wanted])

    return _retried(f"{remote.repo}/{name}", read)


def _is_whole(remote: Remote, name: str, path: Path) -> bool:
    """Tell whether a file is there and is what the hub says it is."""
    told = remote.files[name]
    if not path.is_file() or path.stat().st_size != told.size:
        return False
    whole = FileRange(path=path, start=0, stop=told.size)
    return told.sha256 in {None, digest([whole] if told.sha256 else [])}


def _retried(what: str, act: Callable[[], R]) -> R:
    """Do something that needs the hub; wait and try again while it may help."""
    for attempt in range(1, TRIES + 1):
        try:
            return act()
        except _NOT_UNDERSTOOD as error:
            if isinstance(error, HFValidationError):
                raise UsageError(f"{what} is no name of a repository on the hub") from error
            raise DamagedError(f"{what}: what the hub answers makes no sense") from error
        except OfflineModeIsEnabled as error:
            raise UsageError(f"{what} is on the hub, and HF_HUB_OFFLINE is set") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in _REFUSED:
                raise UsageError(f"{what}: {_REFUSED[status]} (status {status})") from error
            if attempt == TRIES or (status < 500 and status not in {408, 429}):
                raise ReamStreamError(
                    f"{what}: the hub answers with status {status}"
                ) from error
        except _DOWN as error:
            if attempt == TRIES:
                raise ReamStreamError(
                    f"{what}: the hub cannot be reached ({type(error).__name__}); "
                    "run the same command again to go on"
                ) from error
        time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")
