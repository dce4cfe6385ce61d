"""The verb `clean`."""

from pathlib import Path

import click

from .params import FOLDER, Verb, exit_statuses, json_option, option, work_dir_option


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 11))
@click.argument("output", type=FOLDER)
@work_dir_option
@option(
    "Output",
    "--force",
    is_flag=True,
    help="Discard a run that is not finished, with the shards it wrote.",
)
@json_option
def clean(output: Path, work_dir: Path | None, *, force: bool, as_json: bool) -> None:
    """Remove the work files of the run in OUTPUT: journal, statistics, tokens and log.

    The checkpoint stays. Files that are not of ream-stream are never touched.

    Example:

    \b
        ream-stream clean ./Qwen3-23B
    """
    from ream_stream.compression.workspace import workspace_of
    from ream_stream.errors import UsageError

    from .console import print_json

    workspace = workspace_of(output, work_dir)
    complete = workspace.is_complete()
    begun = workspace.has_journal()
    there = workspace.data.is_dir() or workspace.home.is_dir()
    if not there or not (complete or begun or workspace.elsewhere()):
        raise UsageError(f"{workspace.work} holds no run of ream-stream")
    check = workspace.begun if begun else workspace.check_is_of_one_run
    check()  # before a lock is written anywhere
    if not complete and not force:
        raise UsageError(
            f"the run in {output} is not finished: go on with it, or discard it with --force"
        )
    with workspace.locks():
        check()
        if not complete:
            workspace.discard()
        workspace.clean()
    if as_json:
        print_json({"output": str(output), "discarded": not complete})
