"""Draw each method's loss at equal bytes from the kept result; ``--check`` only compares."""

import json
import sys
from pathlib import Path

from ream_stream.cli.report.figures import ranges, standalone

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "slices.json"
PICTURE = ROOT / "docs" / "images" / "loss.svg"


def drawn() -> str:
    """Return the picture: a bar a row of the table, the sizes below each other."""
    printed = json.loads(RESULT.read_text(encoding="utf-8"))["printed"]
    heads, _, *lines = [line.strip("| ").split(" | ") for line in printed if "|" in line]
    column = heads.index("nats more")
    rows = []
    for name, *cells in lines:
        value, _, error = cells[column - 1].partition(" +- ")
        rows.append((name.replace(", refitted", ""), float(value), float(error)))
    rows.sort(key=lambda row: (-float(row[0].split()[-1].rstrip("%")), row[1]))
    return standalone(ranges(rows, "nats a token above the original, lower is better"))


def main() -> int:
    """Write the picture, or say that it is not up to date."""
    picture = drawn()
    if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == picture:
        return 0
    if sys.argv[1:] == ["--check"]:
        print(
            f"{PICTURE.relative_to(ROOT)}: not the kept result; run: make docs", file=sys.stderr
        )
        return 1
    PICTURE.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
