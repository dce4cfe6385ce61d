"""How many experts stay where a size is given: the most that it has room for.

What an output takes grows by the same bytes with each expert of a width, so the number is
solved from the plan of one number, and the plan of the result is looked at once more.
"""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import floor, lcm

from ream_stream.errors import UsageError
from ream_stream.planning.plan import Plan
from ream_stream.planning.serving_rules import DIVISOR
from ream_stream.planning.size_target import SizeTarget
from ream_stream.planning.slice_shape import MOST_EXPERTS, ExpertLayer
from ream_stream.settings import Method
from ream_stream.units import format_size, size_option

from .config import RunOptions
from .method_settings import method_for


def target_of(options: RunOptions) -> SizeTarget | None:
    """Return the size that was asked for; None if experts or their share were."""
    if options.fits is not None:
        return SizeTarget(
            option="--fits",
            num_bytes=options.fits,
            serves=True,
            context=options.context,
            bits=options.bits,
        )
    if options.target_size is not None:
        return SizeTarget(option="--target-size", num_bytes=options.target_size)
    return None


def largest_plan(
    options: RunOptions,
    layer: ExpertLayer,
    target: SizeTarget,
    plan_of: Callable[[RunOptions], Plan],
) -> Plan:
    """Return the plan of the largest output that a target has room for.

    The number of experts is rounded down to one that servers accept, with ``--any-count`` to
    a whole one.

    Parameters
    ----------
    options, layer, target
        What was asked for, experts of a source layer, and the size.
    plan_of
        Makes the plan of options that give a number of experts.

    Raises
    ------
    UsageError
        The target has no room for any number of experts, or for all of them.
    """
    least = replace(options, keep=Fraction(1), target_size=None, fits=None)
    plan = plan_of(_with_share(least, layer, Fraction(1)))
    share = target.share(plan)
    if share >= 1:
        raise UsageError(
            f"{target.option} {size_option(target.num_bytes)} has room for the whole model, "
            f"which takes {format_size(target.needed(plan))}: nothing is to be dropped"
        )
    asked = _with_share(least, layer, max(share, Fraction(0)))
    tried: dict[int, Plan] = {}
    while asked.experts and asked.experts not in tried:
        plan = tried[asked.experts] = plan_of(asked)
        room = Fraction(target.num_bytes - target.needed(plan)) / target.expert_bytes(plan)
        method = method_for(asked, layer)
        asked = replace(asked, experts=_most(asked, layer, method, asked.experts + floor(room)))
    fitting = [n for n, found in tried.items() if target.needed(found) <= target.num_bytes]
    if not fitting:
        one, cache = target.expert_bytes(plan), target.cache(plan)
        fixed = int(target.weights(plan) - one * plan.settings.experts)
        context = f", {format_size(cache)} of KV cache" if target.serves else ""
        raise UsageError(
            f"{target.option} {size_option(target.num_bytes)} has no room for as many experts "
            f"as a token is sent to and servers take: what is no routed expert takes "
            f"{format_size(fixed)}{context}, and an expert more in every layer "
            f"{format_size(float(one))}"
        )
    return tried[max(fitting)]


def _with_share(options: RunOptions, layer: ExpertLayer, share: Fraction) -> RunOptions:
    """Return options that keep at most a share of the neurons, by the experts' number."""
    # the width of slices follows from the share; there is none for nothing
    method = method_for(replace(options, keep=max(share, Fraction(1, layer.count))), layer)
    width = method.width or layer.inner // max(1, method.slices)
    room = floor(share * layer.count * layer.inner / width)
    cut = {"slices": method.slices, "width": width} if method.slices else {}
    return replace(
        options,
        keep=None,
        experts=_most(options, layer, method, room),
        changes={**options.changes, **cut},
    )


def _most(options: RunOptions, layer: ExpertLayer, method: Method, room: int) -> int:
    """Return the most up to `room` that router and servers take; 0 if there is none."""
    slices, groups = max(1, method.slices), layer.routing_groups
    most = layer.count * slices
    if slices > 1 and not options.any_count:
        most = min(most, MOST_EXPERTS)
    step = groups if options.any_count else lcm(DIVISOR, groups)
    found = most if room >= most else room // step * step
    return found if found >= layer.top_k * slices else 0
