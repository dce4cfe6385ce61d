"""Print the numbers of docs/reliability.md: what is tried, and how often.

    python tools/reliability.py

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

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

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


def collected(*names: str) -> int:
    """Count the tests of some files."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow"]
    done = subprocess.run([*command, *names], capture_output=True, text=True, check=True)
    return sum("::" in line for line in done.stdout.splitlines())


def main() -> None:
    """Count."""
    kill_points()
    print(f"planted faults of the harness: {len(test_crash.FAULTS)}")
    statuses = Counter(fault.status for fault in test_faults.FAULTS.values())
    told = ", ".join(f"{count} with {status}" for status, count in sorted(statuses.items()))
    print(f"kinds of faults: {len(test_faults.FAULTS)} (exit status: {told})")
    print(f"bad checkpoints and wishes: {collected('tests/test_bad_input.py')} tests")
    print(f"hostile files: {collected('tests/test_hostile.py')} tests")
    print(f"numbers that are not finite: {collected('tests/test_finite.py')} tests")
    print(f"the hub and what goes wrong with it: {collected('tests/test_hub.py')} tests")
    print(f"inputs of each property test: {settings().max_examples}")


if __name__ == "__main__":
    main()
