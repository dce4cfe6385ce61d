"""Token sets of the verbs: of text or from a file, and the one a run was begun with.

A calibration set is kept in the work folder with what it was made from. A run
that goes on uses it again, and is refused if the text or how it is cut differ:
that is known without making tokens of the text.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ream_stream import durable
from ream_stream.calibration.packing import (
    Calibration,
    load_tokenizer,
    pack_up_to,
    read_tokens,
)
from ream_stream.calibration.text import TextFile
from ream_stream.calibration.tokens import Tokens, from_file, from_tensors
from ream_stream.checkpoint.source import Checkpoint
from ream_stream.errors import UsageError

from .options import RunOptions

_KEY = "request"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a text is made into tokens by."""

    file: str
    """SHA-256 of the text file, hex."""

    text_field: str
    sequences: int
    sequence_length: int
    seed: int

    @classmethod
    def of(cls, options: RunOptions) -> "Request":
        """Return the request that the options make; reads the file once for its digest."""
        if options.calibration is None:
            raise ValueError("there is no calibration file")
        with options.calibration.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(
            file=digest,
            text_field=options.text_field,
            sequences=options.sequences,
            sequence_length=options.sequence_length,
            seed=options.seed,
        )


def is_token_file(path: Path) -> bool:
    """Tell whether a calibration file holds token ids."""
    return path.suffix.lower() == ".safetensors"


def read(options: RunOptions, *, vocab_size: int | None) -> Tokens:
    """Read the calibration file as tokens, with the source's tokenizer."""
    if options.calibration is None:
        raise ValueError("there is no calibration file")
    wanted = Calibration(
        path=options.calibration,
        text_field=options.text_field,
        num_sequences=options.sequences,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )
    return read_tokens(wanted, options.source, vocab_size=vocab_size)


def store(path: Path, tokens: Tokens, request: Request) -> None:
    """Write tokens, with what they were made from."""
    metadata = {**tokens.metadata(), _KEY: json.dumps(asdict(request))}
    durable.write_tensors(path, tokens.tensors(), metadata=metadata)


def stored(path: Path, digest: str) -> Tokens | None:
    """Return stored tokens of this digest; None if they are not there whole."""
    try:
        tokens = from_file(path)
    except UsageError:
        return None
    return tokens if tokens.digest == digest else None


def changed(request: Request, path: Path) -> str | None:
    """Say what the tokens stored in `path` were made from differently; None if nothing."""
    try:
        with safe_open(path, framework="pt") as file:
            then = json.loads((file.metadata() or {})[_KEY])
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    now = asdict(request)
    names = [name for name in now if then.get(name) != now[name]]
    return f"other {', '.join(names)}" if names else None


def read_test_tokens(
    path: Path,
    checkpoint: Checkpoint,
    *,
    text_field: str,
    sequence_length: int,
    max_tokens: int | None,
) -> Tokens:
    """Read tokens to predict: a token file, or a text in its own order.

    Raises
    ------
    UsageError
        There are none that can be used.
    """
    vocab_size = checkpoint.config.get("vocab_size")
    if not is_token_file(path):
        documents = TextFile(path, field=text_field)
        return pack_up_to(
            (documents[number] for number in range(len(documents))),
            load_tokenizer(checkpoint.folder),
            max_tokens=max_tokens,
            sequence_length=sequence_length,
            description=str(path),
            vocab_size=vocab_size,
        )
    tokens = from_file(path, vocab_size=vocab_size)
    if max_tokens is None:
        return tokens
    rows = max(1, max_tokens // tokens.sequence_length)
    kept = {name: tensor[:rows] for name, tensor in tokens.tensors().items()}
    return from_tensors(kept, description=tokens.description, vocab_size=vocab_size)
