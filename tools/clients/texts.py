"""Tokens of the packaged texts: those that outputs are calibrated on, and those scored."""

from pathlib import Path

from ream_stream import files
from ream_stream.calibration.builtin import DOMAINS, documents
from ream_stream.calibration.packing import load_tokenizer, pack
from ream_stream.calibration.tokens import Tokens, joined
from ream_stream.cli.demo import CHECKPOINT

CALIBRATED, SCORED, LENGTH = 12, 4, 128
"""Sequences of each domain to calibrate on and to score, and tokens of each."""

PROMPTS = [[5, 80, 300, 41], [900, 17, 33]]
"""Tokens to go on from greedily."""


def _packed(part: str, sequences: int) -> Tokens:
    tokenizer = load_tokenizer(CHECKPOINT)
    sets = {
        domain: pack(
            documents(domain, part),
            tokenizer,
            num_sequences=sequences,
            sequence_length=LENGTH,
            description=domain,
        )
        for domain in DOMAINS
    }
    return joined(sets, description="packaged texts")


def calibration_tokens(path: Path) -> Path:
    """Write the calibration set, unless it is there; return its path."""
    if not path.exists():
        mix = _packed("calibration", CALIBRATED)
        files.write_tensors(path, mix.tensors(), metadata=mix.metadata())
    return path


def scored_tokens(path: Path) -> list[list[int]]:
    """Write the sequences to score, as one domain; return them."""
    ids_SL = _packed("test", SCORED).input_ids_SL
    files.write_tensors(path, {"input_ids": ids_SL})
    rows: list[list[int]] = ids_SL.tolist()
    return rows
