"""Worked mathematics problems in the style that the demo model was trained on."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# fmt: off
_NAMES = [
    "Ann", "Ben", "Carla", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon",
    "Kira", "Leo", "Mia", "Noah", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tara",
]
_THINGS = [
    "apples", "books", "coins", "pens", "stamps", "marbles", "cards",
    "shells", "tickets", "cookies",
]
# fmt: on
_PROBLEMS_A_DOCUMENT = 8


def documents(seed: int, count: int) -> list[str]:
    """Return `count` documents of eight problems each; equal seeds give equal text."""
    rng = random.Random(seed)
    return ["\n".join(_problem(rng) for _ in range(_PROBLEMS_A_DOCUMENT)) for _ in range(count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cast:
    """Who and what a problem is about, drawn before its kind is."""

    first: int
    """Number from 2 to 99, like `second` and `third`."""

    second: int
    third: int
    names: tuple[str, str]
    thing: str
    factor: int
    """Number from 2 to 9."""


def _problem(rng: random.Random) -> str:
    first, second, third = (rng.randint(2, 99) for _ in range(3))
    owner, friend = rng.sample(_NAMES, 2)
    cast = _Cast(
        first=first,
        second=second,
        third=third,
        names=(owner, friend),
        thing=rng.choice(_THINGS),
        factor=rng.randint(2, 9),
    )
    (kind,) = rng.choices(list(_KINDS), weights=list(_KINDS.values()))
    return kind(rng, cast)


def _left_over(rng: random.Random, cast: _Cast) -> str:
    (owner, friend), thing = cast.names, cast.thing
    start, more = cast.first, cast.second
    total = start + more
    given = min(cast.third, total)
    return (
        f"Problem: {owner} has {start} {thing} and buys {more} more, then gives {given} to "
        f"{friend}. How many {thing} are left?\n"
        f"Solution: {owner} starts with {start} {thing}. After buying {more} more there are "
        f"{start} + {more} = {total}. After giving away {given} there are "
        f"{total} - {given} = {total - given}.\n"
        f"Answer: {total - given}\n"
    )


def _boxes(rng: random.Random, cast: _Cast) -> str:
    (owner, friend), thing, size = cast.names, cast.thing, cast.factor
    ours, theirs = size * cast.first, size * cast.second
    return (
        f"Problem: Each box holds {size} {thing}. {owner} fills {cast.first} boxes and "
        f"{friend} fills {cast.second} boxes. How many {thing} do they have in total?\n"
        f"Solution: {owner} has {size} * {cast.first} = {ours} {thing}. {friend} has "
        f"{size} * {cast.second} = {theirs} {thing}. "
        f"Together they have {ours} + {theirs} = {ours + theirs}.\n"
        f"Answer: {ours + theirs}\n"
    )


def _linear_equation(rng: random.Random, cast: _Cast) -> str:
    slope, root, offset = cast.factor, rng.randint(-12, 12), rng.randint(-30, 30)
    sign, verb, side = ("+", "Subtract", "from") if offset >= 0 else ("-", "Add", "to")
    return (
        f"Problem: Solve {slope}x {sign} {abs(offset)} = {slope * root + offset} for x.\n"
        f"Solution: {verb} {abs(offset)} {side} both sides: {slope}x = {slope * root}. "
        f"Divide both sides by {slope}: x = {root}.\n"
        f"Answer: {root}\n"
    )


def _factoring(rng: random.Random, cast: _Cast) -> str:
    p, q = rng.randint(1, 12), rng.randint(1, 12)
    return (
        f"Problem: Factor x^2 + {p + q}x + {p * q}.\n"
        f"Solution: We need two numbers with sum {p + q} and product {p * q}. "
        f"These are {p} and {q}, because {p} + {q} = {p + q} and {p} * {q} = {p * q}. "
        f"So x^2 + {p + q}x + {p * q} = (x + {p})(x + {q}).\n"
        f"Answer: (x + {p})(x + {q})\n"
    )


def _derivative(rng: random.Random, cast: _Cast) -> str:
    u, v, w, power = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9), rng.randint(2, 5)
    derivative = f"{u * power}x^{power - 1} + {2 * v}x + {w}"
    return (
        f"Problem: Differentiate f(x) = {u}x^{power} + {v}x^2 + {w}x.\n"
        f"Solution: Apply the power rule to each term. The derivative of {u}x^{power} is "
        f"{u * power}x^{power - 1}. The derivative of {v}x^2 is {2 * v}x. "
        f"The derivative of {w}x is {w}.\n"
        f"Answer: f'(x) = {derivative}\n"
    )


_KINDS: Mapping[Callable[[random.Random, _Cast], str], float] = {
    _left_over: 0.25,
    _boxes: 0.2,
    _linear_equation: 0.25,
    _factoring: 0.15,
    _derivative: 0.15,
}
"""Functions that write a problem of each kind, with the relative frequency of the kind."""
