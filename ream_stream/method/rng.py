"""Where randomness comes from: never a global generator."""

import hashlib

import torch


def generator(seed: int, layer: int, purpose: str) -> torch.Generator:
    """Return the random stream for one use in one layer; independent of what ran before.

    What belongs to no layer is drawn for layer 0, under a purpose of its own.
    """
    key = hashlib.sha256(f"{seed}/{layer}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8]) >> 1)
