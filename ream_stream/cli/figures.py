"""Pictures as SVG, in the colors of the page they stand in: no library, no script.

Classes are styled by `STYLE`, which the report has once and a picture alone brings along.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
.figure { font: 12px system-ui, sans-serif; max-width: 100%; height: auto; }
.figure text { fill: var(--ink, #222); }
.figure .axis { stroke: var(--line, #999); fill: none; }
.figure .front { stroke: var(--ink, #222); stroke-dasharray: 4 3; fill: none; }
.figure .bar { fill: var(--c0, #2563a8); }
.figure .bar.second { fill: var(--c1, #c2571a); }
"""

COLORS = (
    "var(--c0, #2563a8)", "var(--c1, #c2571a)", "var(--c2, #2c8553)", "var(--c3, #8a3ea8)",
    "var(--c4, #a8842c)", "var(--c5, #6b6b6b)",
)  # fmt: skip
"""Of series, in order; then again from the first."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 360, 56, 44, 16, 16


class _Scale:
    """From a range of numbers to a range of pixels."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 1.0
        self._low, self._high, self._start, self._stop = low - room, high + room, start, stop

    def __call__(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """Return five numbers over the range."""
        return [self._low + n / 4 * (self._high - self._low) for n in range(5)]


def standalone(figure: str) -> str:
    """Return a figure as a file of its own."""
    head, _, rest = figure.partition(">")
    return f"{head}><style>{STYLE}</style>{rest}\n"


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
    front = sorted(place(each["point"]) for each in known["points"] if each["on front"])
    return scatter(series, front, f"{axes[0]}, %", f"mean of {others}, %")


def scatter(
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    front: Sequence[tuple[float, float]],
    x_name: str,
    y_name: str,
) -> str:
    """Return points by series, each with its title, and a line through some of them."""
    points = [point for each in series.values() for point in each]
    across = _Scale([p[0] for p in points], _LEFT, _WIDTH - _RIGHT)
    up = _Scale([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(across, up, x_name, y_name)]
    line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in front)
    parts.append(f'<polyline class="front" points="{line}"/>')
    for number, (name, own) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="4" fill="{color}">'
            f"<title>{escape(title)}: {x:.2f}, {y:.2f}</title></circle>"
            for x, y, title in own
        ]
        top = _TOP + 14 * number
        parts.append(f'<circle cx="{_LEFT + 12}" cy="{top + 4}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{_LEFT + 22}" y="{top + 8}">{escape(name)}</text>')
    return _figure(parts, _WIDTH, _HEIGHT, f"{y_name} against {x_name}")


def heat_map(rows: Sequence[Sequence[float]], title: str) -> str:
    """Return a square of cells, light for 0 and dark for 1."""
    count = len(rows)
    side = max(2, min(10, 320 // count))
    parts = [
        f'<rect x="{column * side}" y="{row * side}" width="{side}" height="{side}" '
        f'fill="var(--c0, #2563a8)" fill-opacity="{min(1.0, max(0.0, value)):.2f}"/>'
        for row, values in enumerate(rows)
        for column, value in enumerate(values)
    ]
    return _figure(parts, count * side, count * side, title)


def bars(values: Sequence[float], title: str, *, marked: Sequence[int] = ()) -> str:
    """Return numbers from 0 on as bars, some of them in the second color."""
    width, height = max(4.0, min(16.0, _WIDTH / max(1, len(values)))), 90
    highest = max(values, default=0) or 1
    parts = []
    for number, value in enumerate(values):
        tall = max(0.5, height * value / highest)
        kind = "bar second" if number in marked else "bar"
        parts.append(
            f'<rect class="{kind}" x="{number * width:.1f}" y="{height - tall:.1f}" '
            f'width="{width - 1:.1f}" height="{tall:.1f}">'
            f"<title>{number}: {value:.4g}</title></rect>"
        )
    return _figure(parts, len(values) * width, height, title)


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
        top = _TOP + 14 * number + 8
        parts.append(
            f'<text x="{_LEFT + 12}" y="{top}" style="fill:{color}">{escape(name)}</text>'
        )
    return _figure(parts, _WIDTH, _HEIGHT, f"{y_name} by {x_name}")


def _axes(across: _Scale, up: _Scale, x_name: str, y_name: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    half = (_TOP + bottom) / 2
    return [
        f'<path class="axis" d="M{_LEFT},{_TOP}V{bottom}H{right}"/>',
        *(_label(f"{t:.3g}", across(t), bottom + 16, "middle") for t in across.ticks()),
        *(_label(f"{t:.3g}", _LEFT - 6, up(t) + 4, "end") for t in up.ticks()),
        _label(x_name, (_LEFT + right) / 2, _HEIGHT - 8, "middle"),
        f'<g transform="translate(12,{half:.0f}) rotate(-90)">'
        f"{_label(y_name, 0, 0, 'middle')}</g>",
    ]


def _label(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(parts: Sequence[str], width: float, height: float, title: str) -> str:
    return (
        f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'aria-label="{escape(title, quote=True)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )
