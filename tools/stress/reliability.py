"""Print the numbers of docs/concepts/reliability.md: what is tried, and how often.

    python tools/stress/reliability.py

Kill points are counted in a run of the tests' tiny checkpoint; everything else in the tables
and parameters of the tests themselves. Nothing is tried here: `make test-all` does that.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "compression"))

import conftest  # noqa: F401 - its profile of hypothesis
import test_crash
import test_faults
from crash import kills


def kill_points() -> None:
    """Count the kills of every variant of a run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        source = test_crash.write_source(Path(scratch) / "source")
        for name, wanted in test_crash.VARIANTS.items():
            folder = Path(scratch) / name
            folder.mkdir()
            runs = test_crash.Runs(source, wanted, folder)
            steps = runs.control().ending.steps
            kinds = Counter(step.kind for step in steps)
            told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            print(f"{name}: {len(kills(steps, thin=True))} kill points, {len(kills(steps))} "
                  f"with every piece of a file ({told})")  # fmt: skip


FILES = {
    "bad checkpoints and wishes": "tests/compression/test_bad_input.py",
    "hostile files": "tests/compression/test_hostile.py",
    "numbers that are not finite": "tests/model/test_finite.py",
    "the hub and what goes wrong with it": "tests/checkpoint/test_hub.py",
}


def tests() -> None:
    """Count the tests of some files, in one process that collects them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow"]
    done = subprocess.run(
        [*command, *FILES.values()], capture_output=True, text=True, check=True
    )
    count = Counter(
        line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line
    )
    for what, name in FILES.items():
        print(f"{what}: {count[name]} tests")


def main() -> None:
    """Count."""
    kill_points()
    print(f"planted faults of the harness: {len(test_crash.FAULTS)}")
    statuses = Counter(fault.status for fault in test_faults.FAULTS.values())
    told = ", ".join(f"{count} with {status}" for status, count in sorted(statuses.items()))
    print(f"kinds of faults: {len(test_faults.FAULTS)} (exit status: {told})")
    tests()
    print(f"inputs of each property test: {settings().max_examples}")


if __name__ == "__main__":
    main()
