"""The verb `observe`."""

from pathlib import Path
from typing import Any

import click

from ream_stream.calibration.config import CalibrationOptions
from ream_stream.compression.observation import ObserveOptions
from ream_stream.settings import Method, Settings, options_of

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
from .source import source_argument

_ONLY_SIZE = {"calibration": {"required": False}}
_OWN = {"moments", "similarity_tokens", "mtp"}
_OF_A_RUN = {
    *options_of(CalibrationOptions),
    *("device", "compute_dtype", "ram", "vram", "disk", "threads", "work_dir", "stream"),
}


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 11, 12, 130))
@source_argument
@click.argument("statistics", type=click.Path(path_type=Path))
@options_for(ObserveOptions, Method, Settings, only=_OWN | _OF_A_RUN, changed=_ONLY_SIZE)
@option(
    "Output",
    "--dry-run",
    is_flag=True,
    help="Print the plan and stop; write nothing. Headers of SOURCE are enough, and without "
    "--calibration only its size counts.",
)
@option("Output", "--restart", is_flag=True, help="Discard the run that is in STATISTICS.")
@option(
    "Output",
    "--keep-work/--remove-work",
    default=True,
    show_default=True,
    help="What becomes of journal and log when it is done.",
)
@verbose_option
@quiet_option
@json_option
@click.pass_context
def observe(
    ctx: click.Context,
    /,
    source: Path | str,
    statistics: Path,
    *,
    dry_run: bool,
    restart: bool,
    keep_work: bool,
    verbose: bool,
    quiet: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - those of ObserveOptions, Method and Settings
) -> None:
    """Run SOURCE over text once and keep STATISTICS; run it again to go on after a stop.

    STATISTICS is a new folder. compress --statistics STATISTICS then makes outputs of any size,
    by any method that needs no refit, without running the model. Domains of a calibration mix
    are kept apart, so that --weights code=0.7,math=0.3 can weigh them anew. A run over the
    text, which takes statistics of each layer after compressed ones, and refits, loses less.

    Example:

    \b
        ream-stream observe ./Qwen3-30B-A3B ./kept --calibration mix.yaml
        ream-stream observe ./Qwen3-30B-A3B ./kept --ram 16GB \\
            --calibration code=./src --calibration math=problems.jsonl
    """
    from .console import console, print_json
    from .startup import starting

    shown = console(stderr=True, quiet=quiet)
    asked = {**values, "restart": restart, "verbose": verbose}
    with starting(shown, "loading torch and transformers"):
        from ream_stream.evaluation import api

        from .run import following, say_observed, say_start
    if dry_run:
        with following(shown) as report:
            planned = api.plan_observation(
                source, statistics, restart=restart, report=report, **values
            )
        say_start(planned, asked, shown)
        if as_json:
            print_json(planned)
        return
    with following(shown, asked) as report:
        result = api.observe(
            source,
            statistics,
            restart=restart,
            keep_work=keep_work,
            command=resume_command(ctx),
            report=report,
            **values,
        )
    say_observed(result, shown)
    if as_json:
        print_json(result.facts())
