"""The verb `eval`."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from .options import machine_options
from .style import Verb, exit_statuses, json_option, option, together

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("eval", cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 12, 130))
@click.argument("checkpoint", type=_FOLDER)
@option(
    "Text",
    "--text",
    multiple=True,
    required=True,
    metavar="SOURCE",
    help="What --calibration takes; NAME=SOURCE for each domain of several.",
)
@option(
    "Text",
    "--text-field",
    default="text",
    show_default=True,
    help="Field of each record that holds the text.",
)
@option(
    "Text",
    "--sequence-length",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens of a sequence.",
)
@option(
    "Text",
    "--max-tokens",
    type=click.IntRange(min=2),
    help="Take no more of each.  [default: all]",
)
@option(
    "Text", "--against", type=_FOLDER, metavar="OTHER", help="Compare with this checkpoint."
)
@together(machine_options())
@option(
    "Machine",
    "--work-dir",
    type=_FOLDER,
    metavar="DIR",
    help="Where hidden states go.  [default: the system's temporary folder]",
)
@json_option
def evaluate(
    checkpoint: Path,
    against: Path | None,
    work_dir: Path | None,
    *,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - those of `Scored`
) -> None:
    """Measure how well CHECKPOINT predicts a text, without ever loading it.

    Prints the perplexity, and with --against the difference between two checkpoints, which
    is known more exactly than either: both predict the same tokens.

    Example:

    \b
        ream-stream eval ./Qwen3-23B --text test.txt
        ream-stream eval ./Qwen3-23B --against ./Qwen3-30B-A3B --text test.jsonl \\
            --max-tokens 100000
    """
    from .scoring import prepare, score, score_facts, score_table
    from .signals import stop_requests
    from .tables import console, print_json

    folders = [folder for folder in (checkpoint, against) if folder is not None]
    job = prepare(folders, **values)
    shown = console(stderr=True)
    with ExitStack() as stack:
        work = work_dir or Path(stack.enter_context(TemporaryDirectory(prefix="ream-stream-")))
        asked = stack.enter_context(stop_requests())
        scores = [score(job, each, work, shown, asked) for each in job.checkpoints]
    if as_json:
        print_json(score_facts(job, scores))
    else:
        console(stderr=False).print(score_table(job, scores))
