"""A whole run of eight layers of Qwen3-30B's shape, with its phases."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from found import Found
from runs import plan_for, random_tokens
from runs import run as compressed

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.planning.cost import cost_of
from ream_stream.settings import Method

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from make_large import Shape, write_checkpoint

LARGE = Shape(layers=8, experts=128, hidden=2048, inner=768, heads=32)
TINY = Shape(
    layers=2, experts=8, top_k=2, hidden=64, inner=32, heads=4, head_dim=16, vocabulary=128
)


def run(device: torch.device, folder: Path, *, quick: bool) -> Iterator[Found]:
    """Yield seconds and rates of each phase, and the peak of the device's memory."""
    shape, size = (TINY, (8, 32)) if quick else (LARGE, (256, 512))
    source = folder / "large"
    write_checkpoint(source, shape)
    checkpoint = open_checkpoint(source)
    tokens = random_tokens(checkpoint, *size)
    plan = plan_for(
        checkpoint,
        tokens,
        device,
        experts=shape.experts * 3 // 4,
        method=Method(grouping="none"),
        dtype="bfloat16",
    )
    done = compressed(plan, tokens, folder / "pruned", device)
    what = f"{shape.layers} layers of {shape.experts} experts, {size[0]} x {size[1]} tokens"
    cost = cost_of(plan, cache_bytes=1 << 62)
    for phase, seconds in done.finished.seconds.items():
        flop = cost[phase].flop if phase in cost else 0
        yield Found(
            name=f"whole run, {phase}",
            value=seconds,
            unit="s",
            note=f"{flop / seconds / 1e12:.4g} TFLOP/s" if flop and seconds else "",
        )
    yield Found(
        name="whole run", value=sum(done.finished.seconds.values()), unit="s", note=what
    )
    planned, peak = sum(plan.device_memory.values()), done.finished.peak_device_bytes
    yield Found(
        name="whole run, peak of device memory",
        value=peak if planned else None,
        unit="bytes",
        passed=peak <= planned if planned else None,
        note=f"planned {planned}" if planned else "no device memory here",
    )
