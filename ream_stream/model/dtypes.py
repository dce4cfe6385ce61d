"""Dtypes that a checkpoint is stored in, and that its layers are run in."""

import torch

from ream_stream.checkpoint.formats import FLOATS
from ream_stream.checkpoint.header import torch_dtype
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.model import device as devices


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the float dtype that most bytes are in; bfloat16 if all is quantized."""
    total: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype in FLOATS:
            total[entry.dtype] = total.get(entry.dtype, 0) + entry.nbytes
    return torch_dtype(max(total, key=lambda name: total[name], default="BF16"))


def compute_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return what ``--compute-dtype`` means for a checkpoint."""
    return devices.compute_dtype(name, stored_dtype(checkpoint), device)
