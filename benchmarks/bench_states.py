"""Measure the rates of the hidden-state store, by zarr's own functions and by ours, in pairs.

    python benchmarks/bench_states.py [--mb 32] [--batches 16] [--pairs 5] [--folder FOLDER]

Writes and publishes a store of bf16 batches and reads it again, in turn by zarr's array on its
local store, as it was done before, and by `HiddenWriter` and `HiddenStates`, with batches read
ahead and written behind. Prints GB per second of the processor (of all threads) and of wall
time, the median of the pairs, and the median ratio of a pair. Both stores hold the same bytes.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from ream_stream import files
from ream_stream.model.hidden_states import HiddenStates, HiddenWriter

WIDTH, LENGTH = 2048, 512

Times = tuple[float, float]
"""Seconds of the processor, and of wall time."""


def timed(work: Callable[[], None]) -> Times:
    """Return what some work takes."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - processor, time.perf_counter() - wall


def by_zarr(path: Path, batches: list[Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what writes and what reads a store through zarr's array."""
    rows = len(batches[0])

    def write() -> None:
        partial = path.with_name(path.name + files.PARTIAL)
        array = zarr.create_array(
            LocalStore(partial),
            shape=(rows * len(batches), LENGTH, WIDTH),
            chunks=(rows, LENGTH, WIDTH),
            dtype="uint16",
            compressors=[Crc32cCodec()],
            fill_value=65535,
            attributes={"dtype": "bfloat16"},
            config={"write_empty_chunks": True},
        )
        for number, batch in enumerate(batches):
            array[number * rows : (number + 1) * rows] = batch.view(torch.uint16).numpy()
        files.publish_directory(partial, path)

    def read() -> None:
        array = zarr.open_array(LocalStore(path, read_only=True), mode="r")
        for number in range(len(batches)):
            torch.from_numpy(array[number * rows : (number + 1) * rows]).view(torch.bfloat16)

    return write, read


def by_ours(path: Path, batches: list[Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what writes and what reads a store as a run does."""
    rows = len(batches[0])
    store = ((rows * len(batches), LENGTH, WIDTH), torch.bfloat16, rows)

    def write() -> None:
        with HiddenWriter(path, *store) as writer:
            for number, batch in enumerate(batches):
                writer.write(number, batch)
            writer.publish()

    def read() -> None:
        for _ in HiddenStates(path, *store).ahead(range(len(batches))):
            pass

    return write, read


def same_files(one: Path, other: Path) -> bool:
    """Tell whether two folders hold the same bytes under the same names."""
    found = [
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (one, other)
    ]
    return found[0] == found[1]


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=32, help="MiB of a batch")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where, by default the temporary folder")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = max(1, options.mb * 2**20 // (2 * WIDTH * LENGTH))
    batches = [torch.randn(rows, LENGTH, WIDTH).bfloat16() for _ in range(options.batches)]
    gigabytes = sum(batch.nbytes for batch in batches) / 1e9
    ways = {"zarr": by_zarr, "ours": by_ours}
    taken: dict[tuple[str, str], list[Times]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for pair in range(options.pairs):
            # each is first in every other pair
            for name in sorted(ways, reverse=bool(pair % 2)):
                path = Path(folder, name)
                shutil.rmtree(path, ignore_errors=True)
                write, read = ways[name](path, batches)
                taken.setdefault((name, "write"), []).append(timed(write))
                taken.setdefault((name, "read"), []).append(timed(read))
        if not same_files(Path(folder, "zarr"), Path(folder, "ours")):
            print("the stores have other bytes", file=sys.stderr)
            return 1
    print(
        f"{len(batches)} batches of {batches[0].nbytes / 1e6:.0f} MB, {options.pairs} pairs\n"
    )
    print(
        "| | zarr, GB per CPU s | ours | ratio | zarr, GB per s of wall time | ours | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    for what in ("write", "read"):
        cells = []
        for kind in (0, 1):
            old, new = ([t[kind] for t in taken[name, what]] for name in ways)
            ratio = statistics.median(a / b for a, b in zip(old, new, strict=True))
            cells += [f"{gigabytes / statistics.median(t):.2f}" for t in (old, new)]
            cells.append(f"{ratio:.1f}")
        print(f"| {what} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
