"""How wide slices of experts are, and how many: from what formats and servers take.

Rule for a width that was not given. Of the widths that the format and the config can tell,
multiples of the largest power of two up to a twelfth of an expert's width and 128, the one
nearest to `_CAPPED` of an even cut: the widest expert then loses its least important neurons
too, and more slices of that width stay. docs/concepts/method.md has what was measured.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from ream_stream.errors import UsageError

MOST_EXPERTS = 512
"""Most experts of a layer that llama.cpp takes."""

MOST_TOP_K = 32
"""Most experts of a token that TensorRT-LLM takes."""

_CAPPED = {True: Fraction(7, 8), False: Fraction(3, 4)}
"""Width of a slice in shares of an even cut, where more than five eighths are kept or less."""

_MUCH = Fraction(5, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayer:
    """Numbers of a source layer that decide which slices there can be."""

    count: int
    """Number of experts."""

    inner: int
    """Inner width of an expert."""

    top_k: int = 1
    """Number of experts that a token is routed to."""

    multiple: int = 1
    """Divisor of the widths that the storage format takes."""

    shared: int = 0
    """Width of shared experts that is told as a multiple of the experts'; otherwise 0."""

    routing_groups: int = 1
    """Number of expert groups in the router; 1 without groups."""


def slice_width(layer: ExpertLayer, slices: int, share: Fraction, *, any_count: bool) -> int:
    """Return the width of slices of which a share of a layer's neurons stay.

    Parameters
    ----------
    layer
        Source layer.
    slices
        Slices of an expert.
    share
        Share of the neurons that stay.
    any_count
        Whether more experts may come out than all servers take.

    Raises
    ------
    UsageError
        There is no such width: one sentence with what stands in the way.
    """
    most = layer.inner // slices
    if share == 1 and layer.inner % slices == 0:
        return most
    step = 1
    while 2 * step <= min(128, layer.inner // 12):
        step *= 2
    step = lcm(step, layer.multiple)
    widths = set(range(step, most + 1, step))
    if layer.inner % slices == 0 and (
        most % layer.multiple == 0 or layer.inner % layer.multiple
    ):
        widths.add(most)
    fitting = [
        width
        for width in sorted(widths, reverse=True)
        if not layer.shared % width and _fits(layer, slices, width, share, any_count=any_count)
    ]
    if not fitting:
        raise UsageError(
            f"--slices {slices}: no width of slices gives {float(100 * share):g}% of "
            f"{layer.count} experts of {layer.inner} neurons with at most {MOST_EXPERTS} "
            f"experts and {MOST_TOP_K} of them a token, which is what servers take; use "
            "--slices 1, give --width, or --any-count"
        )
    ideal = _CAPPED[share > _MUCH] * layer.inner / slices
    nearest: int = min(fitting, key=lambda width: abs(width - ideal))
    return nearest


def _fits(
    layer: ExpertLayer, slices: int, width: int, share: Fraction, *, any_count: bool
) -> bool:
    count = share * layer.count * layer.inner / width
    if count > layer.count * slices:
        return False
    return any_count or (count <= MOST_EXPERTS and layer.top_k * slices <= MOST_TOP_K)
