"""The verb `compress`."""

from pathlib import Path
from typing import Any

import click

from ream_stream.compression.config import RunOptions
from ream_stream.settings import Method, Settings

from .options import options_for
from .params import (
    Verb,
    exit_statuses,
    json_option,
    option,
    quiet_option,
    resume_command,
    verbose_option,
)
from .run_file import config_option
from .source import source_argument


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
@config_option
@verbose_option
@quiet_option
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
    verbose: bool,
    quiet: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - those of RunOptions, Method and Settings
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
        ream-stream compress --config run.yaml --ram 16GB
    """
    from .console import console, print_json
    from .startup import starting

    shown = console(stderr=True, quiet=quiet)
    asked = {**values, "restart": restart, "verbose": verbose}
    with starting(shown, "loading torch and transformers"):
        from ream_stream.evaluation import api

        from .run import following, say_start, say_summary
    if dry_run:
        with following(shown) as report:
            planned = api.plan(
                source, output, restart=restart, with_data=True, report=report, **values
            ).details
        say_start(planned, asked, shown)
        if as_json:
            print_json(planned)
        return
    with following(shown, asked) as report:
        result = api.compress(
            source,
            output,
            restart=restart,
            keep_work=keep_work,
            command=resume_command(ctx),
            report=report,
            **values,
        )
    say_summary(result, asked, shown)
    if as_json:
        print_json(result.facts())
