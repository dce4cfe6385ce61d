"""Keep what a benchmark prints, with the machine, the versions and the commit it ran on.

    python benchmarks/record.py compress python benchmarks/bench_compress.py --threads 1

runs the command and writes benchmarks/results/compress.json. ``make docs`` puts it into each
page that has its name between markers, so no figure of a table is copied by hand.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"
_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: processor, its units for products, memory, GPU."""
    path = Path("/proc/cpuinfo")
    told = path.read_text(encoding="utf-8") if path.exists() else ""
    name = re.search(r"^model name\s*:\s*(.*)$", told, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.*)$", told, re.MULTILINE)
    known = flags[1].split() if flags else []
    return {
        "processor": name[1].strip() if name else platform.processor(),
        "units": [unit for unit in _UNITS if unit in known],
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str:
    """Return the commit, with a ``+`` if files differ from it."""

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + "+" * bool(
        git("status", "--porcelain", "-uno")
    )


def main() -> int:
    """Run the command, and write the result if it succeeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    start = time.monotonic()
    done = subprocess.run(options.command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode:
        return done.returncode
    result = {
        "command": options.command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("ream-stream", "torch", "transformers")},
        "seconds": round(time.monotonic() - start, 1),
        "printed": done.stdout.strip("\n").split("\n"),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
