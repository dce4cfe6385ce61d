"""A command line called within the process."""

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
