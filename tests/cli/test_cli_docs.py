import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools/docs/make_cli_docs.py"


def test_the_page_of_the_command_line_is_what_the_command_line_says():
    command = [sys.executable, str(TOOL), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
