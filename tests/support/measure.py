"""Compresses a checkpoint in a process of its own and tells how much memory that took.

Usage: python measure.py SOURCE OUTPUT DTYPE [--room BYTES] [--refit TARGET] [--slices] [--leak]

With --room the budget is what the interpreter takes and so much more, as if --ram had been
given; without, it is large, and batches are kept small.
"""

import argparse
import json
import os
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from ream_stream.calibration.tokens import from_tensors
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.events import LayerDone
from ream_stream.model.experts import ExpertWeights
from ream_stream.planning import allocation, planner
from ream_stream.planning.schedule import Budgets
from ream_stream.settings import Method, Settings

SEQUENCES, LENGTH = 16, 128
BATCH_TOKENS = 1024
"""Two batches, if the budget does not say."""

ROOMY_SEQUENCES = 64
"""With a budget: enough for the batch to matter."""


def rss_anon():
    """Read it from the kernel, not through the product's own gauge."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Sampler(threading.Thread):
    """Reads anonymous memory every two milliseconds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, rss_anon())


def leak_experts():
    """Keep a copy of every expert that is ever loaded."""
    kept, load = {}, ExpertWeights.load

    def keep(self, expert):
        loaded = load(self, expert)
        kept.setdefault((self.stack.prefix, expert), [part.clone() for part in loaded[:2]])
        return loaded

    ExpertWeights.load = keep


def make_plan(options, sequences):
    room, refit = options.room, options.refit
    checkpoint = open_checkpoint(Path(options.source))
    experts = checkpoint.config["num_experts"]
    settings = Settings(
        experts=experts * 3 // 2 if options.slices else experts * 3 // 4,
        method=Method(
            **({"grouping": "none", "slices": 2} if options.slices else {}),
            group_size=4,
            similarity_tokens=512,
            alignment_tokens=256,
            refit="down" if refit else "none",
            refit_target=refit or "layer",
        ),
        compute_dtype=options.dtype,
    )
    if room is None:
        allocation.MAX_BATCH_TOKENS = BATCH_TOKENS
        return planner.make_plan(checkpoint, settings, sequences, LENGTH), None
    # told the first time: what is loaded when a plan is made is in the second one's base
    for _ in range(2):
        planned = planner.make_plan(
            checkpoint, settings, sequences, LENGTH, budgets=Budgets.of(1 << 40)
        )
    ram = planned.memory["interpreter and libraries"] + room
    return planner.make_plan(
        checkpoint, settings, sequences, LENGTH, budgets=Budgets.of(ram)
    ), ram


def main(options):
    torch.set_num_threads(1)
    if options.leak:
        leak_experts()
    sequences = SEQUENCES if options.room is None else ROOMY_SEQUENCES
    planned, ram = make_plan(options, sequences)
    base = rss_anon()
    ids_SL = torch.arange(sequences * LENGTH).view(sequences, LENGTH) * 7 % 64
    tokens = from_tensors({"input_ids": ids_SL}, description="counted")
    output = Path(options.output)
    workspace = Workspace(output=output, work=output / ".ream-stream")
    sampler = Sampler()
    sampler.start()
    layers = []

    def report(event):
        if isinstance(event, LayerDone):
            layers.append(event.peak_anonymous_bytes)

    with workspace.locked():
        finished = compress(
            planned, tokens, workspace, device=torch.device("cpu"), report=report
        )
    sampler.done.set()
    sampler.join()
    told = {
        "base": base,
        "peak": sampler.peak,
        "layers": layers,
        "reported": finished.peak_anonymous_bytes,
        "planned": planned.memory_bytes,
        "parts": dict(planned.memory),
        "ram": ram,
        "batch": planned.schedule.batch_sequences,
        "trims_heap": planned.budgets.trims_heap,
        "solver": str(planned.schedule.solver),
    }
    print(json.dumps(told))


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("dtype")
    parser.add_argument("--room", type=int)
    parser.add_argument("--refit")
    parser.add_argument("--slices", action="store_true")
    parser.add_argument("--leak", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
