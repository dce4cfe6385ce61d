"""The processor against the device, budgets of memory, and memory that runs out."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from found import Found
from runs import Run, plan_for, random_tokens
from runs import run as compressed
from torch import Tensor

from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import Checkpoint, open_checkpoint
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.events import BatchHalved
from ream_stream.model.streamed_model import Batch, StreamedModel
from ream_stream.settings import Method

CPU = torch.device("cpu")
KEEP = 24
CLOSE = 1e-5
"""Most relative difference of a statistic in float32."""

METHODS = {
    "REAP": Method(grouping="none"),
    "REAM": Method(grouping="ream"),
    "energy, refitted": Method(grouping="none", saliency="energy", refit="down"),
}

BF16 = (
    "bf16 products are summed in other orders and rounded in other places: routing of tokens "
    "near a tie differs, and with it what follows"
)


def run(device: torch.device, folder: Path, *, quick: bool) -> Iterator[Found]:
    """Yield what each check finds."""
    checkpoint = open_checkpoint(CHECKPOINT)
    tokens = random_tokens(checkpoint, 16 if quick else 64, 32 if quick else 128)
    for name, method in METHODS.items():
        for dtype in ("float32", "bfloat16"):
            if quick and (dtype == "bfloat16" or name == "REAM"):
                continue
            yield from _compared(checkpoint, tokens, device, folder, name, method, dtype)
    yield from _budget(checkpoint, tokens, device, folder)
    yield _short_of_memory(checkpoint, tokens, device, folder)


def _compared(
    checkpoint: Checkpoint,
    tokens: Tokens,
    device: torch.device,
    folder: Path,
    name: str,
    method: Method,
    dtype: str,
) -> Iterator[Found]:
    """Run on the processor and on the device, and compare what they find."""
    runs = [
        compressed(
            plan_for(checkpoint, tokens, each, experts=KEEP, method=method, dtype=dtype),
            tokens,
            folder / f"{name} {dtype} {place}",
            each,
        )
        for place, each in (("processor", CPU), ("device", device))
    ]
    one, other = (each.statistics() for each in runs)
    first = [key for key in one if key.startswith(min(one).split(" ")[0])]
    apart = {key: _apart(one[key], other[key]) for key in one}
    same = sum(a == b for a, b in zip(*(each.groups() for each in runs), strict=True))
    layers, what = len(runs[0].groups()), f"{name}, {dtype}, processor and device"
    exact = dtype == "float32"
    # what enters later layers has passed through layers of other experts if groups differ
    worst = max(apart.values() if exact else (apart[key] for key in first))
    yield Found(
        name=f"statistics: {what}",
        value=worst,
        unit="relative",
        passed=worst <= CLOSE if exact else None,
        note=f"at most {CLOSE:g}" if exact else f"first layer; {BF16}",
    )
    yield Found(
        name=f"layers with the same groups: {what}",
        value=same,
        unit=f"of {layers}",
        passed=same == layers if exact else None,
    )


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference as a share of the norm."""
    one, other = one.double(), other.double()
    return float((one - other).norm() / one.norm().clamp(min=1e-30))


def _budget(
    checkpoint: Checkpoint, tokens: Tokens, device: torch.device, folder: Path
) -> Iterator[Found]:
    """Hold a run on a device to a budget that its experts do not fit."""
    ways: dict[str, Any] = {"experts": KEEP, "method": METHODS["REAP"], "dtype": "float32"}
    if device.type != "cuda":
        yield Found(
            name="peak of device memory", value=None, unit="bytes", note="no device memory here"
        )
        return
    roomy = plan_for(checkpoint, tokens, device, **ways)
    kept = roomy.device_memory["experts kept"]
    vram = sum(roomy.device_memory.values()) - kept // 2
    plan = plan_for(checkpoint, tokens, device, vram=vram, **ways)
    done = compressed(plan, tokens, folder / "budget", device)
    peak, planned = done.finished.peak_device_bytes, sum(plan.device_memory.values())
    yield Found(
        name=f"peak of device memory, {plan.schedule.expert_blocks} blocks",
        value=peak,
        unit="bytes",
        passed=peak <= vram,
        note=f"planned {planned}, budget {vram}",
    )


def _short_of_memory(
    checkpoint: Checkpoint, tokens: Tokens, device: torch.device, folder: Path
) -> Found:
    """Let the device run out of memory once in the second layer."""
    ways: dict[str, Any] = {"experts": KEEP, "method": METHODS["REAP"], "dtype": "float32"}
    plan = plan_for(checkpoint, tokens, device, **ways)
    with _failing(device):
        done: Run = compressed(plan, tokens, folder / "short", device)
    halved = [event for event in done.events if isinstance(event, BatchHalved)]
    size = plan.schedule.batch_sequences
    wanted = replace(plan, schedule=replace(plan.schedule, batch_sequences=-(-size // 2)))
    plain = compressed(wanted, tokens, folder / "halved", device)
    return Found(
        name="batches halved where the device is out of memory",
        value=len(halved),
        unit="times",
        passed=len(halved) == 1 and done.groups() == plain.groups(),
        note="the groups of a run in half batches",
    )


@contextlib.contextmanager
def _failing(device: torch.device) -> Iterator[None]:
    """Let the first batch of layer 1 ask for more than the device has; of a CPU, pretend."""
    observe, left = StreamedModel.observe_layer, [1]

    def observe_layer(
        self: StreamedModel,
        index: int,
        batch: Batch,
        hidden_BLH: Tensor | None,
        *,
        sums: bool = False,
    ) -> None:
        if index == 1 and left[0]:
            left[0] -= 1
            if device.type != "cuda":
                raise torch.OutOfMemoryError("no memory, for this check")
            torch.empty(1 << 50, dtype=torch.uint8, device=device)
        observe(self, index, batch, hidden_BLH, sums=sums)

    StreamedModel.observe_layer = observe_layer  # type: ignore[method-assign]
    try:
        yield
    finally:
        StreamedModel.observe_layer = observe  # type: ignore[method-assign]
