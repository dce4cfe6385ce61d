"""A checkpoint on the hub, against a server on loopback, and tokens to compress it with."""

import importlib
import shutil

import pytest
from hub_server import serving
from tiny_checkpoints import split_by_layer

from ream_stream.checkpoint import hub as product

# a verb has the name of the module
REPORT = importlib.import_module("ream_stream.cli.run")


@pytest.fixture(scope="module")
def tokens(token_file):
    return token_file


@pytest.fixture
def source(checkpoints, tmp_path):
    """Give a checkpoint of several shards, as the hub has it."""
    return split_by_layer(shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "remote"))


@pytest.fixture
def hub(source, tmp_path, monkeypatch):
    """Serve the source; give what answers."""
    monkeypatch.setattr(product.time, "sleep", lambda _: None)
    monkeypatch.setattr("ream_stream.compression.job.forecast", lambda *_, **__: None)
    monkeypatch.setattr(REPORT, "say_start", lambda *_, **__: None)
    with serving(source, tmp_path / "home", monkeypatch) as served:
        yield served
