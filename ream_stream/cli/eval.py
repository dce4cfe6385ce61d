"""The verb `eval`."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from ream_stream.evaluation.config import ScoreOptions

from .options import options_for
from .params import FOLDER, Verb, exit_statuses, json_option


@click.command("eval", cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 12, 130))
@click.argument("checkpoint", type=FOLDER)
@options_for(ScoreOptions)
@json_option
def evaluate(
    checkpoint: Path,
    *,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - those of ScoreOptions
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

    options = ScoreOptions(**values)
    job = prepare(checkpoint, options)
    with ExitStack() as stack:
        work = options.work_dir or Path(
            stack.enter_context(TemporaryDirectory(prefix="ream-stream-"))
        )
        asked = stack.enter_context(stop_requests())
        shown = console(stderr=True)
        measured = measure(job, work, shown, asked, with_layers=options.layers)
    if as_json:
        print_json(score_facts(job, measured))
        return
    shown = console(stderr=False)
    for table in score_tables(job, measured):
        shown.print(table)
