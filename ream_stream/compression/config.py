"""What a compression can be asked for, and the settings it comes to for a source."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ream_stream.calibration.config import CalibrationOptions
from ream_stream.errors import UsageError
from ream_stream.planning.serving_limits import CONTEXT
from ream_stream.settings import (
    Method,
    Settings,
    check_values,
    flag_of,
    given_options,
    option,
    options_of,
)
from ream_stream.units import (
    parse_bits,
    parse_share,
    parse_size,
    parse_size_or_auto,
    parse_weights,
)

if TYPE_CHECKING:
    from ream_stream.checkpoint.hub import Remote

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ream": {"grouping": "ream", "saliency": "reap"},
    "reap": {"grouping": "none", "saliency": "reap"},
    "mc-smoe": {"grouping": "mc-smoe", "saliency": "frequency"},
    "hc-smoe": {"grouping": "hc-smoe", "saliency": "frequency"},
    "energy": {"grouping": "none", "saliency": "energy", "refit": "down"},
    "slices": {
        "grouping": "none",
        "saliency": "energy",
        "slices": 2,
        "refit": "down",
        "refit_target": "trajectory",
    },
}
"""Options that each ``--method`` sets; an explicit option takes precedence."""

AUTO = "auto"
"""Name of the method that `candidates` chooses."""

_HOW_MANY = ("experts", "keep", "target_size", "fits")
"""Options that say how many experts are kept; one of them is given."""


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Device, dtype and memory of the layers."""

    device: str = option("Machine", "auto, cpu, cuda or cuda:N.", default="auto")
    compute_dtype: str = option(
        "Machine",
        "What layers are run in; auto is float32 where bf16 is slow.",
        default="auto",
        choices=("auto", "checkpoint", "float32"),
    )
    ram: int | None = option(
        "Machine",
        "Host memory to stay within, such as 16GB; auto is 80% of what is free.",
        parse=parse_size_or_auto,
        metavar="SIZE",
        otherwise="auto",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(CalibrationOptions, MachineOptions):
    """Options of a run in addition to those of `Method` and `Settings`."""

    observes: ClassVar[bool] = False
    """Whether statistics are kept in place of a checkpoint."""

    source: Path
    """Checkpoint folder; with streaming the folder of its headers."""

    output: Path | None = None
    """Folder of the compressed checkpoint; None if the run is only planned."""

    remote: "Remote | None" = None
    """Repository on the hub that shards are streamed from; None without streaming."""

    experts: int | None = option("Experts", "Experts to keep in each MoE layer.", least=1)
    keep: Fraction | float | None = option(
        "Experts",
        "The same as a share, such as 75%; rounded to the nearest number that servers take.",
        parse=parse_share,
        metavar="PERCENT",
    )
    target_size: int | None = option(
        "Experts",
        "The same by the size of the output's weights, such as 40GB: as many as that has room "
        "for, rounded down to a number that servers take.",
        parse=parse_size,
        metavar="SIZE",
    )
    fits: int | None = option(
        "Experts",
        "The same by the memory of the machine that serves the output, such as 24GB: weights, "
        "and the KV cache of one sequence.",
        parse=parse_size,
        metavar="SIZE",
    )
    context: int | None = option(
        "Experts",
        "With --fits: tokens in the KV cache, of 16 bits a number.",
        least=1,
        otherwise=f"{CONTEXT}, or the model's longest if that is less",
    )
    bits: float | None = option(
        "Experts",
        "With --fits: bits a parameter, scales included, that the output is quantized to "
        "before it is served, such as 4.5.",
        parse=parse_bits,
        metavar="NUMBER",
        otherwise="as the output is written",
    )
    any_count: bool = option(
        "Experts",
        "Keep a number of experts too that is not a multiple of 4, which the kernels of some "
        "servers refuse.",
        default=False,
    )
    method: str | Method = option(
        "Method",
        "A known method: sets --grouping, --saliency, --slices and --refit. reap drops "
        "experts, energy does so and refits those that stay, slices cuts experts and drops "
        "parts of them, the others merge experts. auto is slices for --keep where the model "
        "and servers take them, else energy.",
        default=AUTO,
        choices=(AUTO, *PRESETS),
    )
    stream: bool = option(
        "Machine",
        "Fetch each shard of a SOURCE on the hub when a layer needs it, and delete it after: "
        "the disk never holds all of them.",
        default=False,
    )
    vram: int | None = option(
        "Machine",
        "GPU memory to stay within; auto is 90% of what is free. A size given to plan where "
        "there is no GPU plans for one.",
        parse=parse_size_or_auto,
        metavar="SIZE",
        otherwise="auto",
    )
    disk: int | None = option(
        "Machine",
        "What output and work folder may hold together; auto is what is free.",
        parse=parse_size_or_auto,
        metavar="SIZE",
        otherwise="auto",
    )
    threads: int | None = option(
        "Machine", "Processor threads to use.", least=1, otherwise="torch's own choice"
    )
    work_dir: Path | None = option(
        "Machine",
        "Where the journal and hidden states go.",
        metavar="DIR",
        otherwise="OUTPUT/.ream-stream",
    )
    statistics: Path | None = option(
        "Calibration",
        "Choose experts by these statistics, which observe kept of SOURCE, in place of running "
        "a text through it; nothing is refitted then.",
        metavar="DIR",
    )
    weights: tuple[tuple[str, float], ...] | None = option(
        "Calibration",
        "With --statistics: how much each domain counts, such as code=0.7,math=0.3; one that "
        "is not named does not.",
        parse=parse_weights,
        metavar="WEIGHTS",
        otherwise="as its share of the tokens",
    )
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Method` and `Settings` by name that override the options' values."""

    @classmethod
    def of(cls, **values: Any) -> Self:  # noqa: ANN401
        """Return the options that are given by name, those of `Method` and `Settings` too.

        They are read as `given_options` does.

        Raises
        ------
        UsageError
            There is no such option, or it takes no such value.
        """
        given = given_options(values, Method, Settings, cls)
        own = {field.name for field in fields(cls)}
        changes = {name: given.pop(name) for name in list(given) if name not in own}
        return cls(**given, changes=changes)


def check_usage(options: RunOptions) -> None:
    """Refuse what is wrong whatever the source is.

    Raises
    ------
    UsageError
        Values are wrong, options are missing or exclude each other, or would write to the
        source.
    """
    check_values(options)
    known = options_of(RunOptions)
    given = [flag_of(known[n]) for n in _HOW_MANY if getattr(options, n) is not None]
    _check_statistics(options)
    if len(given) != 1 and not options.observes:
        raise UsageError(
            f"{' and '.join(given)} say the same thing: give one of them"
            if given
            else "say how many experts to keep, by one of --keep 75%, --experts, --target-size "
            "40GB and --fits 24GB"
        )
    for name in ("context", "bits"):
        if options.fits is None and getattr(options, name) is not None:
            raise UsageError(f"--{name} has no effect without --fits; leave it out")
    if options.keep is not None and not 0 < options.keep <= 1:
        raise UsageError(f"--keep {float(100 * options.keep):g}%: there is 0% to 100%")
    source = options.source.resolve()
    for folder in (options.output, options.work_dir):
        if folder is not None and (target := folder.resolve()).is_relative_to(source):
            raise UsageError(f"{target} is in SOURCE, which is never written to")


def _check_statistics(options: RunOptions) -> None:
    """Refuse two sources of statistics, and weights without domains."""
    if options.statistics is not None and (options.calibration or options.mix):
        raise UsageError(
            "--statistics and --calibration exclude each other: the statistics are of the text "
            "that was observed"
        )
    if options.weights is not None and options.statistics is None:
        raise UsageError(
            "--weights has no effect without --statistics; of a calibration mix they are part "
            "of it (NAME=SOURCE:WEIGHT)"
        )
