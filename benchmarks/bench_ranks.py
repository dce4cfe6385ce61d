"""Measure what a second process gives: observe and propagate on 1 and on 2 ranks.

    python benchmarks/bench_ranks.py [--method ream] [--repeats 3] [--sequences 32]

A synthetic checkpoint of 2 layers with 32 experts (make_large.py) is compressed by one process
and by two, of one thread each, in turn. The ratio is of the seconds that the slowest rank takes
for both phases, the fewest of all repeats: by the clock, which tells only where as many
processors are idle, and of the processor, in which waiting for the other rank does not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ream_stream.units import format_size

PHASES = ("observe", "propagate")
LENGTH = 1024
SHAPE = ("--layers", "2", "--experts", "32", "--hidden", "512", "--inner", "256")


def work(source: str, output: str, tokens: str, method: str) -> None:
    """Compress on this rank, and print what each phase took."""
    from ream_stream.compression.context import Context
    from ream_stream.evaluation import api

    spent: dict[str, list[float]] = {}
    timed = Context.timed

    @contextmanager
    def measured(context: Context, phase: str) -> Iterator[None]:
        start = time.perf_counter(), time.process_time()
        with timed(context, phase):
            yield
        seconds = spent.setdefault(phase, [0.0, 0.0])
        seconds[0] += time.perf_counter() - start[0]
        seconds[1] += time.process_time() - start[1]

    Context.timed = measured  # type: ignore[method-assign]
    result = api.compress(
        source,
        output,
        experts=24,
        method=method,
        calibration=tokens,
        compute_dtype="float32",
        threads=1,
    )
    told = {"spent": spent, "sent": result.sent_bytes}
    Path(f"{output}-{os.environ.get('RANK', '0')}.json").write_text(
        json.dumps(told), encoding="utf-8"
    )


def measure(folder: Path, ranks: int, method: str, number: int) -> list[dict[str, Any]]:
    """Return what each of so many ranks spent."""
    output = folder / f"out-{ranks}-{number}"
    given = [
        __file__,
        "--work",
        str(folder / "source"),
        str(output),
        str(folder / "ids.safetensors"),
    ]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    subprocess.run(
        [sys.executable, *start, *given, "--method", method],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    files = [Path(f"{output}-{rank}.json") for rank in range(ranks)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def slowest(told: list[dict[str, Any]], clock: int) -> float:
    """Return the seconds of both phases on the slowest rank."""
    return max(sum(each["spent"][phase][clock] for phase in PHASES) for each in told)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="ream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--work", nargs=3)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options.method)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = Path(__file__).parent / "make_large.py"
        subprocess.run(
            [sys.executable, str(make), str(folder / "source"), *SHAPE],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        ids_SL = torch.arange(options.sequences * LENGTH).view(-1, LENGTH) * 7919 % 32000
        save_file({"input_ids": ids_SL}, folder / "ids.safetensors")
        found = {
            ranks: [measure(folder, ranks, options.method, n) for n in range(options.repeats)]
            for ranks in (1, 2)
        }
        same = all(
            (folder / f"out-1-0/{path.name}").read_bytes() == path.read_bytes()
            for path in (folder / "out-2-0").iterdir()
            if path.is_file()
        )
    print(f"{options.method}, {options.sequences} x {LENGTH} tokens, same bytes: {same}\n")
    print("| ranks | by the clock | processor | sent |\n|---|---|---|---|")
    fewest = {
        n: [min(slowest(t, c) for t in told) for c in (0, 1)] for n, told in found.items()
    }
    for ranks, (clock, processor) in fewest.items():
        sent = format_size(found[ranks][0][0]["sent"])
        print(f"| {ranks} | {clock:.1f} s | {processor:.1f} s | {sent} |")
    ratios = [one / two for one, two in zip(*fewest.values(), strict=True)]
    print(f"| ratio | {ratios[0]:.2f} | {ratios[1]:.2f} | |")


if __name__ == "__main__":
    main()
