"""Check ream-stream on a GPU, and measure what its plans assume, in under six minutes.

    python tools/gpu_check [--device cuda] [--quick] [--json RESULT] [--folder DIR]

Nothing is downloaded. On one card of the H100's class, with 16 cores:

- the built-in checkpoint is compressed on the processor and on the card: in float32 the same
  groups, and statistics within 1e-5 of each other; in bf16, where products are rounded in other
  places, the differences are told
- the same with a budget that cuts experts into blocks: planned and measured peak of the device
- a card that runs out of memory in a layer: half as much at once, and the run ends whole
- experts of Qwen3-30B's and DeepSeek-V3's shape, observed and propagated, as shares of the rate
  of one large product; hidden states and copies, in GB a second
- a checkpoint of eight layers of Qwen3-30B's shape, pruned, phase by phase

Prints a table, then one JSON object. The exit status is 1 if a check failed. With
--device cpu --quick all of it is run on shapes so small that it takes seconds.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import checks
import rates
import torch
import whole
from found import Found

ROOT = Path(__file__).parents[2]


def machine(device: torch.device) -> dict[str, Any]:
    """Return card, driver, versions and commit."""
    card = driver = None
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, check=False, capture_output=True, text=True)
        driver = told.stdout.split("\n")[0].strip() or None
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()
    names = ("ream-stream", "torch", "transformers")
    return {
        "card": card,
        "driver": driver,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "commit": commit or None,
    }


def main() -> int:
    """Run all checks; print a table and a JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--json", type=Path, help="a file for the JSON object too")
    parser.add_argument("--folder", type=Path, help="where to work, 25 GB; not with --quick")
    options = parser.parse_args()
    device, begin = torch.device(options.device), time.perf_counter()
    found: list[Found] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for part in (checks.run, rates.run, whole.run):
            for each in part(device, folder, quick=options.quick):
                print(each.line(), flush=True)
                found.append(each)
    result = {
        **machine(device),
        "device": str(device),
        "quick": options.quick,
        "seconds": round(time.perf_counter() - begin, 1),
        "passed": all(each.passed is not False for each in found),
        "found": [each.fields() for each in found],
    }
    text = json.dumps(result)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
