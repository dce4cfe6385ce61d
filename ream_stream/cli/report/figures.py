"""Pictures as SVG, in the colors of the page they stand in: no library, no script.

Classes are styled by `STYLE`, which the report has once and a picture alone brings along.
"""

import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ream_stream.evaluation.pareto import front

STYLE = """
.figure { font: 12px system-ui, sans-serif; max-width: 100%; height: auto; }
.figure text { fill: var(--ink, #222); }
.figure .axis { stroke: var(--line, #999); fill: none; }
.figure .front { stroke: var(--ink, #222); stroke-dasharray: 4 3; fill: none; }
.figure.cells { image-rendering: pixelated; border: 1px solid var(--line, #999); }
.figure .bar { fill: var(--c0, #2563a8); }
.figure .bar.second { fill: var(--c1, #c2571a); }
"""

COLORS = (
    "var(--c0, #2563a8)", "var(--c1, #c2571a)", "var(--c2, #2c8553)", "var(--c3, #8a3ea8)",
    "var(--c4, #a8842c)", "var(--c5, #6b6b6b)",
)  # fmt: skip
"""Colors of the series in order; further series start again with the first."""

_LEVELS, _CELL = 32, (0x4A, 0x86, 0xC8)
"""Opacity steps of a heat map, and its color, visible on light and dark."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 360, 56, 44, 16, 16


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
    # of the two axes that are shown: with more, the front is no line here
    placed = [place(each["point"]) for each in known["points"]]
    line = sorted(placed[number] for number in front(placed))
    return scatter(series, line, f"{axes[0]}, %", f"mean of {others}, %")


def scatter(
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    through: Sequence[tuple[float, float]],
    x_name: str,
    y_name: str,
) -> str:
    """Return points by series, each with its title, and a line through some of them."""
    points = [point for each in series.values() for point in each]
    across = _Scale([p[0] for p in points], _LEFT, _WIDTH - _RIGHT)
    up = _Scale([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(across, up, x_name, y_name)]
    line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in through)
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
    """Return a square of cells, clear for 0 and full for 1, as an image in the page itself."""
    count = len(rows)
    side = count * max(1, 320 // count)
    levels = [
        [round(min(1.0, max(0.0, value)) * (_LEVELS - 1)) for value in values]
        for values in rows
    ]
    image = b64encode(_png(levels)).decode()
    return (
        f'<img class="figure cells" alt="{escape(title, quote=True)}" width="{side}" '
        f'height="{side}" src="data:image/png;base64,{image}">'
    )


def bars(values: Sequence[float], title: str, *, marked: Sequence[int] = ()) -> str:
    """Return numbers from 0 on as bars, some of them in the second color."""
    width, height = max(2.0, min(16.0, _WIDTH / max(1, len(values)))), 90
    highest = max(values, default=0) or 1
    paths: dict[str, list[str]] = {"bar": [], "bar second": []}
    for number, value in enumerate(values):
        top = min(height - 0.5, height - height * value / highest)
        start, stop = number * width, (number + 0.9) * width
        kind = "bar second" if number in marked else "bar"
        paths[kind].append(f"M{start:.1f},{height}V{top:.1f}H{stop:.1f}V{height}Z")
    parts = [f'<path class="{kind}" d="{"".join(drawn)}"/>' for kind, drawn in paths.items()]
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


def _png(levels: Sequence[Sequence[int]]) -> bytes:
    """Return an image of one color whose opacity is the level, 0 to `_LEVELS` - 1."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", len(levels[0]), len(levels), 8, 3, 0, 0, 0)
    opacity = bytes(255 * level // (_LEVELS - 1) for level in range(_LEVELS))
    lines_of = b"".join(b"\0" + bytes(row) for row in levels)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"PLTE", bytes(_CELL) * _LEVELS),
            chunk(b"tRNS", opacity),
            chunk(b"IDAT", zlib.compress(lines_of, 9)),
            chunk(b"IEND", b""),
        )
    )
