"""Print what plans of large models read, write and compute, beside the least that it could be.

    python benchmarks/bench_traffic.py [MODEL ...] [--budgets 16/24/20,64/24/118] [--refits]

Plans REAM at 75% of the experts over 3072 x 512 tokens for headers that
tools/fixtures/make_headers.py writes, for a host budget, a device's memory and a host's free
memory in GiB. The floor reads each weight once, writes the output once, and moves the states
of each boundary once each way, or does all products. Walls are paper: an RTX 4090 (120
TFLOP/s, 7 us a launch, nine launches an expert) with a disk that reads 5 GB/s and writes 3;
states at the rates of benchmarks/results/states.json, by zarr before the products or by ours
beside them. Matching neurons, merging, hashing and coding are not in them.

With --refits the table is of pruning by energy with a refit, beside REAP, which has none.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.config import PRESETS
from ream_stream.model.expert_blocks import cut_experts
from ream_stream.planning.cost import cost_of, total
from ream_stream.planning.plan import SUMS, Plan
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Budgets
from ream_stream.settings import Method, Settings

ROOT = Path(__file__).parents[1]
SEQUENCES, LENGTH = 3072, 512
READ, WRITE, FLOP, LAUNCH, LAUNCHES = 5e9, 3e9, 120e12, 7e-6, 9
ROWS = 1024
"""Most rows of an expert's product."""


def headers_module() -> ModuleType:
    """Return tools/fixtures/make_headers.py as a module."""
    path = ROOT / "tools" / "fixtures" / "make_headers.py"
    spec = importlib.util.spec_from_file_location("make_headers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def experts_of(item: tuple[str, Any]) -> int:
    """Return the value of a config's entry that is a number of experts of a layer, else 0."""
    key, value = item
    return int(value) if key in {"n_routed_experts", "num_experts", "num_local_experts"} else 0


def state_rates() -> dict[str, tuple[float, float]]:
    """Return bytes a CPU second of reading and writing states, by zarr and by ours."""
    printed = json.loads((ROOT / "benchmarks/results/states.json").read_text())["printed"]
    cells = [[cell.strip() for cell in line.split("|")] for line in printed]
    rows = {row[1]: row for row in cells if len(row) > 3}
    return {
        way: (1e9 * float(rows["read"][column]), 1e9 * float(rows["write"][column]))
        for way, column in (("zarr", 2), ("ours", 3))
    }


@dataclass(frozen=True)
class States:
    """Bytes of states and of sums over experts that a run moves."""

    read: int
    written: int

    @classmethod
    def of(cls, plan: Plan) -> "States":
        """Return those of a plan."""
        read = written = 0
        for layer in plan.layers:
            passes = 1
            if layer.stack is not None:
                blocks = plan.schedule.expert_blocks
                passes = len(cut_experts(plan.num_experts, blocks))
                passes += len(cut_experts(layer.stack.count, blocks))
            sums = (passes // 2 - 1) * plan.scratch.get(SUMS, 0) if passes > 2 else 0
            read += passes * plan.hidden_bytes * bool(layer.keys.index) + sums
            written += plan.hidden_bytes * plan.propagates(layer) + sums
        return cls(read, written)


def row(name: str, budget: str, plan: Plan, cache: int) -> list[str]:
    """Return the cells of a plan."""
    cost, states, rates = (
        total(cost_of(plan, cache_bytes=cache).values()),
        States.of(plan),
        state_rates(),
    )
    boundaries = plan.hidden_bytes * (len(plan.layers) - 1)
    least_read, least_write = plan.source_bytes + boundaries, plan.output_bytes + boundaries
    experts = [layer.keys.stack.count for layer in plan.moe_layers if layer.keys.stack]
    chunks = sum(
        2
        * plan.num_batches
        * max(count, SEQUENCES * LENGTH * plan.top_k // plan.num_batches // ROWS)
        for count in experts
    )
    device = max(cost.flop / FLOP, chunks * LAUNCHES * LAUNCH)
    uncached = cost.read_bytes - cost.cached_bytes
    weights = (
        max(0, uncached - states.read) / READ
        + max(0, cost.written_bytes - states.written) / WRITE
    )
    moved = {
        way: (states.read / read, states.written / write)
        for way, (read, write) in rates.items()
    }
    before = sum(moved["zarr"]) + device + weights
    after = max(*moved["ours"], states.read / READ + states.written / WRITE, device) + weights
    floor = max(least_read / READ + least_write / WRITE, cost.flop / FLOP)
    return [
        name,
        budget,
        str(plan.schedule.expert_blocks),
        f"{plan.schedule.resident_experts} of {plan.num_experts}",
        f"{cost.read_bytes / 1e12:.2f} ({uncached / 1e12:.2f})",
        f"{cost.written_bytes / 1e12:.2f}",
        f"{least_read / 1e12:.2f} / {least_write / 1e12:.2f}",
        f"{cost.flop / 1e15:.0f}",
        f"{before / 3600:.2f}",
        f"{after / 3600:.2f}",
        f"{floor / 3600:.2f}",
        f"{before / floor:.1f}, {after / floor:.1f}",
    ]


def refit_row(name: str, budget: str, free: int, reap: Plan, plan: Plan) -> list[str]:
    """Return the cells of a refit beside REAP."""
    least, cost = (
        total(cost_of(each, cache_bytes=max(0, free - each.memory_bytes)).values())
        for each in (reap, plan)
    )
    schedule = plan.schedule
    return [
        name,
        budget,
        str(schedule.expert_blocks),
        str(schedule.solver.column_blocks),
        f"{least.read_bytes / 1e12:.1f}",
        f"{cost.read_bytes / 1e12:.1f} ({(cost.read_bytes - cost.cached_bytes) / 1e12:.1f})",
        f"{cost.read_bytes / least.read_bytes:.1f}",
        f"{least.written_bytes / 1e12:.1f}, {cost.written_bytes / 1e12:.1f}",
        f"{least.flop / 1e15:.0f}, {cost.flop / 1e15:.0f}",
        f"{cost.decoded_numbers / 1e12:.1f}",
    ]


def main() -> None:
    """Print a table."""
    headers = headers_module()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(headers.CONFIGS))
    parser.add_argument("--budgets", default="16/24/20,64/24/118")
    parser.add_argument("--refits", action="store_true")
    options = parser.parse_args()
    heads = ("model", "ram/vram/free GiB", "blocks", "experts kept on the device")
    heads += ("read TB (not cached)", "written TB", "least read / written TB", "PFLOP")
    heads += ("wall h, states by zarr", "wall h, by ours", "floor h", "ratios")
    if options.refits:
        heads = ("model", "ram/vram/free GiB", "blocks", "parts of columns", "REAP reads TB")
        heads += ("refit reads TB (not cached)", "ratio", "written TB", "PFLOP")
        heads += ("10^12 numbers decoded",)
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, name)
            headers.write_headers(source, headers.CONFIGS[name])
            checkpoint = open_checkpoint(source, with_data=False)
            kept = max(map(experts_of, headers.CONFIGS[name].items())) * 3 // 4
            methods = ("reap", "energy") if options.refits else ("ream",)
            asked = [
                Settings(experts=kept, method=Method(**PRESETS[each]), compute_dtype="bfloat16")
                for each in methods
            ]
            for budget in options.budgets.split(","):
                ram, vram, free = (int(part) << 30 for part in budget.split("/"))
                budgets = Budgets(ram=ram, trims_heap=True, available=free, vram=vram)
                plans = [
                    make_plan(
                        checkpoint, each, SEQUENCES, LENGTH, budgets=budgets, padded=False
                    )
                    for each in asked
                ]
                cells = (
                    refit_row(name, budget, free, *plans)
                    if options.refits
                    else row(name, budget, plans[0], max(0, free - plans[0].memory_bytes))
                )
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
