"""Print the numbers of docs/concepts/reliability.md: what is tried, and how often.

    python tools/stress/reliability.py

Kill points are counted in a run of the tests' tiny checkpoint; everything else in the tables
and parameters of the tests themselves, which `make test-all` runs. With --runs it also runs
what else the page tells the results of: fuzz.py and soak.py.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "compression"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
# the last is looked in first: of two files conftest.py, the one with the profile
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import conftest  # noqa: F401 - its profile of hypothesis
import killed_runs
import test_crash
import test_faults
from crash import kills

ROOT = Path(__file__).parents[2]


def kill_points() -> None:
    """Count the kills of every variant of a run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        source = killed_runs.write_source(Path(scratch) / "source")
        for name, wanted in killed_runs.VARIANTS.items():
            folder = Path(scratch) / name
            folder.mkdir()
            mtp = name == "mtp"
            of = killed_runs.write_mtp_source(folder / "source") if mtp else source
            runs = killed_runs.Runs(of, wanted, folder)
            steps = runs.control().ending.steps
            kinds = Counter(step.kind for step in steps)
            print(f"{name}: {len(kills(steps, thin=True))} kill points, {len(kills(steps))} "
                  f"with every piece of a file ({_listed(kinds)})")  # fmt: skip


FILES = {
    "bad checkpoints and wishes": "tests/compression/test_bad_input.py",
    "hostile files": "tests/compression/test_hostile.py",
    "numbers that are not finite": "tests/model/test_finite.py",
    "the hub and what goes wrong with it": "tests/checkpoint/test_hub.py",
    "whose files they are": "tests/compression/test_workspace.py",
    "disks that are really full": "tests/compression/test_full_disk.py",
    "how a command ends": "tests/cli/test_main.py",
}


def tests() -> None:
    """Count the tests of some files and of each folder, in one process that collects them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line]
    count = Counter(names)
    for what, name in FILES.items():
        print(f"{what}: {count[name]} tests")
    folders = Counter(str(Path(name).parent) for name in names)
    print(f"all: {len(names)} tests ({_listed(folders)})")


def runs() -> None:
    """Feed changed files to the parsers, and kill a run of 100 layers until it is done."""
    for words in (["fuzz.py", "--seconds", "60", "--seed", "1"],
                  ["soak.py", "--layers", "100", "--seed", "1"]):  # fmt: skip
        print(*words, flush=True)
        subprocess.run([sys.executable, ROOT / "tools" / "stress" / words[0], *words[1:]])


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def main() -> None:
    """Count."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--runs", action="store_true", help="also what takes minutes")
    asked = options.parse_args()
    kill_points()
    print(f"planted faults of the harness: {len(test_crash.FAULTS)}")
    statuses = Counter(fault.status for fault in test_faults.FAULTS.values())
    told = ", ".join(f"{count} with {status}" for status, count in sorted(statuses.items()))
    print(f"kinds of faults: {len(test_faults.FAULTS)} (exit status: {told})")
    tests()
    print(f"inputs of each property test: {settings.get_profile('same').max_examples}")
    if asked.runs:
        runs()


if __name__ == "__main__":
    main()
