"""Time the compression of a 106M-parameter random Qwen3-MoE on one thread.

Makes the checkpoint (4 layers, hidden 512, inner 256, 64 experts, top-8, bf16), compresses
it to 48 experts over 128 x 256 random tokens with the default settings, merging (REAM) and
pruning (REAP), each in a process of its own, and prints seconds by phase, the peak of
anonymous memory, the products' GFLOP/s and the machine's own rate in the same run. With
--refit also both followed by a refit, and what that takes as a share of the run without it.

    python benchmarks/bench_compress.py [--threads 1] [--compute-dtype auto] [--refit]
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

SEQUENCES, LENGTH = 128, 256
EXPERTS, KEEP, TOP_K, LAYERS, HIDDEN, INNER = 64, 48, 8, 4, 512, 256
PHASES = ("check", "observe", "compare", "align", "refit", "write", "propagate")


def make_checkpoint(folder: Path) -> None:
    """Write the random model, in the layout of the hub."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=HIDDEN,
        intermediate_size=4 * INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.0f}M parameters", file=sys.stderr)
    model.save_pretrained(folder)


def product_rate(dtype_name: str) -> float:
    """Return GFLOP/s of a product the size of one expert on its share of a batch."""
    import torch

    dtype = getattr(torch, dtype_name)
    left, right = torch.randn(1024, HIDDEN).to(dtype), torch.randn(2 * INNER, HIDDEN).to(dtype)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 1.0:
        torch.nn.functional.linear(left, right)
        count += 1
    return 2 * 1024 * HIDDEN * 2 * INNER * count / (time.perf_counter() - start) / 1e9


def measure(
    source: Path, output: Path, grouping: str, refit: str, threads: int, dtype: str
) -> None:
    """Compress once and print a JSON object; run in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    from ream_stream.calibration.tokens import from_tensors
    from ream_stream.checkpoint.reader import open_checkpoint
    from ream_stream.compression.pipeline import compress
    from ream_stream.compression.workspace import Workspace
    from ream_stream.model.device import compute_dtype
    from ream_stream.planning.planner import make_plan
    from ream_stream.settings import Method, Settings

    device = torch.device("cpu")
    checkpoint = open_checkpoint(source)
    chosen = str(compute_dtype(dtype, torch.bfloat16, device)).removeprefix("torch.")
    generator = torch.Generator().manual_seed(0)
    vocabulary = checkpoint.config["vocab_size"]
    ids = torch.randint(0, vocabulary, (SEQUENCES, LENGTH), generator=generator)
    tokens = from_tensors({"input_ids": ids}, description="random tokens")
    method = Method(grouping=grouping, refit=refit)
    settings = Settings(experts=KEEP, method=method, compute_dtype=chosen)
    start = time.perf_counter()
    plan = make_plan(checkpoint, settings, SEQUENCES, LENGTH)
    workspace = Workspace(output=output, work=output / ".ream-stream")
    with workspace.locked():
        finished = compress(
            plan,
            tokens,
            workspace,
            device=device,
        )
    sample = min(method.similarity_tokens, ids.numel()) if grouping != "none" else 0
    pair = 2 * HIDDEN * INNER
    flop = {
        "observe": LAYERS * ids.numel() * TOP_K * 3 * pair,
        "compare": LAYERS * sample * EXPERTS * 2 * pair,
        "propagate": (LAYERS - 1) * ids.numel() * TOP_K * 3 * pair,
    }
    result = {
        "compute_dtype": chosen,
        "threads": threads,
        "seconds": time.perf_counter() - start,
        "seconds_by_phase": finished.seconds,
        "expert_gflops": {
            phase: count / finished.seconds[phase] / 1e9
            for phase, count in flop.items()
            if count
        },
        "machine_gflops": product_rate(chosen),
        "peak_anonymous_mb": finished.peak_anonymous_bytes / 1e6,
        "planned_mb": plan.memory_bytes / 1e6,
        "solver": str(plan.schedule.solver) if refit != "none" else None,
    }
    print(json.dumps(result))


def row(name: str, result: Mapping[str, Any], without: float) -> str:
    """Return a row of the table; `without` are the seconds of the run without a refit."""
    phases = result["seconds_by_phase"]
    cells = [
        f"{name}, {result['compute_dtype']}",
        f"{result['seconds']:.1f}",
        *(f"{phases[phase]:.1f}" if phase in phases else "" for phase in PHASES),
        f"{result['peak_anonymous_mb']:.0f}, {result['planned_mb']:.0f} MB",
        f"{result['expert_gflops']['observe']:.0f}, {result['machine_gflops']:.0f}",
        f"{result['seconds'] / without - 1:.2f} of the run" if result["solver"] else "",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run both methods and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compute-dtype", default="auto")
    parser.add_argument("--refit", action="store_true", help="measure refits too")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        source, output, grouping, refit = options.one
        dtype = options.compute_dtype
        measure(Path(source), Path(output), grouping, refit, options.threads, dtype)
        return
    runs = [("REAM", "ream", "none"), ("REAP", "none", "none")]
    if options.refit:
        runs += [("REAM, refit", "ream", "down"), ("REAP, refit", "none", "down")]
    alone: dict[str, float] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    heads = (
        "method, computed in",
        "seconds",
        *PHASES,
        "peak, planned",
        "GFLOP/s, machine's own",
    )
    print(f"| {' | '.join(heads)} | refit takes |\n|{'---|' * (len(heads) + 1)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        make_checkpoint(source)
        for name, grouping, refit in runs:
            command = [sys.executable, __file__, "--threads", str(options.threads)]
            command += ["--compute-dtype", options.compute_dtype]
            command += ["--one", str(source), str(Path(folder, name)), grouping, refit]
            run = subprocess.run(command, env=environment, check=True, capture_output=True)
            result = json.loads(run.stdout)
            print(row(name, result, alone.setdefault(grouping, result["seconds"])), flush=True)


if __name__ == "__main__":
    main()
