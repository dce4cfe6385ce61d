"""Run the commands of README on the built-in checkpoint, and draw the terminal as SVG.

    python tools/docs/make_recording.py [--report report.html]

writes docs/images/terminal.svg. What it shows is what the commands printed, on this machine;
the picture refers to nothing outside itself. ``--report`` keeps the report of the same run.
"""

import argparse
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from ream_stream.calibration.builtin import DOMAINS
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.cli.demo.command import FULL, write_texts

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "terminal.svg"
WIDTH = 96
TESTS = " ".join(f"--text {domain}=test-{domain}.safetensors" for domain in DOMAINS)
COMMANDS = (
    "compress tiny-moe smaller --keep 75% --calibration calibration.safetensors",
    "verify smaller",
    f"eval smaller --against tiny-moe {TESTS}",
)
KEPT = f"eval smaller --against tiny-moe --layers --json {TESTS}"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(CHECKPOINT, folder / "tiny-moe")
        write_texts(folder, FULL)
        for command in COMMANDS:
            console.print(Text(f"$ ream-stream {command}", style="bold"))
            console.print(Text(printed(command, folder).rstrip() + "\n"))
        if options.report:
            (folder / "eval.json").write_text(printed(KEPT, folder, both=False))
            printed("report smaller --results eval.json", folder)
            shutil.copyfile(folder / "report.html", options.report)
    form = re.sub(r"(?s)@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT)
    picture = console.export_svg(title="ream-stream", code_format=form)
    PICTURE.write_text(picture + "\n", encoding="utf-8")


def printed(command: str, folder: Path, *, both: bool = True) -> str:
    """Return what a command prints, on stderr too if `both`, for a terminal of this width."""
    done = subprocess.run(
        [sys.executable, "-m", "ream_stream", *shlex.split(command)],
        cwd=folder,
        env={**os.environ, "COLUMNS": str(WIDTH)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    main()
