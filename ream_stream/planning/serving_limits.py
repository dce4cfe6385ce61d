"""Counts of experts that are refused, or rounded, since servers do not take them.

A checkpoint with another number is whole and loads in transformers: the fast kernels of
servers do not take it, and some of them have no others.
"""

from fractions import Fraction
from math import lcm

from ream_stream.errors import UsageError

from .serving_rules import DIVISOR
from .slice_shape import MOST_EXPERTS, MOST_TOP_K

CONTEXT = 32_768
"""Tokens in the cache of a served model, unless their number is given."""


def check_served(experts: int, num_experts: int, routing_groups: int, top_k: int = 1) -> None:
    """Refuse to keep a number of experts that the routing kernels of some servers refuse.

    Parameters
    ----------
    experts
        Experts kept in each MoE layer.
    num_experts
        Those of the source; to keep all of them changes nothing for a server.
    routing_groups
        ``n_group`` of group-limited routers, otherwise 1.
    top_k
        Experts of the output that a token is routed to.

    Raises
    ------
    UsageError
        One sentence: which number, who refuses it, which numbers do, and the option.
    """
    if experts % DIVISOR and experts != num_experts:
        multiple = lcm(DIVISOR, routing_groups)
        raise UsageError(
            f"--experts {experts}: the routing kernels of TensorRT-LLM and FlashInfer take "
            f"multiples of {DIVISOR} only; keep a multiple of {multiple}, or give --any-count "
            "if what serves the model takes others"
        )
    for number, most, what, who in (
        (experts, MOST_EXPERTS, "experts a layer", "llama.cpp"),
        (top_k, MOST_TOP_K, "experts a token", "TensorRT-LLM"),
    ):
        if number > most and experts != num_experts:
            raise UsageError(
                f"{number} {what} are more than the {most} that {who} takes; use fewer "
                "--slices or wider ones (--width), or give --any-count if what serves the "
                "model takes more"
            )


def served_count(
    share: Fraction, num_experts: int, routing_groups: int, most: int | None = None
) -> int:
    """Return the count nearest to a share of `num_experts` that all servers accept.

    Of two that are equally near it is the smaller one. All experts, or `most` of them if they
    were cut, are always accepted.

    Raises
    ------
    UsageError
        None is as near as a sixteenth of the experts: one sentence with the counts around.
    """
    step, asked = lcm(DIVISOR, routing_groups), share * num_experts
    most = num_experts if most is None else most
    counts = sorted({*range(step, most, step), most})
    nearest: int = min(counts, key=lambda count: (abs(count - asked), count))
    if 16 * abs(nearest - asked) > num_experts:
        below = [count for count in counts if count < asked]
        above = [count for count in counts if asked < count < most]
        named = " or ".join(f"--experts {count}" for count in [*below[-1:], *above[:1]])
        raise UsageError(
            f"--keep {float(100 * share):g}% of {num_experts} experts is {float(asked):.4g}, "
            f"and servers take multiples of {step}: give {named + ', or ' if named else ''}"
            "--any-count to keep what was asked for"
        )
    return nearest
