"""The verb `eval`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ream_stream.evaluation.config import ScoreOptions

from .options import options_for
from .params import FOLDER, Verb, exit_statuses, json_option, quiet_option

if TYPE_CHECKING:
    from ream_stream.evaluation.session import Scores


@click.command("eval", cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 12, 130))
@click.argument("checkpoint", type=FOLDER)
@options_for(ScoreOptions)
@quiet_option
@json_option
def evaluate(
    checkpoint: Path,
    *,
    quiet: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - those of ScoreOptions
) -> None:
    """Measure how well CHECKPOINT predicts a text, without ever loading it.

    Prints perplexity and next-token accuracy by domain, each with its standard error over
    sequences. With --against also the difference between two checkpoints, which is known
    more exactly than either since both predict the same tokens, the divergence of what
    they predict, how often their most likely tokens agree, and what that means in words,
    by a rule of thumb.

    Example:

    \b
        ream-stream eval ./Qwen3-23B --text test.txt
        ream-stream eval ./Qwen3-23B --against ./Qwen3-30B-A3B --max-tokens 100000 \\
            --text code=./src --text math=test.jsonl --questions arc.jsonl --layers
    """
    from ream_stream.evaluation import api

    from .console import console, print_json
    from .evaluation_progress import evaluating
    from .next_view import say_next
    from .score_view import say_scores
    from .signals import stop_requests, stopping

    said = console(stderr=True, quiet=quiet)
    with stop_requests() as asked, evaluating(said) as show:
        scores = api.evaluate(checkpoint, report=stopping(asked, show), **values)
    if as_json:
        print_json(scores.facts())
        return
    say_scores(scores, console(stderr=False))
    say_next(_next(scores), said)


def _next(scores: "Scores") -> Iterator[str]:
    """Yield what follows an evaluation: publish or report an output, plan for a source."""
    from ream_stream.compression.manifest import MANIFEST
    from ream_stream.untrusted import shell_words

    folder = shell_words([str(scores.checkpoint)])
    if not (scores.checkpoint / MANIFEST).is_file():
        yield f"ream-stream plan {folder} --keep 75%"
        return
    if scores.against is None:
        yield f"the same with --against SOURCE tells what compressing {folder} cost"
    yield f"ream-stream push {folder} ORG/NAME"
    yield f"ream-stream report {folder} --results FILE, of a file that eval --json wrote"
