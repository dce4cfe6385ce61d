"""The verb `eval`."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from .options import machine_options
from .params import Size, Verb, exit_statuses, json_option, option, together

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("eval", cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 12, 130))
@click.argument("checkpoint", type=_FOLDER)
@option(
    "Text",
    "--text",
    multiple=True,
    metavar="SOURCE",
    help="What --calibration takes; NAME=SOURCE for each domain of several.",
)
@option(
    "Text",
    "--questions",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Multiple-choice questions, JSON lines of question, choices and answer.",
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
    help="Tokens of a sequence, and of a question at most.",
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
@option(
    "Text",
    "--layers",
    "with_layers",
    is_flag=True,
    help="With --against: how far each layer's output is from the original's.",
)
@together(machine_options())
@option(
    "Machine",
    "--ram",
    type=Size(auto=True),
    default="auto",
    show_default=True,
    help="Host memory to stay within, such as 16GB; auto is 80% of what is free.",
)
@option(
    "Machine",
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where hidden states go, and an interrupted evaluation goes on.  "
    "[default: the system's temporary folder, which is removed]",
)
@json_option
def evaluate(
    checkpoint: Path,
    against: Path | None,
    work_dir: Path | None,
    *,
    with_layers: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - those of `scoring.prepare`
) -> None:
    """Measure how well CHECKPOINT predicts a text, without ever loading it.

    Prints perplexity and next-token accuracy by domain, each with its standard error over
    sequences. With --against also the difference between two checkpoints, which is known
    more exactly than either since both predict the same tokens, the divergence of what
    they predict, and how often their most likely tokens agree.

    Example:

    \b
        ream-stream eval ./Qwen3-23B --text test.txt
        ream-stream eval ./Qwen3-23B --against ./Qwen3-30B-A3B --max-tokens 100000 \\
            --text code=./src --text math=test.jsonl --questions arc.jsonl --layers
    """
    from .console import console, print_json
    from .score_view import measure, prepare, score_facts, score_tables
    from .signals import stop_requests

    job = prepare(checkpoint, against, **values)
    with ExitStack() as stack:
        work = work_dir or Path(stack.enter_context(TemporaryDirectory(prefix="ream-stream-")))
        asked = stack.enter_context(stop_requests())
        measured = measure(job, work, console(stderr=True), asked, with_layers=with_layers)
    if as_json:
        print_json(score_facts(job, measured))
        return
    shown = console(stderr=False)
    for table in score_tables(job, measured):
        shown.print(table)
