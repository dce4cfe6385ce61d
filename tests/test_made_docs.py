"""Pages that are made: from the command line's help, and from kept results of benchmarks."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools" / "docs"


@pytest.mark.parametrize("tool", ["make_cli_docs.py", "make_results.py", "make_chart.py"])
def test_the_pages_are_what_they_are_made_from(tool):
    command = [sys.executable, str(TOOLS / tool), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
