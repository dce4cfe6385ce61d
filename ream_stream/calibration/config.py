"""What the model is run on, as it can be asked for."""

from dataclasses import dataclass

from ream_stream.settings import Settings, option, same_option
from ream_stream.units import parse_count_or_all

from .mix import MIXES

MOST_SEQUENCES = 3072
"""Sequences that are taken of a longer text, unless their number is given."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Texts, and how sequences are made of them."""

    calibration: tuple[str, ...] = option(
        "Calibration",
        "Text, records (.jsonl, .json, .csv, .parquet), a folder, tokens (.safetensors) or a "
        "data set (hf:OWNER/NAME/PATTERN); to try things out builtin:general, builtin:code or "
        "builtin:math. A mix of several: NAME=SOURCE:WEIGHT for each, or a "
        ".yaml file.",
        default=(),
        metavar="SOURCE",
        required=True,
    )
    mix: str | None = option(
        "Calibration",
        "One of the paper's mixes: weights of sources called general, math and code.",
        choices=tuple(MIXES),
    )
    text_field: str = option(
        "Calibration",
        "Field of each record that holds the text, or the messages of a chat.",
        default="text",
    )
    min_characters: int = option(
        "Calibration", "Leave out shorter documents.", default=0, least=0
    )
    sequences: int | None = option(
        "Calibration",
        "Sequences to fill with text: there must be as many, or all of it.",
        least=0,
        parse=parse_count_or_all,
        metavar="NUMBER",
        otherwise=f"as many as there are, {MOST_SEQUENCES} at most",
    )
    sequence_length: int = option("Calibration", "Tokens of each.", default=512, least=2)
    seed: int = same_option(Settings, "seed")

    @property
    def planned_sequences(self) -> int:
        """Sequences that a plan counts with before the text was read."""
        return self.sequences or MOST_SEQUENCES
