"""The verb `compress`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ream_stream.compression.config import RunOptions
from ream_stream.settings import Method, Settings

from .options import options_for
from .params import Verb, exit_statuses, json_option, option, resume_command
from .source import fetched, located, source_argument


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 11, 12, 130))
@source_argument
@click.argument("output", type=click.Path(path_type=Path))
@options_for(RunOptions, Method, Settings)
@option("Output", "--dry-run", is_flag=True, help="Print the plan and stop; write nothing.")
@option("Output", "--restart", is_flag=True, help="Discard the run that is in OUTPUT.")
@option(
    "Output",
    "--keep-work/--remove-work",
    default=True,
    show_default=True,
    help="What becomes of journal, statistics, tokens and log when it is done.",
)
@json_option
@click.pass_context
def compress(
    ctx: click.Context,
    /,
    source: Path | str,
    output: Path,
    *,
    dry_run: bool,
    restart: bool,
    keep_work: bool,
    stream: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - those of RunOptions.of
) -> None:
    """Compress SOURCE into OUTPUT; run it again to go on after a stop.

    SOURCE is a checkpoint folder, which is only read, or ORG/NAME[@REVISION] on the hub.
    OUTPUT is a new folder. The plan and the
    progress go to stderr.

    Example:

    \b
        ream-stream compress ./Qwen3-30B-A3B ./Qwen3-23B \\
            --keep 75% --calibration text.jsonl
        ream-stream compress ./Qwen3-30B-A3B ./Qwen3-23B-REAP \\
            --method reap --experts 96 --calibration text.jsonl --ram 16GB
    """
    from ream_stream.compression.job import plan_facts, prepare

    from .console import console, print_json
    from .run import run, say_start, say_summary

    shown = console(stderr=True)
    folder, remote = located(source, stream=stream)
    whole = remote is None
    streamed = remote if stream else None
    options = RunOptions.of(source=folder, output=output, remote=streamed, **values)
    if remote is not None and not (stream or dry_run):
        # what cannot be done is refused before anything large is fetched
        prepare(replace(options, calibration=()), restart=restart, with_data=False)
        options, whole = replace(options, source=fetched(remote, shown.print)), True
    job = prepare(options, restart=restart, with_data=whole)
    say_start(job, options, shown, restart=restart)
    if dry_run or job.workspace is None:
        if as_json:
            print_json(plan_facts(job))
        return
    command = resume_command(ctx)
    result = run(job, shown, command=command, restart=restart, keep_work=keep_work)
    say_summary(job, result, shown)
    if as_json:
        print_json(result.facts())
