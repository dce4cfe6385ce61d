"""The settings that options come to for a source: the method, and how much stays."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

from ream_stream.errors import UsageError
from ream_stream.planning.serving_limits import served_count
from ream_stream.planning.slice_shape import ExpertLayer, slice_width
from ream_stream.settings import Method, Settings, check_idle, flag_of, options_of

from .config import AUTO, PRESETS, RunOptions

_OF_ANY = frozenset(
    {
        *("slices", "width"),
        *("refit", "refit_experts", "refit_target", "refit_iterations", "refit_lambda"),
    }
)
"""Options of `Method` that have a meaning whatever ``--method auto`` chooses."""

_MANY_EXPERTS = 512


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
    if options.statistics is None and "refit_target" not in options.changes:
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
        if options.statistics is not None:  # which hold no activations to refit to
            method = replace(method, refit=Method().refit, refit_target=Method().refit_target)
    method = replace(method, **changed)
    return _cut(options, layer, method, chosen="slices" in changed or method.slices == 1)


def _of_method(options: RunOptions) -> dict[str, Any]:
    """Return the changes that are fields of `Method`."""
    names = options_of(Method)
    return {name: value for name, value in options.changes.items() if name in names}


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
