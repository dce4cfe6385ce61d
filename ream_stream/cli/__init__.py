"""The command line: each verb parses, calls one function and prints.

Only light modules are imported here, so that ``--help`` is quick: a verb
imports what it runs inside its function.
"""

import click

from ream_stream import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ream-stream")
def cli() -> None:
    """Make a Mixture-of-Experts checkpoint smaller, one layer at a time."""
