"""From documents to full sequences of tokens, with the checkpoint's own tokenizer."""

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ream_stream.errors import UsageError

from .chat_templates import ChatRenderer
from .datasets import open_documents
from .mix import Part, shares
from .text import in_seeded_order
from .tokens import Tokens, first, from_file, from_tensors, joined

_PART = 1 << 16  # characters: a tokenizer needs some hundred bytes for each while it works
_TOKENIZER_FILES = frozenset({".json", ".model", ".txt", ".jinja", ".tiktoken", ".spm"})
_TOKENIZER_BYTES = 100_000_000
_MORE_TEMPLATES = "additional_chat_templates"
_PASS_TOKENS = "pass a safetensors file with input_ids as --calibration instead of text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Requested calibration set; for a single token file only `parts` counts."""

    parts: tuple[Part, ...]
    """Texts and token files; each is a domain if there are several."""

    text_field: str = "text"
    """Field of a record that holds the text."""

    num_sequences: int | None
    """Number of sequences to fill; None for all there are."""

    at_most: bool = False
    """Whether fewer are taken where there are no more."""

    sequence_length: int
    """Tokens of a sequence."""

    seed: int = 0
    """Seed of the order of the documents."""

    min_characters: int = 0
    """Fewest characters of a document; shorter documents are left out."""


def read_tokens(
    calibration: Calibration, checkpoint: Path, *, vocab_size: int | None = None
) -> Tokens:
    """Make the tokens of a mix, with the tokenizer in `checkpoint` for what is text.

    Raises
    ------
    UsageError
        There are no such tokens: the message says why and what to do.
    """
    parts = calibration.parts
    if len(parts) == 1 and parts[0].is_tokens:
        return from_file(Path(parts[0].source), vocab_size=vocab_size)
    tokenizer = None if all(part.is_tokens for part in parts) else load_tokenizer(checkpoint)
    render = None if tokenizer is None else ChatRenderer(tokenizer)

    def made(part: Part, count: int | None) -> Tokens:
        if tokenizer is None or part.is_tokens:
            tokens = from_file(Path(part.source), vocab_size=vocab_size)
            most = tokens.num_sequences
            wanted = count or most
            if may_lack:
                wanted = min(wanted, most)
            return first(tokens, wanted, description=part.source)
        documents = open_documents(
            part,
            field=calibration.text_field,
            min_characters=calibration.min_characters,
            render=render,
        )
        ordered = in_seeded_order(documents, calibration.seed)
        length = calibration.sequence_length
        known: dict[str, Any] = {"description": part.source, "vocab_size": vocab_size}
        if count is None or may_lack:
            limit = None if count is None else count * length
            return pack_up_to(
                ordered, tokenizer, max_tokens=limit, sequence_length=length, **known
            )
        return pack(ordered, tokenizer, num_sequences=count, sequence_length=length, **known)

    number, may_lack = calibration.num_sequences, calibration.at_most
    counts = [None] * len(parts) if number is None else shares(parts, number)
    made_of = {p.name: made(p, count) for p, count in zip(parts, counts, strict=True)}
    if len(parts) == 1:
        return made_of[parts[0].name]
    if number is None or may_lack:
        made_of = _balanced(parts, made_of)
    described = ", ".join(part.source for part in parts)
    return joined(made_of, description=described, vocab_size=vocab_size)


def _balanced(parts: Sequence[Part], made_of: Mapping[str, Tokens]) -> dict[str, Tokens]:
    """Return as many sequences of each part as there are in the shares of the mix."""
    weights = sum(part.weight for part in parts)
    there = [made_of[part.name].num_sequences for part in parts]
    total = min(
        sum(there),
        *(int(n * weights / part.weight) for part, n in zip(parts, there, strict=True)),
    )
    counts = shares(parts, total)
    while any(count > n for count, n in zip(counts, there, strict=True)):
        total -= 1
        counts = shares(parts, total)
    return {
        part.name: first(made_of[part.name], count, description=part.source)
        for part, count in zip(parts, counts, strict=True)
    }


def _is_plain(path: Path) -> bool:
    """Tell whether a file can be read to its end: no device, no pipe, not endless."""
    return path.is_dir() or (path.is_file() and path.stat().st_size <= _TOKENIZER_BYTES)


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer; its Python files, if it has any, are not run.

    Raises
    ------
    UsageError
        There is none that can be loaded.
    """
    templates = checkpoint / _MORE_TEMPLATES
    more = templates.iterdir() if templates.is_dir() else ()
    for path in sorted([*checkpoint.iterdir(), *more]):
        if path.suffix in _TOKENIZER_FILES and not _is_plain(path):
            raise UsageError(
                f"{path}: not a file of at most {_TOKENIZER_BYTES} bytes; {_PASS_TOKENS}"
            )
    with _refused(checkpoint, "be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint, trust_remote_code=False, local_files_only=True
        )
        # what models of images and text had before there was a file for the template alone
        older = checkpoint / "chat_template.json"
        if not tokenizer.chat_template and older.is_file():
            tokenizer.chat_template = json.loads(older.read_bytes())["chat_template"]
    # transformers 5.23 makes an empty tokenizer of the model's class where there are no files
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise UsageError(f"{checkpoint}: there is no tokenizer in it; {_PASS_TOKENS}")
    return tokenizer


def encoded(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Return the tokens of a text.

    Raises
    ------
    UsageError
        The tokenizer fails on it.
    """
    with _refused(Path(tokenizer.name_or_path), "encode the text"):
        ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)[
            "input_ids"
        ]
    return ids


@contextmanager
def _refused(checkpoint: Path, what: str) -> Iterator[None]:
    """Make a refusal of what a tokenizer raises: anything, of any kind."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # bare Exceptions, and panics of Rust, which are not even that
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{checkpoint}: its tokenizer cannot {what} ({reason}); {_PASS_TOKENS}"
        ) from error


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    sequence_length: int,
    description: str,
    vocab_size: int | None = None,
) -> Tokens:
    """Fill sequences with documents one after another, without padding.

    Each document ends with the tokenizer's end-of-text token, if it has one, and starts
    with its beginning-of-text token where the tokenizer itself would put it. No more
    documents are taken from `documents` than are needed.

    Raises
    ------
    UsageError
        The documents are too short, or have tokens that the checkpoint does not know.
    """
    ids = _ids(documents, tokenizer, num_sequences * sequence_length)
    if len(ids) < num_sequences * sequence_length:
        raise UsageError(_too_short(description, len(ids), num_sequences, sequence_length))
    return _cut(ids, num_sequences, sequence_length, description, vocab_size)


def pack_up_to(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None,
    sequence_length: int,
    description: str,
    vocab_size: int | None = None,
) -> Tokens:
    """Fill as many whole sequences as there is text for, `max_tokens` tokens at most.

    Documents are joined as `pack` does it; None takes all of them.

    Raises
    ------
    UsageError
        They do not fill one sequence, or have tokens that the checkpoint does not know.
    """
    ids = _ids(documents, tokenizer, max_tokens)
    found = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    if found < sequence_length:
        raise UsageError(
            f"{description}: {found} tokens do not fill a sequence of {sequence_length}"
        )
    return _cut(ids, found // sequence_length, sequence_length, description, vocab_size)


def _ids(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> "array[int]":
    """Return the tokens of the documents, at least as many as wanted if there are."""
    ids = array("q")
    for part in _token_parts(documents, tokenizer):
        ids.extend(part)
        if wanted is not None and len(ids) >= wanted:
            break
    return ids


def _cut(
    ids: "array[int]",
    num_sequences: int,
    sequence_length: int,
    description: str,
    vocab_size: int | None,
) -> Tokens:
    wanted = num_sequences * sequence_length
    input_ids_SL = torch.frombuffer(ids, dtype=torch.int64, count=wanted)
    return from_tensors(
        {"input_ids": input_ids_SL.view(num_sequences, sequence_length).clone()},
        description=description,
        vocab_size=vocab_size,
    )


def _token_parts(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts_itself = start is not None and encoded(tokenizer, "")[:1] == [start]
    for document in documents:
        last: list[int] = []
        for offset in range(0, len(document), _PART):
            part = document[offset : offset + _PART]
            ids = encoded(tokenizer, part, add_special_tokens=False)
            # a chat template may have put either token itself
            if starts_itself and offset == 0 and ids[:1] != [start]:
                yield [start]
            yield ids
            last = ids
        if end is not None and last[-1:] != [end]:
            yield [end]


def _too_short(description: str, found: int, num_sequences: int, sequence_length: int) -> str:
    if found >= sequence_length:
        fits = f"use --sequences {found // sequence_length}, or a longer text"
    elif found >= num_sequences:
        fits = f"use --sequence-length {found // num_sequences}, or a longer text"
    else:
        fits = "use a longer text"
    return (
        f"{description}: it has {found} tokens, and {num_sequences * sequence_length} were "
        f"asked for ({num_sequences} sequences of {sequence_length}); {fits}"
    )
