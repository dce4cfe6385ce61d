"""Compress a checkpoint many times larger than the budget, and measure the memory it takes.

Makes a 20.4 GB Qwen3-MoE checkpoint (`make_large.py`: layers of 4.8 GB), runs the command
``ream-stream compress`` on it with ``--ram 1.5GiB`` over random tokens, and reads RssAnon of
that process from outside every 20 ms. Prints what was planned, what was measured, by whom,
and where the time went. Needs 45 GB of disk, which it frees at its end.

    python benchmarks/bench_memory.py [--ram 1.5GiB] [--threads 2] [--tokens 16 128]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from make_large import Shape, write_checkpoint

from ream_stream import files
from ream_stream.file_access import free_bytes
from ream_stream.units import format_size

INTERVAL = 0.02
"""Seconds between two readings."""


def rss_anon(process: int) -> int:
    """Return anonymous resident memory of a process, 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, found, rest = status.partition("RssAnon:")
    return int(rest.split()[0]) * 1024 if found else 0


def compress(source: Path, output: Path, options: argparse.Namespace) -> tuple[Any, int]:
    """Run the command; return the facts it prints and the peak seen from outside."""
    sequences, length = options.tokens
    generator = torch.Generator().manual_seed(0)
    ids_SL = torch.randint(
        0, options.shape.vocabulary, (sequences, length), generator=generator
    )
    tokens = source.with_name("tokens.safetensors")
    files.write_tensors(tokens, {"input_ids": ids_SL})
    command = [sys.executable, "-m", "ream_stream", "compress", str(source), str(output)]
    command += ["--keep", "75%", "--ram", options.ram, "--threads", str(options.threads)]
    command += ["--calibration", str(tokens), "--device", "cpu", "--json"]
    command += ["--similarity-tokens", str(options.similarity_tokens)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(files.__file__).parent.parent),
    }
    peak = 0
    with (output.with_suffix(".json")).open("w+", encoding="utf-8") as printed:
        with subprocess.Popen(command, env=environment, stdout=printed) as process:
            while process.poll() is None:
                peak = max(peak, rss_anon(process.pid))
                time.sleep(INTERVAL)
        if process.returncode:
            raise SystemExit(f"compress ended with status {process.returncode}")
        printed.seek(0)
        return json.load(printed), peak


def layer_lines(output: Path) -> list[dict[str, Any]]:
    """Return what the run's log says about each layer."""
    log = output / ".ream-stream" / "log.jsonl"
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [event for event in events if event["event"] == "layer done"]


def show(facts: Mapping[str, Any], layers: list[dict[str, Any]], peak: int) -> None:
    """Print the measurement."""
    planned, budget = facts["memory_bytes"], facts["memory_budget_bytes"]
    sequences, length = facts["calibration_sequences"], facts["calibration_sequence_length"]
    print(f"source    {facts['source_bytes']:,} bytes, {facts['layers']} layers")
    print(
        f"tokens    {sequences} x {length} random ones, {facts['batch_sequences']} sequences "
        f"at a time, {facts['settings']['compute_dtype']}, {facts['threads']} threads"
    )
    print(f"budget    {format_size(budget)}")
    print(f"planned   {format_size(planned)} = {planned / budget:.3f} of the budget")
    for part, nbytes in facts["memory_parts"].items():
        print(f"  {part:<28}{format_size(nbytes):>10}")
    print(f"measured  {format_size(peak)} from outside = {peak / planned:.3f} of the plan")
    print(f"  the run's own gauge         {format_size(facts['peak_anonymous_bytes']):>10}")
    for layer in layers:
        own = format_size(layer["peak_anonymous_bytes"])
        phases = ", ".join(f"{name} {value:.1f}" for name, value in layer["seconds"].items())
        print(f"  layer {layer['layer']}: peak {own}, seconds: {phases}")
    phases = ", ".join(f"{n} {value:.1f}" for n, value in facts["seconds_by_phase"].items())
    print(f"seconds   {facts['seconds']:.1f}: {phases}")
    read = sum(layer["read_bytes"] for layer in layers)
    print(f"layers    {format_size(read)} of the source, ", end="")
    print(f"{format_size(sum(layer['written_bytes'] for layer in layers))} written")
    print(f"output    {facts['output_bytes']:,} bytes")
    print("held      " + ("yes" if peak <= planned <= budget else "NO"))


def main() -> None:
    """Make, compress, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to work  [default: a temporary one]")
    parser.add_argument("--ram", default="1.5GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 128))
    parser.add_argument("--similarity-tokens", type=int, default=4096)
    for name in ("layers", "experts", "hidden", "inner"):
        default = getattr(Shape(), name)
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    options.shape = Shape(
        layers=options.layers,
        experts=options.experts,
        hidden=options.hidden,
        inner=options.inner,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, output = Path(folder, "source"), Path(folder, "output")
        experts = options.layers * options.experts * 3 * options.hidden * options.inner * 2
        needed, free = 2.2 * experts, free_bytes(source)
        if needed > free:
            raise SystemExit(f"needs {format_size(needed)}, {format_size(free)} are free")
        start = time.monotonic()
        made = write_checkpoint(source, options.shape)
        seconds = time.monotonic() - start
        print(f"made      {format_size(made)} in {seconds:.1f} s", flush=True)
        facts, peak = compress(source, output, options)
        show(facts, layer_lines(output), peak)


if __name__ == "__main__":
    main()
