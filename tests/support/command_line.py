"""Command lines, and one called within the process."""

import torch
from safetensors.torch import save_file

from ream_stream.__main__ import main


def call(capsys, *words):
    """Run a command line; return its status, what it printed and what it said."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def files(folder):
    """Every file of an output by name, the work folder aside."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def compression(source, output, tokens, *more):
    """Return the words of a command that merges a tiny checkpoint's eight experts into six."""
    given = ("compress", source, output, "--experts", 6, "--any-count", "--calibration", tokens)
    usual = ("--method", "ream", "--compute-dtype", "float32")
    return [str(word) for word in (*given, *usual, *more)]


def words_of(source, folder):
    """Write a few tokens; return what gives the words of a compression with them."""
    tokens = folder / "ids.safetensors"
    save_file({"input_ids": torch.arange(24).view(2, 12)}, tokens)
    return lambda output, *more: compression(source, output, tokens, *more)
