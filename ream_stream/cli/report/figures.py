"""Pictures as SVG, in the colors of the page they stand in: no library, no script.

Classes are styled by `STYLE`, which the report has once and a picture alone brings along.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from ream_stream.evaluation.pareto import front
from ream_stream.untrusted import printable

STYLE = """
.figure { font: 12px system-ui, sans-serif; max-width: 100%; height: auto; }
.figure text { fill: var(--ink, #222); }
.figure .axis { stroke: var(--line, #999); fill: none; }
.figure .front { stroke: var(--ink, #222); stroke-dasharray: 4 3; fill: none; }
.figure.cells { border: 1px solid var(--line, #999); }
.cells { image-rendering: pixelated; }
.figure .over { fill: transparent; }
.figure .over:hover { stroke: var(--ink, #222); }
.figure .gone { stroke: var(--c1, #c2571a); fill: none; }
.figure .bar { fill: var(--c0, #2563a8); }
.figure .bar.second { fill: var(--c1, #c2571a); }
"""

COLORS = (
    "var(--c0, #2563a8)", "var(--c1, #c2571a)", "var(--c2, #2c8553)", "var(--c3, #8a3ea8)",
    "var(--c4, #a8842c)", "var(--c5, #6b6b6b)",
)  # fmt: skip
"""Colors of the series in order; further series start again with the first."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 360, 56, 44, 16, 16
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1.0, "bytes"))
_ENTRY = 16  # height of a line of the legend


class _Scale:
    """From a range of numbers to a range of pixels; its ends are round numbers."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = min(values), max(values)
        rough = (high - low) / 4 or abs(high) or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        self._step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * rough)
        self._first = math.floor(low / self._step + 1e-9)
        self._last = max(self._first + 1, math.ceil(high / self._step - 1e-9))
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        share = (value / self._step - self._first) / (self._last - self._first)
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """Return the round numbers over the range."""
        return [number * self._step for number in range(self._first, self._last + 1)]


def standalone(figure: str) -> str:
    """Return a figure as a file of its own, on white: a page around it may be dark."""
    head, _, rest = figure.partition(">")
    return f'{head} style="background: white"><style>{STYLE}</style>{rest}\n'


def pareto_picture(known: Mapping[str, Any]) -> str:
    """Return the points of a sweep: its first axis, and the mean of the others."""
    axes = known["axes"]
    others = ", ".join(axes[1:]) or axes[0]

    def place(point: Sequence[float]) -> tuple[float, float]:
        rest = point[1:] or point
        return point[0], sum(rest) / len(rest)

    series: dict[str, list[tuple[float, float, str]]] = {}
    for each in known["points"]:
        x, y = place(each["point"])
        series.setdefault(each["name"], []).append((x, y, f"{each['name']}, {each['mix']}"))
    x, y = place(known["original"])
    series["original"] = [(x, y, "original")]
    # of the two axes that are shown: with more, the front is no line here
    placed = [place(each["point"]) for each in known["points"]]
    line = sorted(placed[number] for number in front(placed))
    return scatter(series, line, f"{axes[0]}, %", f"mean of {others}, %")


def size_picture(curve: Mapping[str, Any]) -> str:
    """Return loss against size: a line a method and mix, a point of its own for the best."""
    points = curve["points"]
    largest = max(each["output_bytes"] for each in points)
    unit, name = next(each for each in _UNITS if largest >= each[0])

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        return point["output_bytes"] / unit, point["nats more"][0]

    series: dict[str, list[tuple[float, float, str]]] = {}
    for each in points:
        named = ", ".join(filter(None, (each["name"], each["mix"])))
        told = f"{named}, {each['experts']} experts"
        series.setdefault(named, []).append((*place(each), told))
    best = points[curve["recommended"]]
    x, y = place(best)
    series["recommended"] = [(x, y, f"recommended: {best['experts']} experts, {best['name']}")]
    return scatter(series, [], f"weights, {name}", "nats a token more", joined=True)


def scatter(
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    through: Sequence[tuple[float, float]],
    x_name: str,
    y_name: str,
    *,
    joined: bool = False,
) -> str:
    """Return points by series, each with its title, and a line through some of them.

    If `joined`, a line through the points of each series too.
    """
    points = [point for each in series.values() for point in each]
    across = _Scale([p[0] for p in points], _LEFT, _WIDTH - _RIGHT)
    up = _Scale([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(across, up, x_name, y_name)]
    line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in through)
    parts.append(f'<polyline class="front" points="{line}"/>')
    for number, (name, own) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        if joined:
            path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y, _ in sorted(own))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="4" fill="{color}">'
            f"<title>{safe(title)}: {x:.2f}, {y:.2f}</title></circle>"
            for x, y, title in own
        ]
        parts += _entry(name, color, len(series) - number)
    title, above = f"{y_name} against {x_name}", _ENTRY * len(series)
    return figure(parts, _WIDTH, _HEIGHT, title, above=above)


def bars(
    values: Sequence[float],
    x_name: str,
    y_name: str,
    *,
    marked: Collection[int] = (),
    said: Sequence[str] = (),
) -> str:
    """Return numbers from 0 on as bars.

    Parameters
    ----------
    values
        The numbers, from left to right.
    x_name, y_name
        Names of the axes.
    marked
        Places of those in the second color.
    said
        What is shown for each bar that is pointed at.
    """
    wide = max(1.5, min(18.0, (_WIDTH - _LEFT - _RIGHT) / max(1, len(values))))
    width, height = _LEFT + wide * len(values) + _RIGHT, 170
    bottom = height - _BOTTOM
    up = _Scale([0.0, *values], bottom, _TOP)
    parts = []
    for number, value in enumerate(values):
        x, y = _LEFT + number * wide, min(bottom - 0.5, up(value))
        kind = "bar second" if number in marked else "bar"
        told = f"<title>{safe(said[number])}</title>" if said else ""
        parts.append(
            f'<path class="{kind}" d="M{x:.1f},{bottom}V{y:.1f}h{0.85 * wide:.1f}V{bottom}z">'
            f"{told}</path>"
        )
    parts.append(f'<path class="axis" d="M{_LEFT},{_TOP}V{bottom}H{width - _RIGHT:.0f}"/>')
    ends = (up.ticks()[0], up.ticks()[-1])
    parts += [label(f"{tick:.3g}", _LEFT - 6, up(tick) + 4, "end") for tick in ends]
    parts.append(label(x_name, _LEFT, height - 20, "start"))
    parts.append(_upright(y_name, (_TOP + bottom) / 2))
    return figure(parts, max(width, 220), height, f"{y_name}, {x_name}")


def ranges(rows: Sequence[tuple[str, float, float | None]], x_name: str) -> str:
    """Return a bar to the right for each name, with its standard error if that is known."""
    left, wide, step = 120, 420, 26
    ends = [value + side * (error or 0.0) for _, value, error in rows for side in (-1, 1)]
    across = _Scale([0.0, *ends], left, left + wide)
    bottom, parts = _TOP + step * len(rows), []
    for number, (name, value, error) in enumerate(rows):
        y, start, stop = _TOP + step * number, *sorted((across(0.0), across(value)))
        told = f"{name}: {value:.4f}" + ("" if error is None else f" +- {error:.4f}")
        parts.append(label(_cut(name), left - 8, y + 15, "end"))
        parts.append(
            f'<path class="bar" d="M{start:.1f},{y + 4}H{stop:.1f}V{y + 20}H{start:.1f}z">'
            f"<title>{safe(told)}</title></path>"
        )
        if error:
            low, high = across(value - error), across(value + error)
            parts.append(f'<path class="axis" d="M{low:.1f},{y + 12}H{high:.1f}"/>')
    zero = across(0.0)
    parts.append(f'<path class="axis" d="M{zero:.1f},{_TOP}V{bottom}M{left},{bottom}h{wide}"/>')
    parts += [label(f"{t:.3g}", across(t), bottom + 16, "middle") for t in across.ticks()]
    parts.append(label(x_name, left + wide / 2, bottom + 34, "middle"))
    return figure(parts, left + wide + 24, bottom + 42, x_name)


def lines(series: Mapping[str, Sequence[float]], x_name: str, y_name: str) -> str:
    """Return series of numbers over 1, 2, 3, ... as lines."""
    values = [value for each in series.values() for value in each]
    count = max(len(each) for each in series.values())
    across = _Scale([1, count], _LEFT, _WIDTH - _RIGHT)
    up = _Scale([0, *values], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(across, up, x_name, y_name)]
    for number, (name, own) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        path = " ".join(f"{across(n):.1f},{up(v):.1f}" for n, v in enumerate(own, start=1))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{across(n):.1f}" cy="{up(v):.1f}" r="3" fill="{color}">'
            f"<title>{safe(name)}, {safe(x_name)} {n}: {v:.4g}</title></circle>"
            for n, v in enumerate(own, start=1)
        ]
        parts += _entry(name, color, len(series) - number)
    title, above = f"{y_name} by {x_name}", _ENTRY * len(series)
    return figure(parts, _WIDTH, _HEIGHT, title, above=above)


def _entry(name: str, color: str, from_below: int) -> list[str]:
    """Return a line of the legend, which stands above the axes."""
    y = -_ENTRY * (from_below - 0.5)
    dot = f'<circle cx="{_LEFT + 6}" cy="{y}" r="4" fill="{color}"/>'
    return [dot, label(name, _LEFT + 16, y + 4, "start")]


def _axes(across: _Scale, up: _Scale, x_name: str, y_name: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    half = (_TOP + bottom) / 2
    return [
        f'<path class="axis" d="M{_LEFT},{_TOP}V{bottom}H{right}"/>',
        *(label(f"{t:.3g}", across(t), bottom + 16, "middle") for t in across.ticks()),
        *(label(f"{t:.3g}", _LEFT - 6, up(t) + 4, "end") for t in up.ticks()),
        label(x_name, (_LEFT + right) / 2, _HEIGHT - 8, "middle"),
        _upright(y_name, half),
    ]


def _upright(text: str, y: float) -> str:
    return f'<g transform="translate(12,{y:.0f}) rotate(-90)">{label(text, 0, 0, "middle")}</g>'


def _cut(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def label(text: str, x: float, y: float, anchor: str) -> str:
    """Return a text at a place: it starts, has its middle or ends there."""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{safe(text)}</text>'


def safe(text: str) -> str:
    """Return text of strangers as it may stand in a picture."""
    return escape(printable(text, most=500))


def figure(
    parts: Sequence[str], width: float, height: float, title: str, *, above: float = 0
) -> str:
    """Return parts as one picture with a title for those who do not see it."""
    return (
        f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'aria-label="{safe(title)}" width="{width:.0f}" '
        f'height="{height + above:.0f}" '
        f'viewBox="0 {-above:.0f} {width:.0f} {height + above:.0f}">{"".join(parts)}</svg>'
    )
