"""What every test relies on: no network, one thread, the same hypothesis draws each time."""

import os

# before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("ream-stream", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ream-stream")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
