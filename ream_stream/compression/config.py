"""What a compression can be asked for, and the settings it comes to for a source."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ream_stream.calibration.config import CalibrationOptions
from ream_stream.errors import UsageError
from ream_stream.planning.serving_limits import CONTEXT, served_count
from ream_stream.planning.slice_shape import ExpertLayer, slice_width
from ream_stream.settings import (
    Method,
    Settings,
    check_idle,
    check_values,
    flag_of,
    given_options,
    option,
    options_of,
)
from ream_stream.units import parse_bits, parse_share, parse_size, parse_size_or_auto

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

_OF_ANY = frozenset(
    {
        *("slices", "width"),
        *("refit", "refit_experts", "refit_target", "refit_iterations", "refit_lambda"),
    }
)
"""Options of `Method` that have a meaning whatever ``--method auto`` chooses."""

_MANY_EXPERTS = 512

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


def candidates(options: RunOptions) -> list[tuple[RunOptions, str]]:
    """Return what ``--method auto`` may be, the first that works, with the reason for each.

    The rule follows from docs/concepts/method.md: slices lost least in all that was measured,
    with the original model's trajectory as target; whole experts lost least by energy,
    refitted. Any other method is its own only candidate.

    Raises
    ------
    UsageError
        A part of a method is to be changed, and no method is named.
    """
    if options.method != AUTO:
        return [(options, "")]
    known, usual = options_of(Method), Method()
    for name in options.changes.keys() & {*known} - _OF_ANY:
        given = "otherwise" in known[name].metadata
        if given or options.changes[name] != getattr(usual, name):
            flag = flag_of(known[name])
            raise UsageError(f"{flag} changes a part of a method: say of which with --method")
    by_energy = replace(options, method="energy")
    if options.experts is not None:
        return [(by_energy, "whole experts lose least by it, refitted")]
    cut = [replace(options, method="slices")]
    if "refit_target" not in options.changes:
        cut.append(replace(cut[0], changes={**options.changes, "refit_target": "layer"}))
    least = "it lost least in all that was measured"
    return [*((each, least) for each in cut), (by_energy, "the experts cannot be cut")]


def settings_for(
    options: RunOptions,
    layer: ExpertLayer,
    *,
    compute_dtype: str,
    device_kind: str,
) -> Settings:
    """Return the settings that the options come to for a source.

    Parameters
    ----------
    options
        What was asked for.
    layer
        Experts of a source layer.
    compute_dtype, device_kind
        What ``--compute-dtype`` and ``--device`` mean on this machine.
    """
    method, changed = method_for(options, layer), _of_method(options)
    experts = kept_experts(options, layer, method)
    if isinstance(options.method, str) and "group_size" not in changed:
        method = replace(method, group_size=default_group_size(experts, layer.count))
    check_idle(method, changed)
    return Settings(
        experts=experts,
        method=method,
        compute_dtype=compute_dtype,
        seed=options.seed,
        device_kind=device_kind,
        **{name: value for name, value in options.changes.items() if name not in changed},
    )


def method_for(options: RunOptions, layer: ExpertLayer) -> Method:
    """Return the method of the options for a source, with the width of slices if it has any.

    Raises
    ------
    UsageError
        Experts cannot be cut so.
    """
    changed, method = _of_method(options), options.method
    if isinstance(method, str):
        method = replace(Method(), **PRESETS[method])
    method = replace(method, **changed)
    return _cut(options, layer, method, chosen="slices" in changed or method.slices == 1)


def _of_method(options: RunOptions) -> dict[str, Any]:
    """Return the changes that are fields of `Method`."""
    names = options_of(Method)
    return {name: value for name, value in options.changes.items() if name in names}


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
    if len(given) != 1:
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


def _cut(options: RunOptions, layer: ExpertLayer, method: Method, *, chosen: bool) -> Method:
    """Return the method with the width of its slices; None is an even cut.

    Unless the number of slices was `chosen`, it is 1 where servers do not take more.
    """
    if method.width is not None and not method.slices:
        method = replace(method, slices=1)
    if not method.slices:
        return method
    if method.width is None and options.keep is not None:
        share = Fraction(str(options.keep))
        try:
            width = slice_width(layer, method.slices, share, any_count=options.any_count)
        except UsageError:
            if chosen:
                raise
            narrowed = _cut(options, layer, replace(method, slices=1), chosen=True)
            if narrowed.width is None:  # whole experts would be dropped, as other methods do
                raise
            return narrowed
        method = replace(method, width=width)
    if method.width is None and options.experts is not None:
        raise UsageError(
            f"--experts {options.experts}: experts are cut, so say how wide they become too "
            "(--width), or give --keep, a share of their neurons"
        )
    if method.width is None and layer.inner % method.slices:
        raise UsageError(
            f"--slices {method.slices}: an expert has {layer.inner} neurons, which are not so "
            "many equal slices; give --width"
        )
    even = method.width is not None and method.width * method.slices == layer.inner
    return replace(method, width=None) if even else method


def kept_experts(options: RunOptions, layer: ExpertLayer, method: Method) -> int:
    """Return the number of experts that a layer of the output has.

    A share is of neurons if experts are cut. It is rounded to the nearest number that servers
    accept, with ``--any-count`` down.

    Raises
    ------
    UsageError
        The share is less than one expert, or no such number is near.
    """
    if options.keep is None:
        return options.experts or 0
    # as it is written: the number 0.29 is less than 29/100
    share = Fraction(str(options.keep))
    most = layer.count
    if method.slices:
        width = method.width or layer.inner // method.slices
        share, most = share * layer.inner / width, layer.count * method.slices
    if not options.any_count:
        return served_count(share, layer.count, layer.routing_groups, most)
    experts = min(most, int(share * layer.count))
    if experts < 1:
        raise UsageError(
            f"--keep {float(100 * options.keep):g}%: of {layer.count} experts that is none"
        )
    return experts


def default_group_size(experts: int, num_experts: int) -> int:
    """Return the paper's C: 16, or 32 for very many experts or where half of them go."""
    many = num_experts >= _MANY_EXPERTS or 2 * experts <= num_experts
    return 32 if many else Method().group_size
