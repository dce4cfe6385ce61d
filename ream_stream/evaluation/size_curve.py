"""What is lost at each size, and the size that is recommended."""

from collections.abc import Mapping, Sequence
from typing import Any

MOST_NATS = 0.05
"""Loss that a recommended size may have, nats a token more than the original."""

RULE = (
    f"the smallest that loses at most {MOST_NATS:g} nats a token; where none does, the one "
    "that loses least"
)
"""How a size is recommended."""


def size_curve(listed: Sequence[Mapping[str, Any]], domain: str) -> dict[str, Any] | None:
    """Return the points of loss against size, or None if there is only one size.

    Parameters
    ----------
    listed
        What `comparison.summary` returns; the original, which has no number of experts, and
        what is not known do not count.
    domain
        Domain of the loss.
    """
    points = [
        {
            "name": each["name"],
            "mix": each["mix"],
            "experts": each["experts"],
            "output_bytes": each["output_bytes"],
            "nats more": each["scores"][domain]["nats more"],
        }
        for each in listed
        if each["experts"] and each["output_bytes"] and each["scores"][domain]["nats more"]
    ]
    if len({each["experts"] for each in points}) < 2:
        return None
    return {"points": points, "recommended": _recommended(points), "rule": RULE}


def _recommended(points: Sequence[Mapping[str, Any]]) -> int:
    """Return the position of the recommended point."""
    places = range(len(points))
    good = [place for place in places if points[place]["nats more"][0] <= MOST_NATS]
    if not good:
        return min(places, key=lambda place: points[place]["nats more"][0])
    return min(
        good, key=lambda place: (points[place]["output_bytes"], points[place]["nats more"][0])
    )
