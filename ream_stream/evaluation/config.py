"""What an evaluation and a comparison can be asked for."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ream_stream.calibration.config import CalibrationOptions
from ream_stream.compression.config import MachineOptions, RunOptions
from ream_stream.settings import Method, option, same_option
from ream_stream.units import parse_shares


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(MachineOptions):
    """Options of an evaluation: its text and its method."""

    text: tuple[str, ...] = option(
        "Text",
        "What --calibration takes; NAME=SOURCE for each domain of several.",
        default=(),
        metavar="SOURCE",
    )
    questions: tuple[Path, ...] = option(
        "Text",
        "Multiple-choice questions, JSON lines of question, choices and answer.",
        default=(),
        metavar="FILE",
        exists=True,
    )
    text_field: str = same_option(CalibrationOptions, "text_field", section="Text")
    sequence_length: int = same_option(
        CalibrationOptions,
        "sequence_length",
        section="Text",
        help="Tokens of a sequence, and of a question at most.",
    )
    max_tokens: int | None = option("Text", "Take no more of each.", least=2, otherwise="all")
    against: Path | None = option(
        "Text", "Compare with this checkpoint.", metavar="OTHER", exists=True
    )
    layers: bool = option(
        "Text",
        "With --against: how far each layer's output is from the original's.",
        default=False,
    )
    work_dir: Path | None = same_option(
        RunOptions,
        "work_dir",
        help="Where hidden states go, and an interrupted evaluation goes on.",
        otherwise="the system's temporary folder, which is removed",
    )


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(CalibrationOptions, MachineOptions):
    """Options of a comparison: its variants and its text."""

    experts: int | None = same_option(RunOptions, "experts", section="Comparison")
    keep: tuple[Fraction, ...] | None = option(
        "Comparison",
        "The same as a share, or as several (50%,75%,90%): then loss against size is drawn.",
        parse=parse_shares,
        metavar="PERCENTS",
    )
    methods: str = option(
        "Comparison",
        "Names or sets (methods, best, ablation, controls, refit), separated by commas.",
        default="methods",
    )
    seeds: int = option(
        "Comparison",
        "Runs of each, with seeds from --seed on: other documents, other draws.",
        default=3,
        least=1,
    )
    group_size: int | None = same_option(
        Method, "group_size", section="Comparison", default=None
    )
    text: tuple[str, ...] = same_option(
        ScoreOptions,
        "text",
        section="Comparison",
        help="What is predicted, as in eval: NAME=SOURCE for each domain.",
        required=True,
    )
    max_tokens: int | None = same_option(ScoreOptions, "max_tokens", section="Comparison")
    threads: int | None = same_option(RunOptions, "threads")
