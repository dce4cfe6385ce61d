"""Measure what verbs that look at files take of the processor, and importing the package.

    python benchmarks/bench_startup.py

Each is run in a process of its own, five times; the median is printed, of user and system time.
"""

import os
import resource
import statistics
import subprocess
import sys

from ream_stream.cli.demo import CHECKPOINT

COMMANDS = {
    "import ream_stream": ["-c", "import ream_stream"],
    "--help": ["-m", "ream_stream", "--help"],
    "inspect": ["-m", "ream_stream", "inspect", str(CHECKPOINT)],
    "status of a folder without a run": ["-m", "ream_stream", "status", str(CHECKPOINT)],
    "clean of a folder without a run": ["-m", "ream_stream", "clean", str(CHECKPOINT)],
}
TIMES = 5


def seconds(words: list[str]) -> float:
    """Return the processor time of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, check=False, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a table."""
    empty = statistics.median(seconds(["-c", ""]) for _ in range(TIMES))
    print("| command | seconds of the processor | of them the interpreter |")
    print("|---|---|---|")
    for name, words in COMMANDS.items():
        taken = statistics.median(seconds(words) for _ in range(TIMES))
        print(f"| {name} | {taken:.2f} | {empty:.2f} |")


if __name__ == "__main__":
    main()
