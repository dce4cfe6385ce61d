"""The header of a safetensors file, read without trusting it.

A file is 8 bytes of header length, a JSON header, then the tensors' bytes.
Checkpoints come from strangers: all that the header says is checked against the
size of the file before anything is allocated or mapped.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ream_stream import deferred
from ream_stream.errors import DamagedError
from ream_stream.file_access import open_source, reading
from ream_stream.untrusted import parse_json

if TYPE_CHECKING:
    import torch
else:
    torch = deferred("torch")

MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors format allows."""

MAX_TENSORS = 1_000_000
"""Most tensors of a header: ten times the largest known model; more would take gigabytes."""

MAX_NAME = 1000
"""Most characters of a tensor's name; patterns are searched in it."""

MAX_AXES = 64
"""Most axes of a tensor, as in torch; the product of a million sizes would take hours."""

_DTYPES = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
ITEM_BYTES = {name: size for name, (size, _) in _DTYPES.items()}
"""Bytes of a number, by dtype in the format's spelling."""


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a key of `ITEM_BYTES`."""
    dtype: torch.dtype = getattr(torch, _DTYPES[name][1])
    return dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint, as its header describes it."""

    name: str
    """Name of the tensor in the checkpoint."""

    path: Path
    """Path of the file that holds the tensor."""

    dtype: str
    """Dtype of the tensor: a key of `ITEM_BYTES`, in the format's spelling."""

    shape: tuple[int, ...]
    """Shape of the tensor."""

    start: int
    """Offset of the tensor's first byte in the file."""

    stop: int
    """Offset after the tensor's last byte in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.stop - self.start

    @property
    def num_elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """Identity of a file, which differs if another file took its place."""

    size: int
    """Size of the file in bytes."""

    modified: int
    """Time of the file's last change of data, nanoseconds."""

    changed: int
    """Time of the last change of data or attributes, nanoseconds; no program can set it."""

    header: str
    """SHA-256 of the header, hex."""

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Read the stamp of a file whose header was read before."""
        with open_source(path) as file:
            return cls.of_open(path, file)

    @classmethod
    def of_open(cls, path: Path, file: BinaryIO) -> Stamp:
        """Read the stamp of an open file, from its beginning."""
        with reading(path):
            status = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            digest = hashlib.sha256(file.read(min(length, MAX_HEADER_BYTES)))
        return cls(
            size=status.st_size,
            modified=status.st_mtime_ns,
            changed=status.st_ctime_ns,
            header=digest.hexdigest(),
        )

    def difference(self, now: Stamp) -> str | None:
        """Say what is not as it was; None if all is."""
        if now.size != self.size:
            return f"it had {self.size} bytes and has {now.size}"
        if now.header != self.header:
            return "its header is another"
        return "it was written to" if now.modified != self.modified else None


def read_header(path: Path, *, with_data: bool = True) -> dict[str, TensorEntry]:
    """Read and check the header of one file.

    Parameters
    ----------
    path
        A safetensors file.
    with_data
        False if the file may end anywhere after its header, which is enough for a plan.

    Raises
    ------
    DamagedError
        The header is not plausible, or the file is shorter or longer than it says.
    """
    with open_source(path) as file, reading(path):
        file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise DamagedError(
                f"{path} is not a safetensors file or is cut short: it has {file_bytes} bytes "
                f"and announces a header of {header_bytes}"
            )
        raw = file.read(header_bytes)
        if raw.count(b"data_offsets") > MAX_TENSORS:
            raise DamagedError(f"{path}: the header describes more than {MAX_TENSORS} tensors")
        try:
            header = parse_json(raw)
        except ValueError as error:
            raise DamagedError(f"{path}: the header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise DamagedError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    if any(len(name) > MAX_NAME for name in header):
        raise DamagedError(f"{path}: a tensor has a name of more than {MAX_NAME} characters")
    base = 8 + header_bytes
    entries = {name: _entry(path, name, value, base) for name, value in header.items()}
    end = _check_layout(path, entries, base)
    if file_bytes > end or (with_data and file_bytes < end):
        raise DamagedError(
            f"{path} has {file_bytes} bytes, its header describes {end}: "
            "the file is truncated or damaged; fetch it again"
        )
    return entries


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:  # noqa: ANN401
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, stop]
        if not isinstance(dtype, str) or not isinstance(shape, list):
            raise TypeError("its dtype is no word or its shape no list")  # noqa: TRY301
        if len(shape) > MAX_AXES:
            raise ValueError(f"it has {len(shape)} axes")  # noqa: TRY301
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise ValueError("sizes and offsets must be whole numbers >= 0")  # noqa: TRY301
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path}: tensor {name!r} is described wrongly: {error}") from error
    if dtype not in ITEM_BYTES:
        raise DamagedError(f"{path}: tensor {name!r} has unknown dtype {dtype!r}")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if stop - start != nbytes:
        raise DamagedError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} needs {nbytes} bytes, "
            f"its offsets give {stop - start}"
        )
    return TensorEntry(
        name=name,
        path=path,
        dtype=dtype,
        shape=tuple(shape),
        start=base + start,
        stop=base + stop,
    )


def _check_layout(path: Path, entries: dict[str, TensorEntry], base: int) -> int:
    """Refuse gaps and overlaps; return the offset after the last tensor."""
    position = base
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position:
            raise DamagedError(
                f"{path}: tensor {entry.name!r} overlaps another or leaves a gap"
            )
        position = entry.stop
    return position
