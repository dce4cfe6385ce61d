"""Plan runs of published models on known GPUs, from headers alone, as a table.

    python benchmarks/bench_plans.py
    python benchmarks/bench_plans.py --ram 96GB --gpu h100 qwen3-30b-a3b

Every plan is that of `ream-stream plan HEADERS --keep 75% --gpu GPU --ram RAM`, for as many
calibration tokens as are the default. Times are by the rates of data sheets, by reads of
1 GB/s and by what this processor does at best of five times (hashing, and encoding of experts
that are quantized): nothing of them is measured on such a GPU.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ream_stream.compression.config import RunOptions
from ream_stream.compression.job import Job, prepare
from ream_stream.planning.gpus import GPUS
from ream_stream.planning.throughput import forecast

MAKER = Path(__file__).parents[1] / "tools" / "fixtures" / "make_headers.py"

MODELS = {
    "qwen3-30b-a3b": "Qwen3-30B-A3B, bf16",
    "gpt-oss-120b": "gpt-oss-120b, MXFP4",
    "deepseek-v4-flash": "DeepSeek-V4-Flash, FP4 and FP8",
    "glm-4.5-air": "GLM-4.5-Air, bf16",
    "qwen3-235b-a22b": "Qwen3-235B-A22B, bf16",
    "deepseek-v3-fp8": "DeepSeek-V3, FP8",
    "glm-4.6": "GLM-4.6, bf16",
    "kimi-k2-fp8": "Kimi-K2, FP8",
}
"""Published models, smallest first, by their names of make_headers.py."""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--keep", default="75%")
    parser.add_argument("--method", default="energy")
    parser.add_argument("--ram", default="48GB")
    parser.add_argument("--gpu", action="append", choices=list(GPUS))
    options = parser.parse_args()
    gpus = options.gpu or ["rtx-3090", "rtx-4090", "h100"]
    hours = " | ".join(f"hours, {gpu}" for gpu in gpus)
    print(f"| model | experts | weights, GB | disk, GB | RAM, GB | VRAM, GB | {hours} |")
    print("|---" * (6 + len(gpus)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            subprocess.run([sys.executable, MAKER, model, f"{folder}/{model}"], check=True)
            asked = RunOptions.of(
                source=Path(folder, model),
                keep=options.keep,
                method=options.method,
                ram=options.ram,
            )
            jobs = [prepare(asked, with_data=False, gpu=GPUS[gpu]) for gpu in gpus]
            plans = [job.plan for job in jobs]
            first = plans[0]
            print(
                f"| {MODELS.get(model, model)} "
                f"| {first.num_experts} -> {first.settings.experts} "
                f"| {first.source_bytes / 1e9:.0f} -> {first.output_bytes / 1e9:.0f} "
                f"| {_span(each.disk_bytes for each in plans)} "
                f"| {_span(each.memory_bytes for each in plans)} "
                f"| {_span(sum(each.device_memory.values()) for each in plans)} | "
                + " | ".join(f"{_seconds(job) / 3600:.1f}" for job in jobs)
                + " |",
                flush=True,
            )


def _seconds(job: Job) -> float:
    """Return the least time of five forecasts: other work on the machine disturbs them."""
    cpu = torch.device("cpu")
    found = [forecast(job.plan, cpu, gpu=job.gpu).seconds for _ in range(5)]
    return min(sum(seconds.values()) for seconds in found)


def _span(sizes: Iterable[int]) -> str:
    """Return gigabytes, from the least to the most."""
    known = [f"{size / 1e9:.0f}" for size in sorted(sizes)]
    low, high = known[0], known[-1]
    return low if low == high else f"{low}-{high}"


if __name__ == "__main__":
    main()
