"""What ships with the package to be tried: a small real checkpoint and text for it."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "tiny-moe"
"""Folder of a Qwen3-MoE model of 3.9M parameters: 4 layers, 32 experts, top-4 routing."""
