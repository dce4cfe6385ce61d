"""Token sets: of text or from a file, and the one a run was begun with.

A calibration set is kept in the work folder with what it was made from. A run
that goes on uses it again, and is refused if the text or how it is cut differ:
that is known without making tokens of the text.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ream_stream import files
from ream_stream.errors import UsageError
from ream_stream.file_access import regular_size
from ream_stream.untrusted import parse_json

from .chat_templates import ChatRenderer
from .config import CalibrationOptions
from .datasets import digest_of, open_documents
from .mix import Part, parts_of
from .packing import Calibration, load_tokenizer, pack_up_to
from .tokens import Tokens, first, from_file, joined

_KEY = "request"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Key of a token set: the texts and the settings that make tokens of them."""

    texts: list[list[str | float | None]]
    """Name, SHA-256, weight and field of each part; a single part has no name."""

    text_field: str
    min_characters: int
    sequences: int | None
    sequence_length: int
    seed: int

    @classmethod
    def of(cls, wanted: Calibration) -> "Request":
        """Return the request that a calibration makes; reads its files for their digests."""
        several = len(wanted.parts) > 1
        return cls(
            texts=[
                [part.name if several else "", digest_of(part), part.weight, part.field]
                for part in wanted.parts
            ],
            text_field=wanted.text_field,
            min_characters=wanted.min_characters,
            sequences=None if wanted.at_most else wanted.num_sequences or 0,
            sequence_length=wanted.sequence_length,
            seed=wanted.seed,
        )


def calibration_of(options: CalibrationOptions) -> Calibration | None:
    """Return the calibration set of the options; None if they name no text."""
    parts = parts_of(options.calibration, mix=options.mix)
    if not parts:
        return None
    return Calibration(
        parts=parts,
        text_field=options.text_field,
        num_sequences=None if options.sequences == 0 else options.planned_sequences,
        at_most=options.sequences is None,
        sequence_length=options.sequence_length,
        seed=options.seed,
        min_characters=options.min_characters,
    )


def store(path: Path, tokens: Tokens, request: Request) -> None:
    """Write tokens, with what they were made from."""
    metadata = {**tokens.metadata(), _KEY: json.dumps(asdict(request))}
    files.write_tensors(path, tokens.tensors(), metadata=metadata)


def stored(path: Path, digest: str) -> Tokens | None:
    """Return stored tokens of this digest; None if they are not there whole.

    Raises
    ------
    OtherRunError
        There is something else than a regular file.
    """
    if regular_size(path) is None:
        return None
    try:
        tokens = from_file(path)
    except UsageError:
        return None
    return tokens if tokens.digest == digest else None


def changed(request: Request, path: Path) -> str | None:
    """Say what the tokens stored in `path` were made from differently; None if nothing."""
    try:
        with safe_open(path, framework="pt") as file:
            then = parse_json((file.metadata() or {})[_KEY], text=False)
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    now = asdict(request)
    if not isinstance(then, dict):
        return None
    names = [name for name in now if then.get(name) != now[name]]
    return f"other {', '.join(names)}" if names else None


def read_test_tokens(
    parts: Sequence[Part],
    checkpoint: Path,
    *,
    vocab_size: int | None,
    text_field: str,
    sequence_length: int,
    max_tokens: int | None,
) -> Tokens:
    """Read tokens to predict: token files, or texts in their own order, each a domain.

    `max_tokens` is of each.

    Raises
    ------
    UsageError
        There are none that can be used.
    """
    tokenizer = None if all(p.is_tokens for p in parts) else load_tokenizer(checkpoint)
    render = None if tokenizer is None else ChatRenderer(tokenizer)

    def made(part: Part) -> Tokens:
        if tokenizer is None or part.is_tokens:
            tokens = from_file(Path(part.source), vocab_size=vocab_size)
            if max_tokens is None:
                return tokens
            rows = max(1, max_tokens // tokens.sequence_length)
            return first(tokens, min(rows, tokens.num_sequences), description=part.source)
        documents = open_documents(part, field=text_field, render=render, split="test")
        return pack_up_to(
            (documents[number] for number in range(len(documents))),
            tokenizer,
            max_tokens=max_tokens,
            sequence_length=sequence_length,
            description=part.source,
            vocab_size=vocab_size,
        )

    tokens = {part.name: made(part) for part in parts}
    if len(parts) == 1:
        return tokens[parts[0].name]
    return joined(tokens, description=", ".join(part.source for part in parts))
