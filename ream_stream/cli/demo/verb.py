"""The verb `demo`."""

from pathlib import Path

import click

from ream_stream.cli.params import NEW_FOLDER, Verb, exit_statuses, json_option, option


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 11, 12, 130))
@option(
    "Output",
    "--output",
    type=NEW_FOLDER,
    default="demo-output",
    show_default=True,
    metavar="DIR",
    help="Where everything is written; a demo that is there is done again.",
)
@option("Output", "--quick", is_flag=True, help="Less text: to see that it works, in seconds.")
@json_option
def demo(output: Path, *, quick: bool, as_json: bool) -> None:
    """Compress a small built-in checkpoint in three ways, and compare them.

    The model is real, if small: 4 layers, 32 experts, trained on documentation, code and
    mathematics. A quarter of its experts is merged (REAM), dropped (REAP), or dropped by
    energy and what stays refitted; then it is measured on text of the three domains that it
    has not seen. Nothing is downloaded.

    Example:

    \b
        ream-stream demo
        ream-stream demo --output /tmp/demo --json
    """
    from ream_stream.cli.console import console, print_json

    from .command import demonstrate, facts_of, say

    result = demonstrate(output, console(stderr=True), quick=quick)
    if as_json:
        print_json(facts_of(result))
    else:
        say(result, console(stderr=False))
