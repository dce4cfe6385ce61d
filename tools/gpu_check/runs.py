"""Runs of the package that the checks share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ream_stream.calibration.tokens import Tokens, from_tensors
from ream_stream.checkpoint.reader import Checkpoint, vocab_size_of
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.events import Event, Finished
from ream_stream.model.device import free_bytes
from ream_stream.planning.plan import Plan
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Budgets
from ream_stream.settings import Method, Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run."""

    plan: Plan
    finished: Finished
    events: Sequence[Event]
    workspace: Workspace

    def statistics(self) -> dict[str, Tensor]:
        """Return the statistics of all layers, by layer and name."""
        found = {}
        for path in sorted(self.workspace.work.glob("statistics-*")):
            found |= {f"{path.stem} {key}": value for key, value in load_file(path).items()}
        return found

    def groups(self) -> list[Any]:
        """Return the groups of experts of each layer."""
        journal = self.workspace.begun()
        assert journal is not None
        return [layer.groups for layer in journal.layers]


def random_tokens(checkpoint: Checkpoint, sequences: int, length: int) -> Tokens:
    """Draw a calibration set."""
    stream = torch.Generator().manual_seed(0)
    size = vocab_size_of(checkpoint.config)
    assert size is not None
    ids_SL = torch.randint(0, size, (sequences, length), generator=stream)
    return from_tensors({"input_ids": ids_SL}, description="random tokens")


def plan_for(
    checkpoint: Checkpoint,
    tokens: Tokens,
    device: torch.device,
    *,
    experts: int,
    method: Method,
    dtype: str,
    vram: int | None = None,
) -> Plan:
    """Plan a run on a device; `vram` is its budget, None for what is free."""
    if device.type == "cuda" and vram is None:
        vram = free_bytes(device)
    settings = Settings(
        experts=experts, method=method, compute_dtype=dtype, device_kind=device.type
    )
    return make_plan(
        checkpoint,
        settings,
        tokens.num_sequences,
        tokens.sequence_length,
        budgets=Budgets.of(vram=vram),
        padded=False,
    )


def run(plan: Plan, tokens: Tokens, output: Path, device: torch.device) -> Run:
    """Compress, and keep the events."""
    workspace = Workspace(output=output, work=output / ".ream-stream")
    events: list[Event] = []
    with workspace.locked():
        finished = compress(plan, tokens, workspace, device=device, report=events.append)
    return Run(plan=plan, finished=finished, events=events, workspace=workspace)
