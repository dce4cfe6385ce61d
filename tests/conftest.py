"""What every test relies on: no network, one thread, the same draws each time."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import cache, wraps

# before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

SEED = "REAM_STREAM_SEED"
"""Draws of hypothesis are from this number, which runs with the slow tests draw themselves."""

settings.register_profile(
    "drawn",
    database=None,
    deadline=None,
    print_blob=True,
    # whether a machine is busy decides nothing
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("same", settings.get_profile("drawn"), derandomize=True)

# Hypothesis also draws the numbers and texts that stand in the modules imported so far: which
# they are depends on the tests that ran before in this process, and on the folder's name.
providers._get_local_constants = lambda: providers._local_constants


def pytest_configure(config):
    """Draw the same inputs each time, or others with the slow tests."""
    if SEED not in os.environ and config.option.markexpr != "not slow":
        # workers inherit it
        os.environ[SEED] = str(random.SystemRandom().randrange(2**32))
    if SEED in os.environ:
        config.option.hypothesis_seed = os.environ[SEED]
    settings.load_profile("drawn" if SEED in os.environ else "same")
    # nohup and jobs of a shell in the background leave signals ignored that tests send
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_report_header():
    """Tell how the same inputs are drawn again."""
    return f"{SEED}={os.environ[SEED]}" if SEED in os.environ else None


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Give the folder of a family's tiny checkpoint, written once and never changed."""
    # it imports transformers, which not every test needs
    from tiny_checkpoints import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def give(name, dtype=torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        return write_checkpoint(folder / f"{name}-{kind}", name, dtype)

    return give


@pytest.fixture(scope="session")
def token_file(tmp_path_factory):
    """Give a file of calibration tokens for the tiny checkpoints."""
    from safetensors.torch import save_file
    from tiny_runs import some_tokens

    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file(some_tokens().tensors(), path)
    return path


@pytest.fixture
def mounted(tmp_path):
    """Give a function that mounts a file system in memory with some options, to be small."""
    with ExitStack() as stack:

        def mount(options):
            disk = tmp_path / "disk"
            disk.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
            try:
                subprocess.run(command, capture_output=True, check=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("mounting a small disk is not permitted")
            stack.callback(subprocess.run, ["umount", str(disk)], check=True)
            return disk

        yield mount


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _footprints_are_found_once():
    """Run a layer without data once: that is two thirds of the time of a tiny run.

    What it gives follows from the config, the headers and the arguments alone.
    """
    module = sys.modules.get("ream_stream.planning.activation_memory")
    if module is None:
        yield
        return
    find, found = module.Footprints.of, {}

    @wraps(find)
    def once(self, *args, **options):
        model, checkpoint = self.model, self.model.checkpoint
        headers = [(n, e.dtype, *e.shape) for n, e in sorted(checkpoint.entries.items())]
        key = json.dumps([model.model.config.to_dict(), headers, args, options], default=str)
        key += str(model.dtype)
        if key not in found:
            found[key] = find(self, *args, **options)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Footprints, "of", once)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws without a generator does not depend on the tests before."""
    torch.manual_seed(0)
