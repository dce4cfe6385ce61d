"""Checkpoints on the Hugging Face hub.

For a plan only small files and the headers of the shards are fetched: a folder with the
first bytes of each shard is all that `checkpoint.source` needs. A run has the whole
checkpoint in the hub's own cache, or, streamed, each shard for as long as a layer needs it.
Whatever is fetched is of one commit, and every shard has the SHA-256 that the hub tells.

huggingface_hub finds the token (``hf auth login``, ``HF_TOKEN``); it is in no message here
and in no file.
"""

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from ream_stream import files as durable
from ream_stream.errors import DamagedError, ReamStreamError, UsageError
from ream_stream.parsing import read_object

from .config_json import lacks_mtp
from .header import MAX_HEADER_BYTES
from .reader import INDEX, SINGLE, Checkpoint, read_config

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""How a checkpoint on the hub is written: ``ORG/NAME`` or ``ORG/NAME@REVISION``."""

TRIES = 6
"""How often something is fetched before it is given up."""

WAIT_SECONDS = 1.0
"""Before the second try; twice as long before each one after it."""

_FIRST_BYTES = 1 << 20
_OTHER_WEIGHTS = ("bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx", "onnx_data")
_NOT_FETCHED = [f"*.{suffix}" for suffix in _OTHER_WEIGHTS]
_REFUSED = {
    401: "it does not exist, or takes a token: set HF_TOKEN or run hf auth login",
    403: "your token has no access to it: ask for it on its page",
    404: "it does not exist, or takes a token: set HF_TOKEN or run hf auth login",
}
_DOWN = (httpx2.HTTPError, ConnectionError, TimeoutError)

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file of a repository."""

    size: int
    """Bytes."""

    sha256: str | None
    """Of its content, hex; the hub tells it of large files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """One commit of a repository on the hub."""

    repo: str
    """``ORG/NAME``."""

    commit: str
    """Full hash: what is fetched later is of the same commit."""

    files: Mapping[str, RemoteFile] = field(repr=False)
    """Its files by name."""


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
    repo = match["repo"]
    info = _retried(
        text, lambda: HfApi().model_info(repo, revision=match["revision"], files_metadata=True)
    )
    files = {}
    for sibling in info.siblings or ():
        path = PurePosixPath(sibling.rfilename)
        if path.is_absolute() or ".." in path.parts:
            raise DamagedError(f"{text} names a file outside of it, {sibling.rfilename!r}")
        digest = sibling.lfs.sha256 if sibling.lfs else None
        files[sibling.rfilename] = RemoteFile(size=sibling.size or 0, sha256=digest)
    return Remote(repo=repo, commit=str(info.sha), files=files)


def fetch_headers(remote: Remote) -> Path:
    """Fetch what a plan needs, a few megabytes; return the folder it is in.

    The shards in it end after their headers. It is kept for the next time, beside the
    hub's own cache.
    """
    owner, _, name = remote.repo.partition("/")
    folder = Path(constants.HF_HOME) / "ream-stream" / owner / remote.commit / name
    weights = [*_NOT_FETCHED, "*.safetensors"]
    _retried(
        remote.repo,
        lambda: snapshot_download(
            remote.repo, revision=remote.commit, local_dir=folder, ignore_patterns=weights
        ),
    )
    with ThreadPoolExecutor(8) as pool:
        for name, data in pool.map(
            lambda name: (name, _header(remote, name)),
            [name for name in shards(remote, folder) if not (folder / name).is_file()],
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
    folder = Path(
        _retried(
            remote.repo,
            lambda: snapshot_download(
                remote.repo, revision=remote.commit, ignore_patterns=_NOT_FETCHED
            ),
        )
    )
    for name in shards(remote, folder):
        _check(remote, name, folder / name)
    return folder


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

    def fetch(path: Path) -> None:
        incoming = folder / "incoming"
        durable.make_directory(incoming)
        for last in (False, True):
            _retried(
                f"{remote.repo}/{path.name}",
                lambda: hf_hub_download(
                    remote.repo, path.name, revision=remote.commit, local_dir=incoming
                ),
            )
            try:
                _check(remote, path.name, incoming / path.name)
                break
            except DamagedError:
                durable.remove(incoming)
                if last:
                    raise
                durable.make_directory(incoming)
        durable.adopt(incoming / path.name, path)

    entries = {
        name: replace(entry, path=folder / entry.path.name)
        for name, entry in checkpoint.entries.items()
    }
    return replace(checkpoint, entries=entries, stamps={}, fetch=fetch)


def push(output: Path, repo: str, *, private: bool, revision: str | None) -> str:
    """Publish an output; return where it is.

    All files are in one commit: nobody sees half of them.

    Raises
    ------
    UsageError
        One may not write there.
    """
    api = HfApi()
    _retried(repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
    if revision is not None:
        _retried(repo, lambda: api.create_branch(repo, branch=revision, exist_ok=True))

    def upload() -> str:
        try:
            done = api.upload_folder(
                repo_id=repo,
                folder_path=output,
                revision=revision,
                commit_message="Upload a compressed checkpoint",
                ignore_patterns=[".*", "**/.*", f"*{durable.PARTIAL}"],
            )
        except RuntimeError as error:
            # what a thread of an upload met is the cause of an error that says only where
            raise (error.__cause__ or error) from None
        return str(done.commit_url)

    return _retried(repo, upload)


def _header(remote: Remote, name: str) -> bytes:
    """Return the first bytes of a shard, up to the end of its header."""

    def read() -> bytes:
        data, wanted = b"", 8
        url = hf_hub_url(remote.repo, name, revision=remote.commit)
        while len(data) < wanted:
            stop = max(_FIRST_BYTES, wanted)
            headers = {**build_hf_headers(), "Range": f"bytes=0-{stop - 1}"}
            with get_session().stream("GET", url, headers=headers) as response:
                hf_raise_for_status(response)
                data = b""
                # a server may answer with the whole file: no more of it is read
                for piece in response.iter_bytes(1 << 16):
                    data += piece
                    if len(data) >= stop:
                        break
            if len(data) < 8:
                raise DamagedError(f"{remote.repo}: {name} is no safetensors file")
            wanted = 8 + int.from_bytes(data[:8], "little")
            if wanted > MAX_HEADER_BYTES or wanted > remote.files[name].size:
                raise DamagedError(
                    f"{remote.repo}: {name} announces a header of {wanted} bytes"
                )
            if len(data) < wanted and len(data) < stop:
                raise httpx2.RemoteProtocolError("the answer ended early")
        return data[:wanted]

    return _retried(f"{remote.repo}/{name}", read)


def _check(remote: Remote, name: str, path: Path) -> None:
    """Refuse a file that is not what the hub says it is."""
    told = remote.files[name]
    size = path.stat().st_size
    if size == told.size and told.sha256 is not None:
        with path.open("rb") as file, durable.reading(path):
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == told.sha256:
            return
    elif size == told.size:
        return
    raise DamagedError(
        f"{path} is not what {remote.repo} has: its size or SHA-256 is another; fetch it again"
    )


def _retried(what: str, act: Callable[[], R]) -> R:
    """Do something that needs the hub; wait and try again while it may help."""
    for attempt in range(1, TRIES + 1):
        try:
            return act()
        except HFValidationError as error:
            raise UsageError(f"{what} is no name of a repository on the hub") from error
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
