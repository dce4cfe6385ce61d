"""The tokens that the model is run on, checked once and named by a digest.

The file format is safetensors: ``input_ids`` of shape (S, L), integers, and
optionally ``attention_mask`` of the same shape, 1 for a token and 0 for padding.

Letters in shapes: S sequences, L tokens of a sequence.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ream_stream.errors import UsageError

_NAMES = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """Sequences of equal length; made by `from_tensors`, `from_file` or `packing.pack`."""

    input_ids_SL: Tensor
    """int64."""

    attention_mask_SL: Tensor | None
    """int64, 0 where a token is padding; None where none is."""

    digest: str
    """SHA-256, hex, of the shape, the ids and the mask."""

    description: str
    """Where they are from, for people."""

    @property
    def num_sequences(self) -> int:
        """Sequences, S."""
        return self.input_ids_SL.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence, padding included, L."""
        return self.input_ids_SL.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, padding left out."""
        mask_SL = self.attention_mask_SL
        return self.input_ids_SL.numel() if mask_SL is None else int(mask_SL.sum())

    def tensors(self) -> dict[str, Tensor]:
        """Return what a token file holds; `from_file` reads it back to the same digest."""
        mask = (
            {} if self.attention_mask_SL is None else {"attention_mask": self.attention_mask_SL}
        )
        return {"input_ids": self.input_ids_SL, **mask}


def from_tensors(
    tensors: Mapping[str, Tensor], *, description: str, vocab_size: int | None = None
) -> Tokens:
    """Check tokens.

    Parameters
    ----------
    tensors
        ``input_ids`` and perhaps ``attention_mask``. Padding may be on any side; a mask
        without padding counts as none.
    description
        Where they are from; messages begin with it.
    vocab_size
        Rows of the embedding, if it is known.

    Raises
    ------
    UsageError
        A tensor is missing, unknown, or not what the model can be run on.
    """
    if "input_ids" not in tensors or not _NAMES.issuperset(tensors):
        names = ", ".join(sorted(tensors)) or "nothing"
        raise UsageError(
            f"{description}: it holds {names}; a token file holds input_ids "
            f"and, for padded sequences, attention_mask"
        )
    input_ids_SL = _integers(tensors["input_ids"], f"{description}: input_ids")
    _check_ids(input_ids_SL, description, vocab_size)
    mask_SL = None
    if "attention_mask" in tensors:
        mask_SL = _integers(tensors["attention_mask"], f"{description}: attention_mask")
        _check_mask(mask_SL, input_ids_SL.shape, description)
        mask_SL = None if bool(mask_SL.all()) else mask_SL
    return Tokens(
        input_ids_SL=input_ids_SL,
        attention_mask_SL=mask_SL,
        digest=_digest(input_ids_SL, mask_SL),
        description=description,
    )


def from_file(path: Path, *, vocab_size: int | None = None) -> Tokens:
    """Read a token file and check it.

    Raises
    ------
    UsageError
        The file is missing, is not safetensors, or does not hold usable tokens.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{path}: not a whole safetensors file ({error})") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    return from_tensors(tensors, description=str(path), vocab_size=vocab_size)


def _integers(tensor: Tensor, where: str) -> Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        raise UsageError(f"{where} is of type {_name(tensor.dtype)}, not of integers")
    if tensor.ndim != 2 or tensor.numel() == 0:
        shape = "x".join(map(str, tensor.shape))
        raise UsageError(f"{where} has shape ({shape}), not (sequences, tokens)")
    return tensor.to(torch.int64).contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_ids(input_ids_SL: Tensor, description: str, vocab_size: int | None) -> None:
    smallest, largest = (int(value) for value in input_ids_SL.aminmax())
    if smallest < 0:
        raise UsageError(
            f"{description}: input_ids holds {smallest}; padding needs a token too"
        )
    if vocab_size is not None and largest >= vocab_size:
        raise UsageError(
            f"{description}: input_ids holds {largest}, the checkpoint knows tokens 0 to "
            f"{vocab_size - 1}; it is from another tokenizer"
        )


def _check_mask(mask_SL: Tensor, shape: torch.Size, description: str) -> None:
    if mask_SL.shape != shape:
        raise UsageError(
            f"{description}: attention_mask has shape {tuple(mask_SL.shape)}, "
            f"input_ids {tuple(shape)}"
        )
    if not bool(((mask_SL == 0) | (mask_SL == 1)).all()):
        raise UsageError(f"{description}: attention_mask holds values other than 0 and 1")
    empty_S = ~mask_SL.any(dim=1)
    if bool(empty_S.any()):
        raise UsageError(
            f"{description}: sequence {int(empty_S.int().argmax())} is all padding"
        )


def _digest(input_ids_SL: Tensor, mask_SL: Tensor | None) -> str:
    digest = hashlib.sha256(repr((tuple(input_ids_SL.shape), mask_SL is not None)).encode())
    for tensor in (input_ids_SL,) if mask_SL is None else (input_ids_SL, mask_SL):
        values: Any = tensor.numpy().astype("<i8", copy=False)
        digest.update(values)
    return digest.hexdigest()
