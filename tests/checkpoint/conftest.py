"""A checkpoint on the hub, against a server on loopback, and tokens to compress it with."""

import importlib
import shutil

import pytest
from hub_server import serving
from safetensors.torch import save_file
from tiny_checkpoints import split_by_layer
from tiny_runs import some_tokens

from ream_stream.checkpoint import hub as product

# a verb has the name of the module
REPORT = importlib.import_module("ream_stream.cli.run")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file(some_tokens().tensors(), path)
    return path


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
