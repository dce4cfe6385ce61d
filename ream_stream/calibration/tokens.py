"""The tokens that the model is run on, checked once and named by a digest.

The file format is safetensors: ``input_ids`` of shape (S, L), integers, and
optionally ``attention_mask`` of the same shape, 1 for a token and 0 for padding,
and ``domain`` of shape (S,), which of the names in the metadata's ``domains`` (a
JSON list) each sequence belongs to.

Letters in shapes: S sequences, L tokens of a sequence.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ream_stream.errors import UsageError
from ream_stream.untrusted import parse_json

ONE_DOMAIN = "all"
"""Name of the only domain of sequences without domain labels."""

_NAMES = frozenset({"input_ids", "attention_mask", "domain"})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """Sequences of equal length; made by `from_tensors`, `from_file` or `packing.pack`."""

    input_ids_SL: Tensor
    """Token ids, int64."""

    attention_mask_SL: Tensor | None
    """Attention mask, int64, 0 for padding; None if no token is padding."""

    domain_S: Tensor
    """Domain of each sequence as an index in `domains`, int64."""

    domains: tuple[str, ...]
    """Names of the domains; each has at least one sequence."""

    digest: str
    """SHA-256 of the shape, the ids, the mask and, if there are several, the domains; hex."""

    description: str
    """Origin of the tokens, for people."""

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
        """Return the tensors of a token file; `from_file` reads the same digest from it."""
        optional = {
            "attention_mask": self.attention_mask_SL,
            "domain": self.domain_S if len(self.domains) > 1 else None,
        }
        there = {name: tensor for name, tensor in optional.items() if tensor is not None}
        return {"input_ids": self.input_ids_SL, **there}

    def metadata(self) -> dict[str, str]:
        """Return the metadata in the header of a token file."""
        return {"domains": json.dumps(self.domains)} if len(self.domains) > 1 else {}


def from_tensors(
    tensors: Mapping[str, Tensor],
    *,
    description: str,
    vocab_size: int | None = None,
    domains: Sequence[str] | None = None,
) -> Tokens:
    """Check tokens.

    Parameters
    ----------
    tensors
        ``input_ids`` and perhaps ``attention_mask`` and ``domain``. Padding may be on any
        side; a mask without padding counts as none.
    description
        Where they are from; messages begin with it.
    vocab_size
        Rows of the embedding, if it is known.
    domains
        What the numbers in ``domain`` mean; without names they are their own. Domains
        without a sequence are left out.

    Raises
    ------
    UsageError
        A tensor is missing, unknown, or not what the model can be run on.
    """
    if "input_ids" not in tensors or not _NAMES.issuperset(tensors):
        names = ", ".join(sorted(tensors)) or "nothing"
        raise UsageError(
            f"{description}: it holds {names}; a token file holds input_ids and perhaps "
            f"attention_mask (for padded sequences) and domain"
        )
    input_ids_SL = _integers(tensors["input_ids"], f"{description}: input_ids")
    _check_ids(input_ids_SL, description, vocab_size)
    mask_SL = None
    if "attention_mask" in tensors:
        mask_SL = _integers(tensors["attention_mask"], f"{description}: attention_mask")
        _check_mask(mask_SL, input_ids_SL.shape, description)
        mask_SL = None if bool(mask_SL.all()) else mask_SL
    domain_S, named = _domains(
        tensors.get("domain"), domains, f"{description}: domain", len(input_ids_SL)
    )
    return Tokens(
        input_ids_SL=input_ids_SL,
        attention_mask_SL=mask_SL,
        domain_S=domain_S,
        domains=named,
        digest=_digest(input_ids_SL, mask_SL, domain_S, named),
        description=description,
    )


def from_file(
    path: Path, *, vocab_size: int | None = None, domains: Sequence[str] | None = None
) -> Tokens:
    """Read a token file and check it.

    Parameters
    ----------
    path
        The file.
    vocab_size
        Rows of the embedding, if it is known.
    domains
        Names of its domains; None for those in its metadata.

    Raises
    ------
    UsageError
        The file is missing, is not safetensors, or does not hold usable tokens.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = (file.metadata() or {}).get("domains")
    except SafetensorError as error:
        raise UsageError(f"{path}: not a whole safetensors file ({error})") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    if domains is None and names is not None:
        domains = _names(names, path)
    return from_tensors(tensors, description=str(path), vocab_size=vocab_size, domains=domains)


def joined(
    parts: Mapping[str, Tokens], *, description: str, vocab_size: int | None = None
) -> Tokens:
    """Return the sequences of several token sets as one, each set a domain.

    Domains are spread evenly: every stretch of the sequences has them in their
    proportions, so that each batch and each sample of tokens is of all of them.

    Parameters
    ----------
    parts
        By the name of the domain; of one sequence length.
    description
        Where they are from.
    vocab_size
        Rows of the embedding, if it is known.

    Raises
    ------
    UsageError
        Their sequences differ in length.
    """
    lengths = {tokens.sequence_length: name for name, tokens in parts.items()}
    if len(lengths) > 1:
        told = ", ".join(f"{name} of {length}" for length, name in sorted(lengths.items()))
        raise UsageError(f"{description}: sequences differ in length ({told} tokens)")
    place = [
        ((row + 0.5) / tokens.num_sequences, number, row)
        for number, tokens in enumerate(parts.values())
        for row in range(tokens.num_sequences)
    ]
    sets = list(parts.values())
    order = [(number, row) for _, number, row in sorted(place)]
    tensors = {
        "input_ids": torch.stack([sets[number].input_ids_SL[row] for number, row in order]),
        "domain": torch.tensor([number for number, _ in order]),
    }
    if any(tokens.attention_mask_SL is not None for tokens in sets):
        tensors["attention_mask"] = torch.stack(
            [_mask_of(sets[number])[row] for number, row in order]
        )
    return from_tensors(
        tensors, description=description, vocab_size=vocab_size, domains=list(parts)
    )


def first(tokens: Tokens, sequences: int, *, description: str) -> Tokens:
    """Return the first sequences of a token set.

    Raises
    ------
    UsageError
        There are not as many.
    """
    if sequences > tokens.num_sequences:
        raise UsageError(
            f"{description}: it has {tokens.num_sequences} sequences, "
            f"{sequences} were asked for"
        )
    kept = {name: tensor[:sequences] for name, tensor in tokens.tensors().items()}
    return from_tensors(kept, description=description, domains=tokens.domains)


def mask_without_next(tokens: Tokens) -> Tokens:
    """Mask tokens that have no next token.

    The digest is unchanged, since it is the same calibration set.
    """
    mask_SL = _mask_of(tokens)
    followed_SL = torch.zeros_like(mask_SL)
    followed_SL[:, :-1] = mask_SL[:, :-1] * mask_SL[:, 1:]
    return replace(tokens, attention_mask_SL=followed_SL)


def _mask_of(tokens: Tokens) -> Tensor:
    mask_SL = tokens.attention_mask_SL
    return torch.ones_like(tokens.input_ids_SL) if mask_SL is None else mask_SL


def _domains(
    domain_S: Tensor | None, names: Sequence[str] | None, where: str, sequences: int
) -> tuple[Tensor, tuple[str, ...]]:
    """Check domains; return their numbers, and names of those that have sequences."""
    if domain_S is None:
        return torch.zeros(sequences, dtype=torch.int64), (ONE_DOMAIN,)
    if domain_S.dtype.is_floating_point or domain_S.dtype.is_complex:
        raise UsageError(f"{where} is of type {_name(domain_S.dtype)}, not of integers")
    if domain_S.shape != (sequences,):
        raise UsageError(
            f"{where} has shape {tuple(domain_S.shape)}, not one number for each of "
            f"{sequences} sequences"
        )
    known = len(names) if names is not None else int(domain_S.max()) + 1
    if int(domain_S.min()) < 0 or int(domain_S.max()) >= known:
        raise UsageError(f"{where} holds numbers without a name; there are {known} domains")
    used, domain_S = torch.unique(domain_S.to(torch.int64), return_inverse=True)
    named = [str(number) if names is None else names[number] for number in used.tolist()]
    return domain_S, tuple(named)


def _names(text: str, path: Path) -> list[str]:
    try:
        names = parse_json(text)
    except ValueError:
        names = None
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise UsageError(f"{path}: its metadata has no list of names under domains")
    return names


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


def _digest(
    input_ids_SL: Tensor, mask_SL: Tensor | None, domain_S: Tensor, domains: tuple[str, ...]
) -> str:
    digest = hashlib.sha256(repr((tuple(input_ids_SL.shape), mask_SL is not None)).encode())
    told = (mask_SL, domain_S if len(domains) > 1 else None)
    for tensor in (input_ids_SL, *(each for each in told if each is not None)):
        values: Any = tensor.numpy().astype("<i8", copy=False)
        digest.update(values)
    if len(domains) > 1:
        digest.update(json.dumps(domains).encode())
    return digest.hexdigest()
