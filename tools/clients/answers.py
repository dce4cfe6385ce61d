"""What a client's answer about a model means, beside transformers' answer."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from probe import MARK

CLOSE = 1e-3
"""Largest difference of a log-probability that counts as the same, in nats."""

TIES = 0.05
"""Share of tokens that may differ more. Where a router gives two experts the same score to the
last digits, sums in another order choose the other one, there and for what attends to it."""

_VARIES = re.compile(r"0x[0-9a-f]+|/[^\s'\"]+|\d+")
_FOLDERS = re.compile(r"(?<![\w.])(/[\w.-]+)+/")
_WARNING = re.compile(
    r"warn|error|unexpected|missing|not used|newly initialized", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A model in a client."""

    source: str
    """Name of the source."""

    client: str
    """Client that was asked."""

    model: str
    """``source``, or the method of an output."""

    ok: bool
    """Whether it loads and computes the same."""

    difference: float | None
    """Largest difference of a log-probability from transformers' but for `TIES`, in nats."""

    text: str
    """Difference or reason, in words."""

    warnings: tuple[str, ...] = ()
    """Warnings that the output has and its source has not."""

    def facts(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def cell(
    source: str,
    client: str,
    model: str,
    told: Mapping[str, Any],
    reference: Mapping[str, Any],
    own: Cell | None,
    warnings: Sequence[str],
) -> Cell:
    """Judge an answer; `own` is what the client says of the source.

    A client that computes another thing than transformers from the source does the same to
    an output: that counts as the same up to twice the difference it has there.
    """

    def judged(text: str, *, ok: bool, difference: float | None = None) -> Cell:
        return Cell(
            source=source,
            client=client,
            model=model,
            ok=ok,
            difference=difference,
            text=text,
            warnings=tuple(warnings),
        )

    if "error" in told:
        if own is not None and own.difference is None:
            return judged("as its source", ok=True)
        return judged(_short(told["error"]), ok=False)
    if "error" in reference:
        return judged("loads, transformers does not: nothing to compare with", ok=True)
    differences = sorted(
        abs(a - b)
        for ours, theirs in zip(told["logprobs"], reference["logprobs"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    difference = max(
        differences[math.ceil((1 - TIES) * len(differences)) - 1], told.get("eval", 0)
    )
    if not all(map(math.isfinite, differences)):
        return judged("not finite", ok=False)
    allowed = max(CLOSE, 2 * own.difference) if own and own.difference is not None else CLOSE
    same = told["greedy"] == reference["greedy"] or differences[-1] > CLOSE
    text = f"{difference:.0e}"
    if differences[-1] > CLOSE >= difference:
        text += f" ({sum(each > CLOSE for each in differences)} tokens after a tie)"
    return judged(
        text if same else f"{text}, other greedy tokens",
        ok=same and difference <= allowed,
        difference=difference,
    )


def sections(log: str) -> dict[str, list[str]]:
    """Return the lines that look like warnings, by the model after whose mark they stand."""
    found: dict[str, list[str]] = {}
    current = None
    for line in log.splitlines():
        if line.startswith(MARK):
            current = found.setdefault(line.removeprefix(MARK), [])
        elif current is not None and _WARNING.search(line):
            current.append(line)
    return found


def new_warnings(warnings: Mapping[str, Sequence[str]], model: str, source: str) -> list[str]:
    """Return the warnings of a model that its source has not, numbers and paths aside."""
    known = {_VARIES.sub("", line) for line in warnings.get(source, ())}
    lines = [line for line in warnings.get(model, ()) if _VARIES.sub("", line) not in known]
    return [_short(line) for line in dict.fromkeys(lines)]


def _short(text: str) -> str:
    words = _FOLDERS.sub("", " ".join(text.split()))
    return words if len(words) < 160 else f"{words[:157]}..."
