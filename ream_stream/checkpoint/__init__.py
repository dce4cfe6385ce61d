"""Checkpoints on disk: headers and mapped tensors in, planned shards out."""
