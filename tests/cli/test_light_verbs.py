"""Verbs that look at files only: they take no seconds for what computes."""

import shutil
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "numpy", "scipy", "zarr", "huggingface_hub"}
CODE = f"""
import sys
from ream_stream.__main__ import main
status = main(sys.argv[1:])
print("heavy:", *sorted(set(sys.modules) & {HEAVY}))
sys.exit(status)
"""


@pytest.mark.parametrize("verb", ["status", "inspect", "clean", "inspect source"])
def test_a_verb_that_computes_nothing_imports_nothing_that_does(
    verb, source, finished, tmp_path
):
    folder = shutil.copytree(source if "source" in verb else finished, tmp_path / "it")
    command = [sys.executable, "-c", CODE, verb.split()[0], str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy:\n")
