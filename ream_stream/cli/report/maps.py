"""Pictures of many numbers at once: a layer a row, an expert a column.

Cells are one image in the page, a byte each before it is compressed: hundreds of layers of
hundreds of experts are tens of kilobytes, where a shape for each would be megabytes. What a
row says in words lies over it and shows when it is pointed at.
"""

import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .figures import COLORS, figure, label, safe

Cells = NDArray[np.float32]

_LEVELS = 32
_FULL = ((0x4A, 0x86, 0xC8), (0xD9, 0x6A, 0x2B))
"""Colors of a full cell, first and second, visible on light and dark; opacity is the value."""

_LARGEST_SIDE = 128
_LEFT, _TOP, _BOTTOM, _WIDE = 52, 8, 40, 560


def heat_map(cells: Cells, title: str) -> str:
    """Return a square of cells, clear for 0 and full for 1; of many the means of neighbors."""
    factor = -(-len(cells) // _LARGEST_SIDE)
    if factor > 1:
        side = len(cells) // factor * factor
        parts = cells[:side, :side].reshape(side // factor, factor, side // factor, factor)
        cells = parts.mean(axis=(1, 3))
    count = len(cells)
    side = count * max(1, 320 // count)
    return (
        f'<img class="figure cells" alt="{safe(title)}" width="{side}" '
        f'height="{side}" src="{_image(_levels(cells))}">'
    )


def layer_map(
    cells: Cells,
    title: str,
    *,
    layers: Sequence[int],
    second: NDArray[np.bool_] | None = None,
    said: Sequence[str] = (),
) -> str:
    """Return layers x experts as cells.

    Parameters
    ----------
    cells
        A number from 0 to 1 for each layer and expert.
    title
        What the cells are.
    layers
        Number of each row's layer, as it is shown.
    second
        Which cells have the second color.
    said
        What is shown for each row that is pointed at.
    """
    rows, experts = cells.shape
    step, high = max(1, _WIDE // experts), max(3, min(14, 360 // rows))
    width, height = experts * step, rows * high
    levels = _levels(cells)
    if second is not None:
        levels = levels + _LEVELS * second.astype(np.uint8)
    parts = [
        f'<image class="cells" x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none" href="{_image(levels)}"/>',
        f'<path class="axis" d="M{_LEFT},{_TOP}V{_TOP + height}H{_LEFT + width}"/>',
    ]
    for row in range(0, rows, _every(rows, height / 14)):
        middle = _TOP + (row + 0.5) * high
        parts.append(label(str(layers[row]), _LEFT - 6, middle + 4, "end"))
    for expert in range(0, experts, _every(experts, width / 40)):
        place = _LEFT + (expert + 0.5) * step
        parts.append(label(str(expert), place, _TOP + height + 14, "middle"))
    parts.append(label("expert", _LEFT + width / 2, _TOP + height + 32, "middle"))
    parts.append(
        f'<g transform="translate(12,{_TOP + height / 2:.0f}) rotate(-90)">'
        f"{label('layer', 0, 0, 'middle')}</g>"
    )
    parts += [
        f'<rect class="over" x="{_LEFT}" y="{_TOP + row * high}" width="{width}" '
        f'height="{high}"><title>{safe(text)}</title></rect>'
        for row, text in enumerate(said)
    ]
    return figure(parts, _LEFT + width + 16, _TOP + height + _BOTTOM, title)


def merges(groups: Sequence[Sequence[int]], dropped: Sequence[int], experts: int) -> str:
    """Return experts in a row, an arc from each that went to the one that it was merged into.

    A group has a color, the next one the next; who was dropped is a cross below the row.
    """
    step = max(2.0, min(18.0, 600 / experts))
    width, base = experts * step + 24, 118

    def across(expert: int) -> float:
        return 12 + (expert + 0.5) * step

    parts = [f'<path class="axis" d="M12,{base}H{width - 12:.0f}"/>']
    for number, (kept, *others) in enumerate(groups):
        color = COLORS[number % len(COLORS)]
        arcs = "".join(
            f"M{across(each):.0f},{base}"
            f"Q{(across(each) + across(kept)) / 2:.0f},"
            f"{base - 14 - 200 * abs(each - kept) / experts:.0f} {across(kept):.0f},{base}"
            for each in others
        )
        told = f"{kept} took in {', '.join(map(str, others))}"
        parts.append(
            f'<g fill="none" stroke="{color}"><title>{safe(told)}</title><path d="{arcs}"/>'
            f'<circle cx="{across(kept):.0f}" cy="{base}" r="3.5" fill="{color}"/></g>'
        )
    parts += [
        f'<path class="gone" d="M{across(each) - 2:.0f},{base + 4}l4,4m-4,0l4,-4">'
        f"<title>{each} was dropped</title></path>"
        for each in dropped
    ]
    for expert in range(0, experts, _every(experts, width / 40)):
        parts.append(label(str(expert), across(expert), base + 24, "middle"))
    parts.append(label("expert", width / 2, base + 42, "middle"))
    return figure(parts, width, base + 48, "who was merged into whom")


def _every(count: int, labels: float) -> int:
    """Return a round step at which about that many of `count` places get a label."""
    rough = max(1.0, count / max(1.0, labels))
    power = 10 ** math.floor(math.log10(rough))
    return int(next(m * power for m in (1, 2, 5, 10) if m * power >= rough))


def _levels(cells: Cells) -> NDArray[np.uint8]:
    return np.rint(np.clip(cells, 0.0, 1.0) * (_LEVELS - 1)).astype(np.uint8)


def _image(levels: NDArray[np.uint8]) -> str:
    return f"data:image/png;base64,{b64encode(_png(levels)).decode()}"


def _png(levels: NDArray[np.uint8]) -> bytes:
    """Return an image whose opacity is the level; from `_LEVELS` on in the second color."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    opacity = bytes(255 * level // (_LEVELS - 1) for level in range(_LEVELS))
    filtered = np.zeros((height, width + 1), dtype=np.uint8)  # a row begins with its filter
    filtered[:, 1:] = levels
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"PLTE", b"".join(bytes(color) * _LEVELS for color in _FULL)),
            chunk(b"tRNS", opacity * len(_FULL)),
            chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )
