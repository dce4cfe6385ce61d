"""What every test relies on: no network, one thread, the same hypothesis draws each time."""

import os
from functools import cache

# before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("ream-stream", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ream-stream")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Give the folder of a family's tiny checkpoint, written once and never changed."""
    import tiny  # it imports transformers, which not every test needs

    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def give(name, dtype=torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        return tiny.write_checkpoint(folder / f"{name}-{kind}", name, dtype)

    return give


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
