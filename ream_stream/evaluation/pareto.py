"""Which points are not beaten, and how much of the space they cover; higher is better."""

import statistics
from collections.abc import Sequence

Point = tuple[float, ...]


def front(points: Sequence[Point]) -> list[int]:
    """Return the positions of the points that no other point beats.

    A point beats another if it is as good on every axis and better on one.
    """
    return [
        number
        for number, point in enumerate(points)
        if not any(_beats(other, point) for other in points)
    ]


def reference(points: Sequence[Point]) -> Point:
    """Return the smallest value on each axis, minus 1: the corner of REAM's hypervolume."""
    return tuple(min(axis) - 1 for axis in zip(*points, strict=True))


def hypervolume(points: Sequence[Point], corner: Point) -> float:
    """Return the volume between a corner and the points: of all boxes with a point opposite.

    By slices along the last axis; for the few points and axes that there are here.
    """
    inside = [p for p in points if all(a > b for a, b in zip(p, corner, strict=True))]
    if not inside:
        return 0.0
    if len(corner) == 1:
        return max(point[0] for point in inside) - corner[0]
    heights = sorted({point[-1] for point in inside}, reverse=True)
    floors = [*heights[1:], corner[-1]]
    return sum(
        (top - floor)
        * hypervolume([point[:-1] for point in inside if point[-1] >= top], corner[:-1])
        for top, floor in zip(heights, floors, strict=True)
    )


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None if there are too few values or one never varies."""
    if len(first) < 2 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return statistics.correlation(first, second)


def _beats(one: Point, other: Point) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
