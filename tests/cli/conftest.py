"""What tests of the verbs share: a source, tokens, and the arguments of a compression."""

import pytest

from ream_stream.__main__ import main


@pytest.fixture(scope="session")
def source(checkpoints):
    return checkpoints("qwen3_moe")


@pytest.fixture(scope="session")
def words(source, token_file):
    """Return the arguments of a compression into a folder."""

    def give(output, *more):
        count = () if {"--keep", "--experts"} & set(more) else ("--experts", "6")
        fixed = ("--any-count", "--calibration", token_file, "--compute-dtype", "float32")
        return "compress", source, output, *count, *fixed, "--method", "ream", *more

    return give


@pytest.fixture(scope="session")
def finished(words, tmp_path_factory):
    """Give an output made without a stop."""
    output = tmp_path_factory.mktemp("finished") / "output"
    assert main([str(word) for word in words(output)]) == 0
    return output


@pytest.fixture
def copied(source, tmp_path):
    """Give a copy of the source that may be changed."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
