"""Work out on paper what more GPUs give, from plans of published models, as a table.

    python benchmarks/bench_scale.py [MODEL ...] [--gpu h100] [--gloo 2e9] [--read 5e9]

Terms of a run, in hours, each by arithmetic on the plan of `ream-stream plan HEADERS --keep 75%
--gpu GPU --ram 160GB` and a rate that is assumed: half of the data sheet's products, bytes a
second that gloo carries between two ranks, and that a machine reads and writes. Of a refit no
product counts as divided, though a part is. Hashing, encoding and matching are left out.
Nothing is measured.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_plans import MAKER, MODELS

from ream_stream.compression.config import RunOptions
from ream_stream.compression.job import Job, prepare
from ream_stream.method.normal_equations import NormalSums
from ream_stream.planning.gpus import EFFICIENCY, GPUS
from ream_stream.planning.phase_cost import DIVIDED

SHOWN = ("qwen3-235b-a22b", "deepseek-v3-fp8", "kimi-k2-fp8")
METHODS = ("reap", "ream", "energy", "slices")
MACHINES = ((1, 1), (1, 2), (1, 4), (1, 8), (4, 8))
"""Machines, and GPUs of each."""


def carried(job: Job) -> int:
    """Return the bytes of all sums that one batch hands to the next, in all layers."""
    plan, method = job.plan, job.plan.settings.method
    count, inner = plan.num_experts, plan.experts[0].inner
    total = 8 * 7 * count + (8 * count**2 if plan.merges and method.gate_term else 0)
    if method.slices:
        total += 4 * count * inner**2
    if plan.refits:
        kept, solver = plan.experts[1], plan.schedule.solver
        blocks = solver.preconditioner == "blocks"
        columns = -(-kept.hidden // solver.column_blocks)
        total += NormalSums.nbytes(kept.count, kept.inner, columns, blocks=blocks)
        # what each block of columns sums anew, and a product for all iterations but the last
        again = solver.column_blocks - 1 + solver.column_blocks * (method.refit_iterations - 1)
        total += 4 * kept.count * kept.inner * columns * again
    return total * len(plan.moe_layers)


def terms(job: Job, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of each term on one GPU, or of one hop of sums a batch."""
    assert job.forecast is not None
    assert job.gpu is not None
    costs, rate = job.forecast.costs, EFFICIENCY * job.gpu.bf16
    total = job.forecast.total
    return {
        "divided": sum(costs[name].flop for name in DIVIDED) / rate,
        "refit": sum(cost.flop for name, cost in costs.items() if name not in DIVIDED) / rate,
        "sums": carried(job) * (job.plan.num_batches - 1) / options.gloo,
        "files": (total.read_bytes - total.cached_bytes + total.written_bytes) / options.read,
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=SHOWN)
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--gloo", type=float, default=2e9)
    parser.add_argument("--read", type=float, default=5e9)
    options = parser.parse_args()
    gpus = " | ".join(f"{m} x {n}" if m > 1 else str(n) for m, n in MACHINES)
    heads = "model | method | divided, h | refit, h | files, h | sums, GB a batch | sums, h"
    print(f"| {heads} | {gpus} |")
    print("|---" * (7 + len(MACHINES)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            subprocess.run([sys.executable, MAKER, model, f"{folder}/{model}"], check=True)
            for method in METHODS:
                asked = RunOptions.of(
                    source=Path(folder, model), keep="75%", method=method, ram="160GB"
                )
                job = prepare(asked, with_data=False, gpu=GPUS[options.gpu])
                found = {name: each / 3600 for name, each in terms(job, options).items()}
                cells = []
                for machines, each in MACHINES:
                    ranks = machines * each
                    hours = found["divided"] / ranks + found["refit"] + found["files"]
                    cells.append(f"{hours + (ranks > 1) * found['sums'] / ranks:.1f}")
                print(
                    f"| {MODELS[model]} | {method} | {found['divided']:.1f} "
                    f"| {found['refit']:.1f} | {found['files']:.1f} "
                    f"| {carried(job) / 1e9:.1f} | {found['sums']:.1f} | "
                    + " | ".join(cells)
                    + " |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
