"""Compress Mixture-of-Experts checkpoints larger than memory."""

__version__ = "0.1.0"
