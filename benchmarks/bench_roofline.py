"""Tell how much of this machine's rates each phase of a run reaches.

Makes the 106M-parameter Qwen3-MoE of `bench_compress.py`, compresses it, and divides what
each phase had to compute by its seconds and by the rate of one large product; both with the
same threads. To tell what bounds it, an expert is run alone on its share of a batch: its
two products, and then with all that is done around them when it is observed.

The same is told of a checkpoint of 3 GB with experts of Qwen3-30B's shape, which is pruned, so
that writing it is copying: what was written a second is divided by the rate of copying a file
and syncing it.

    python benchmarks/bench_roofline.py [--threads 1] [--folder DIR]
    python benchmarks/bench_roofline.py --kernels

With --kernels nothing is compressed: GFLOP/s of products in bf16 and float32 are told, and
what the first product with each new number of rows takes in bf16, of time and of memory.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_compress import HIDDEN, INNER, make_checkpoint, product_rate
from make_large import Shape, write_checkpoint
from torch.nn import functional

from ream_stream.calibration.tokens import Tokens, from_tensors
from ream_stream.checkpoint.reader import Checkpoint, open_checkpoint
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.events import Finished
from ream_stream.host_memory import anonymous_bytes, bound_kernel_caches
from ream_stream.model.device import compute_dtype
from ream_stream.model.experts import MAX_ROWS
from ream_stream.planning.cost import cost_of
from ream_stream.planning.plan import Plan
from ream_stream.planning.planner import make_plan
from ream_stream.settings import Method, Settings
from ream_stream.units import format_size

CPU = torch.device("cpu")
KEEP = 48
LARGE = Shape(layers=4, experts=64, hidden=2048, inner=768, heads=32)


def random_tokens(sequences: int, length: int) -> Tokens:
    """Draw a calibration set."""
    generator = torch.Generator().manual_seed(0)
    ids_SL = torch.randint(0, 2048, (sequences, length), generator=generator)
    return from_tensors({"input_ids": ids_SL}, description="random tokens")


def run(
    source: Checkpoint, output: Path, tokens: Tokens, grouping: str, threads: int
) -> tuple[Plan, Finished]:
    """Compress once."""
    dtype = str(compute_dtype("auto", torch.bfloat16, CPU)).removeprefix("torch.")
    method = Method(grouping=grouping)
    settings = Settings(experts=KEEP, method=method, compute_dtype=dtype)
    plan = make_plan(
        source, settings, tokens.num_sequences, tokens.sequence_length, padded=False
    )
    workspace = Workspace(output=output, work=output / ".ream-stream")
    with workspace.locked():
        return plan, compress(
            plan,
            tokens,
            workspace,
            device=CPU,
        )


def expert_rates(plan: Plan) -> dict[str, float]:
    """Return GFLOP/s of an expert's products alone, and with what observing does around."""
    stack = plan.moe_layers[0].keys.stack
    assert stack is not None
    hidden, inner, dtype = stack.hidden, stack.inner, plan.dtype
    tokens = plan.schedule.batch_sequences * plan.sequence_length
    rows = min(tokens * plan.top_k // plan.num_experts, MAX_ROWS)
    gate_up, down_HI = torch.ones(2 * inner, hidden), torch.ones(hidden, inner)
    gate_up, down_HI = gate_up.to(dtype), down_HI.to(dtype)
    hidden_TH, inner_RI = torch.randn(tokens, hidden).to(dtype), torch.randn(rows, inner)
    token_R, inner_RI = torch.randperm(tokens)[:rows], inner_RI.to(dtype)
    hidden_RH = hidden_TH[:rows].clone()

    def products() -> None:
        functional.linear(hidden_RH, gate_up)
        functional.linear(inner_RI, down_HI)

    def observed() -> None:
        product = functional.linear(hidden_TH.index_select(0, token_R), gate_up)
        gate, up = product.chunk(2, dim=1)
        output_RH = functional.linear(functional.silu(gate) * up, down_HI)
        torch.linalg.vector_norm(output_RH, dim=1, dtype=torch.float32)

    return {
        name: 6 * rows * hidden * inner / seconds_of(run) / 1e9
        for name, run in (("expert's products", products), ("observed expert", observed))
    }


def seconds_of(run: Callable[[], None]) -> float:
    """Return the seconds of one call, as a mean over half a second."""
    run()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls


def copy_rate(source: Checkpoint, folder: Path) -> float:
    """Return bytes a second of copying the source's files and syncing the copies."""
    done, start = 0, time.perf_counter()
    for path in source.files():
        copy = folder / "copy"
        shutil.copyfile(path, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
        done += copy.stat().st_size
        copy.unlink()
    return done / (time.perf_counter() - start)


def show_products(plan: Plan, finished: Finished, rate: float) -> None:
    """Print, for each phase that has products, its share of the product rate."""
    print(f"one product       {rate:6.0f} GFLOP/s in {plan.settings.compute_dtype}")
    for name, reached in expert_rates(plan).items():
        print(f"{name:<17} {reached:6.0f} GFLOP/s {reached / rate:5.0%}")
    for phase, work in cost_of(plan, cache_bytes=1 << 62).items():
        seconds = finished.seconds.get(phase, 0.0)
        flop = work.expert_flop + work.product_flop
        if flop and seconds:
            reached = flop / seconds / 1e9
            print(f"{phase:<17} {reached:6.0f} GFLOP/s {reached / rate:5.0%} {seconds:6.1f} s")


def show_copies(plan: Plan, finished: Finished, rate: float) -> None:
    """Print the rate of writing, and its share of the rate of copying."""
    seconds = finished.seconds["write"] + finished.seconds["finish"]
    written = plan.output_bytes / seconds
    print(f"one copy          {format_size(int(rate))}/s")
    print(
        f"pruned            {format_size(int(written))}/s {written / rate:5.0%} of "
        f"{format_size(plan.output_bytes)} in {seconds:.1f} s; in all "
        f"{sum(finished.seconds.values()):.1f} s"
    )


def show_kernels() -> None:
    """Print rates of products, and what products with ever new numbers of rows take."""
    for name in ("bfloat16", "float32"):
        print(f"{name:<9} {product_rate(name):.0f} GFLOP/s")
    weight = torch.ones(2 * INNER, HIDDEN, dtype=torch.bfloat16)
    rows = range(1, 401)
    inputs = [torch.ones(count, HIDDEN, dtype=torch.bfloat16) for count in rows]
    functional.linear(inputs[-1], weight)
    before, times = anonymous_bytes(), []
    for _ in range(2):
        start = time.perf_counter()
        for given in inputs:
            functional.linear(given, weight)
        times.append(time.perf_counter() - start)
    taken = (anonymous_bytes() - before) / len(rows)
    slower = (times[0] - times[1]) / len(rows) * 1e3
    print(f"a new number of rows takes {slower:.2f} ms and {format_size(int(taken))} more")


def main() -> None:
    """Run both and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work  [default: a temporary one]")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--tokens", type=int, nargs=2, default=(128, 256))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.kernels:
        show_kernels()
        return
    bound_kernel_caches()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_checkpoint(folder / "source")
        source = open_checkpoint(folder / "source")
        tokens = random_tokens(*options.tokens)
        plan, finished = run(source, folder / "merged", tokens, "ream", options.threads)
        show_products(plan, finished, product_rate(plan.settings.compute_dtype))
        large_bytes = write_checkpoint(folder / "large", LARGE)
        large = open_checkpoint(folder / "large")
        rate = copy_rate(large, folder)
        plan, finished = run(
            large, folder / "pruned", random_tokens(32, 256), "none", options.threads
        )
        print(f"\n{format_size(large_bytes)}, hidden {LARGE.hidden}, inner {LARGE.inner}")
        show_products(plan, finished, product_rate(plan.settings.compute_dtype))
        show_copies(plan, finished, rate)


if __name__ == "__main__":
    main()
