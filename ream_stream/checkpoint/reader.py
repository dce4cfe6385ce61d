"""A checkpoint folder: config, index and headers checked first, then mapped tensors."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from ream_stream import deferred
from ream_stream.errors import DamagedError, UsageError
from ream_stream.file_access import FileRange, open_source, read_object

from .expert_layouts import find_experts
from .expert_stack import ExpertStack, Send, one_of, stay
from .formats import Plain, Stored
from .header import Stamp, TensorEntry, read_header
from .other_files import commit_of, homes_of, other_files
from .quantized import find_quantized
from .read_ahead import ReadAhead
from .unindexed import find_unindexed

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_CONFIG_BYTES = 16_000_000
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Keys of the quantization config in config.json; older checkpoints use the second."""

QUANTIZATION_FILE = "hf_quant_config.json"
"""File of ModelOpt's quantization config; config.json may have one too."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class MappedTensors:
    """Tensors of a checkpoint as views of mapped files; see `Checkpoint.open`."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._checkpoint, self._entries = checkpoint, checkpoint.entries
        self._stack = stack
        self._files: dict[Path, Any] = {}
        self._ahead = ReadAhead()
        stack.callback(self._ahead.close)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor whose memory is the page cache; it must not be written to."""
        path = self._entries[name].path
        if path not in self._files:
            self._files[path] = self._stack.enter_context(self._checkpoint.mapped(path))
        tensor: Tensor = self._files[path].get_tensor(name)
        return tensor

    def ahead(self, stack: ExpertStack, expert: int) -> None:
        """Make the kernel read an expert that will be needed soon."""
        ranges = []
        for name, place in stack.expert_slots(expert):
            entry = self._entries[name]
            start, stop = entry.start, entry.stop
            if place is not None:
                start, stop = one_of(entry, place, stack.count)
            ranges.append(FileRange(path=entry.path, start=start, stop=stop))
        self._ahead.ask(ranges)

    def matrix(
        self, stored: Stored, index: int | None, dtype: torch.dtype, send: Send = stay
    ) -> Tensor:
        """Return a matrix: floats as they are stored, others decoded.

        Parameters
        ----------
        stored
            Where it is, and its scheme.
        index
            Which one of a stack; None if it is not one of a stack.
        dtype
            Of what is decoded.
        send
            Is given the tensors, views of the mapped file, and what it returns is used.
        """
        parts = {
            suffix: send(self[name] if index is None else self[name][index])
            for suffix, name in stored.names().items()
        }
        if isinstance(stored.codec, Plain):
            return parts[stored.codec.suffix]
        return stored.codec.decode(parts, stored.rows, stored.cols, dtype)


@dataclass(frozen=True, kw_only=True)  # without slots: what is found in headers is kept
class Checkpoint:
    """Contents of a checkpoint folder, known from its headers alone."""

    folder: Path
    """Folder of the checkpoint."""

    config: Mapping[str, Any]
    """Parsed config.json, unchanged."""

    entries: Mapping[str, TensorEntry] = field(repr=False)
    """Header entries of all tensors by name."""

    stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False, compare=False)
    """Stamps of the files when their headers were read; files without one are not watched."""

    quantization_file: Mapping[str, Any] | None = field(default=None, repr=False)
    """Parsed `QUANTIZATION_FILE`, unchanged; None if there is none."""
    others: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Sizes of all files except config and weights, in folders too: tokenizer, code.

    By name relative to the folder, with slashes. Hidden ones are left out, and so are weights
    that the index does not name: transformers prefers a ``model.safetensors`` to the index
    beside it.
    """

    commit: str | None = None
    """Commit on the hub; None if the checkpoint is not known to be from there."""

    fetch: Callable[[Path], None] | None = field(default=None, repr=False, compare=False)
    """Fetches a shard that is not on disk yet; None if all shards are on disk."""

    def described(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield what describes formats, with the file it is in; the first one counts.

        That of a wrapper's text decoder comes after the wrapper's.

        Raises
        ------
        DamagedError
            One is not an object.
        """
        found = [
            ("config.json", key, config[key])
            for config in (self.config, self.config.get("text_config"))
            for key in QUANTIZATION_KEYS
            if isinstance(config, Mapping) and config.get(key)
        ]
        beside = self.quantization_file or {}
        if "quantization" in beside:
            found.append((QUANTIZATION_FILE, "quantization", beside["quantization"]))
        for file, key, value in found:
            if not isinstance(value, Mapping):
                raise DamagedError(f"{key} of {file} is not an object")
            yield file, value

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """Return the first description of formats; None if there is none."""
        every = [value for _, value in self.described()]
        return every[0] if every else None

    @cached_property
    def experts(self) -> Mapping[str, ExpertStack]:
        """The stacks of routed experts, by prefix; see `find_experts`."""
        return find_experts(self.entries, self.quantization)

    @cached_property
    def quantized(self) -> Mapping[str, Stored]:
        """The matrices that are not stored as floats; see `find_quantized`."""
        return find_quantized(self.entries, self.quantization)

    @contextmanager
    def open(self) -> Iterator[MappedTensors]:
        """Map files as tensors are asked for; unmap them at the end of the block.

        Mapped pages count as this process's until the file is closed, so a
        block should not outlive the layer it serves.
        """
        with ExitStack() as stack:
            yield MappedTensors(self, stack)

    def mapped(self, path: Path) -> Any:  # noqa: ANN401 - safetensors has no types
        """Return a shard, opened by safetensors, if it is the one whose header was read."""
        with self._opened(path) as file:
            try:
                # by its descriptor: what was looked at is what is mapped
                return safe_open(f"/dev/fd/{file.fileno()}", framework="pt")
            except SafetensorError as error:
                if told := re.search(r"os error (\d+)", str(error)):
                    number = int(told[1])
                    raise OSError(number, os.strerror(number), str(path)) from error
                raise DamagedError(f"{path} cannot be mapped: {error}") from error

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Make sure that the files of some tensors are those whose headers were read.

        Raises
        ------
        DamagedError
            One is gone, or its size, header or time of change is another.
        """
        for path in sorted({self.entries[name].path for name in names} & set(self.stamps)):
            with self._opened(path):
                pass

    @contextmanager
    def _opened(self, path: Path) -> Iterator[BinaryIO]:
        """Open a shard; refuse another than the one whose header was read."""
        stamp, difference = self.stamps.get(path), None
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open_source(path))
                if stamp is not None:
                    difference = stamp.difference(Stamp.of_open(path, file))
            except FileNotFoundError:
                difference = "it is gone"
            if difference is not None:
                raise DamagedError(
                    f"{path} was changed while it was being read: {difference}; "
                    "bring it back and run the same command again"
                )
            yield file

    def other(self, name: str) -> FileRange:
        """Return the bytes of one of `others`; what leads out of the folder is not read."""
        return FileRange(
            path=self.folder / name,
            start=0,
            stop=self.others[name],
            within=homes_of(self.folder),
        )

    def files(self) -> list[Path]:
        """Return the shards, in order of name."""
        return sorted({entry.path for entry in self.entries.values()})

    def cut_files(self) -> list[Path]:
        """Return the shards that are not there to their end, in order of name."""
        end: dict[Path, int] = {}
        for entry in self.entries.values():
            end[entry.path] = max(entry.stop, end.get(entry.path, 0))
        return sorted(
            path
            for path, stop in end.items()
            if not path.is_file() or path.stat().st_size < stop
        )

    def digest(self) -> str:
        """Return a digest of config, names, shapes, offsets and file sizes; not of the data."""
        described: dict[str, Any] = {
            "config": self.config,
            "tensors": [
                [e.name, e.path.name, e.dtype, e.shape, e.start, e.stop]
                for e in sorted(self.entries.values(), key=lambda entry: entry.name)
            ],
        }
        if self.quantization_file is not None:
            described["quantization"] = self.quantization_file
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def open_checkpoint(folder: Path, *, with_data: bool = True) -> Checkpoint:
    """Read and check config, index and headers of a folder.

    Parameters
    ----------
    folder
        Of a checkpoint.
    with_data
        False if shards may end anywhere after their headers, which is enough for a plan.

    Raises
    ------
    UsageError
        The folder is not a safetensors checkpoint.
    DamagedError
        Config, index, headers and files contradict each other.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    check_path(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: it is not a model checkpoint")
    config = read_config(folder)
    if (folder / INDEX).exists():
        entries = _indexed(folder, with_data=with_data)
    elif (folder / SINGLE).is_file():
        entries = read_header(folder / SINGLE, with_data=with_data)
    else:
        raise UsageError(
            f"{folder} has neither {SINGLE} nor {INDEX}: no safetensors weights"
            + _pickles(folder)
        )
    if not entries:
        raise DamagedError(f"{folder} holds no tensor")
    entries |= find_unindexed(folder, config, entries, with_data=with_data)
    stamps = {path: Stamp.of(path) for path in {entry.path for entry in entries.values()}}
    beside = folder / QUANTIZATION_FILE
    return Checkpoint(
        folder=folder,
        config=config,
        entries=entries,
        stamps=stamps,
        quantization_file=read_object(beside, MAX_CONFIG_BYTES) if beside.exists() else None,
        others=other_files(folder, {"config.json", QUANTIZATION_FILE}),
        commit=commit_of(folder),
    )


def check_path(path: Path) -> None:
    """Refuse a folder whose files safetensors cannot open.

    Raises
    ------
    UsageError
        Its path is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{path}: the path is not UTF-8; use or make another") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; older ones have infinite numbers."""
    return read_object(folder / "config.json", MAX_CONFIG_BYTES, finite=False)


def vocab_size_of(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that config.json tells; None if it tells none."""
    size = config.get("vocab_size")
    if size is not None and (type(size) is not int or size < 1):
        raise DamagedError(f"config.json: vocab_size {size!r} is not a number above 0")
    return size


def _indexed(folder: Path, *, with_data: bool) -> dict[str, TensorEntry]:
    """Return the entries of all shards that the index names, checked against it."""
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(v, str) for v in weight_map.values()
    ):
        raise DamagedError(f"{folder / INDEX} has no weight_map of tensor names to files")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        path = _inside(folder, shard)
        for name, entry in read_header(path, with_data=with_data).items():
            if name in entries:
                raise DamagedError(
                    f"tensor {name!r} is in {entries[name].path.name} and in {shard}"
                )
            if weight_map.get(name) != shard:
                listed = weight_map.get(name, "no file")
                raise DamagedError(f"tensor {name!r} is in {shard}, the index names {listed}")
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise DamagedError(f"the index puts tensor {name!r} in {shard}, which lacks it")
    return entries


def _inside(folder: Path, shard: str) -> Path:
    """Return the path of a shard; refuse names that leave the folder."""
    if (
        Path(shard).name != shard
        or shard in {"", ".", ".."}
        or not shard.endswith(".safetensors")
    ):
        raise DamagedError(
            f"{folder / INDEX} names the file {shard!r}; only safetensors files in the folder "
            "itself are read"
        )
    path = folder / shard
    try:
        found = path.is_file()
    except OSError:  # a name longer than any file's
        found = False
    if not found:
        raise DamagedError(f"{folder} lacks {shard}, which its index names: fetch it again")
    return path


def _pickles(folder: Path) -> str:
    """Name a file of weights that is never opened, if there is one."""
    found = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not found:
        return ""
    return f"; {found[0]} may hold code that runs when it is opened: convert it to safetensors"
