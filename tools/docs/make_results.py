"""Put kept results of benchmarks into the pages that name them; ``--check`` only compares.

A page has ``<!-- result: NAME -->`` and ``<!-- end of NAME -->``; what
benchmarks/results/NAME.json holds goes between them, with command, machine and versions.
"""

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_PLACE = re.compile(r"(<!-- result: ([\w-]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def rendered(result: Mapping[str, Any]) -> str:
    """Return the lines that a benchmark printed, and in one line where they are from."""
    machine, versions = result["machine"], result["versions"]
    units = ", ".join(machine["units"]) or "no vector units known"
    where = f"{machine['cores']} cores of {machine['processor']} ({units})"
    if machine["gpu"]:
        where += f", {machine['gpu']}"
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    source = f"`{shlex.join(result['command'])}`, {where}; {told}; {result['commit']}, "
    return "\n".join([*result["printed"], "", f"{source}{result['date']}.", ""])


def filled(page: str) -> str:
    """Return a page with the results that it names."""

    def put(found: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{found[2]}.json").read_text(encoding="utf-8"))
        return f"{found[1]}\n{rendered(result)}\n{found[3]}"

    return _PLACE.sub(put, page)


def main() -> int:
    """Write the pages, or say which is not up to date."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        page = path.read_text(encoding="utf-8")
        if filled(page) != page:
            stale.append(str(path.relative_to(ROOT)))
            if sys.argv[1:] != ["--check"]:
                path.write_text(filled(page), encoding="utf-8")
    if stale and sys.argv[1:] == ["--check"]:
        print(f"{', '.join(stale)}: not the kept results; run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
