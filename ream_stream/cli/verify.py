"""The verb `verify`."""

from pathlib import Path

import click

from ream_stream.errors import DamagedError
from ream_stream.events import Event, Finding
from ream_stream.planning.serving_rules import CLIENT_NAMES

from .params import FOLDER, Verb, exit_statuses, json_option, option, quiet_option


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10))
@click.argument("output", type=FOLDER)
@option(
    "Checks",
    "--scan/--no-scan",
    default=True,
    show_default=True,
    help="Read all tensors: digests, and numbers that are not finite.",
)
@option(
    "Checks",
    "--load",
    is_flag=True,
    help="Look for the place of every tensor in transformers' class, without loading it.",
)
@option(
    "Checks",
    "--run",
    is_flag=True,
    help="Run some tokens through the model, one layer in memory at a time.",
)
@option(
    "Checks",
    "--against",
    type=FOLDER,
    metavar="SOURCE",
    help="The source: all that was not merged must be its bytes.",
)
@option(
    "Checks",
    "--for",
    "clients",
    type=click.Choice(list(CLIENT_NAMES)),
    multiple=True,
    help="What is known to be refused by a server or converter; may be given several times.",
)
@quiet_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    output: Path,
    *,
    scan: bool,
    load: bool,
    run: bool,
    against: Path | None,
    clients: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Check that OUTPUT is whole, consistent and loads.

    Example:

    \b
        ream-stream verify ./Qwen3-23B
        ream-stream verify ./Qwen3-23B --against ./Qwen3-30B-A3B
        ream-stream verify ./Qwen3-23B --load --run
        ream-stream verify ./Qwen3-23B --for vllm --for llama.cpp
        ream-stream verify ./Qwen3-23B --no-scan --json
    """
    from ream_stream.evaluation.verify import verify as check

    from .console import console, print_json
    from .next_view import say_clients

    def show(event: Event) -> None:
        if isinstance(event, Finding) and not as_json and not (quiet and event.ok):
            # as they come: reading a large output takes minutes
            word = "note" if event.is_note else "ok" if event.ok else "FAILED"
            click.echo(f"{word:6}  {event.check:9}  {event.message}")

    found = check(
        output, scan=scan, load=load, run=run, against=against, clients=clients, report=show
    )
    if as_json:
        print_json(found.facts())
    if not found.ok:
        failed = sum(not finding.ok for finding in found.findings)
        click.echo(
            f"error: {output}: {failed} of {len(found.findings)} findings are bad", err=True
        )
        ctx.exit(DamagedError.exit_status)
    if not as_json:
        say_clients(str(output), output, console(stderr=True, quiet=quiet))
