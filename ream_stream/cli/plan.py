"""The verb `plan`."""

from pathlib import Path
from typing import Any

import click

from ream_stream.compression.config import RunOptions
from ream_stream.planning.gpus import GPUS
from ream_stream.settings import Method, Settings, options_of

from .options import options_for
from .params import Verb, exit_statuses, json_option, option, verbose_option
from .run_file import config_option, save_option
from .run_file import save as save_run
from .source import source_argument

_ONLY_SIZE = {
    "required": False,
    "help": options_of(RunOptions)["calibration"].metadata["help"]
    + " Without it only its size counts.",
}


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 11, 12))
@source_argument
@click.argument("output", type=click.Path(path_type=Path), required=False)
@options_for(RunOptions, Method, Settings, changed={"calibration": _ONLY_SIZE})
@config_option
@save_option
@option(
    "Machine",
    "--gpu",
    type=click.Choice(tuple(GPUS)),
    help="Plan for this GPU, which need not be here: its memory, and times by the rates of its "
    "data sheet.",
)
@verbose_option
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    source: Path | str,
    output: Path | None,
    *,
    save: Path | None,
    gpu: str | None,
    verbose: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - those of RunOptions, Method and Settings
) -> None:
    """Tell what `compress` would do, with the same arguments; write nothing but --save.

    The exit status is the one compress would begin with: 0 if it can run. Only headers are
    read, so it takes seconds for any size of model, and SOURCE may hold no more than them:
    config, index and the first bytes of each shard (tools/fixtures/headers_only.py copies
    them). Of a SOURCE on the hub, ORG/NAME[@REVISION], no more than that is fetched.

    Example:

    \b
        ream-stream plan ./Qwen3-30B-A3B --keep 75%
        ream-stream plan ./Qwen3-30B-A3B ./Qwen3-23B --keep 75% --ram 16GB --json
        ream-stream plan Qwen/Qwen3-30B-A3B --keep 75% --gpu rtx-4090 --ram 48GB
        ream-stream plan ./Qwen3-30B-A3B ./Qwen3-23B --keep 75% --calibration text.jsonl \
            --save run.yaml
    """
    from ream_stream.evaluation import api

    from .console import console, print_json
    from .plan_view import plan_table

    known = api.plan(source, output, gpu=gpu, **values).details
    if save is not None:
        save_run(ctx, save)
    if as_json:
        print_json(known)
    else:
        console(stderr=False).print(plan_table(known, values, verbose=verbose))
