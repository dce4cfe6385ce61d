"""The command line: each verb parses, calls one function and prints.

Only light modules are imported at the top of a verb's file, so that every
``--help`` is quick: torch, transformers and rich are imported inside the verbs.
Results go to stdout, progress and everything said along the way to stderr.
"""

import click

from ream_stream import __version__
from ream_stream.model.ranks.group import is_other_rank

from .clean import clean
from .compare import compare, sweep
from .compress import compress
from .demo.verb import demo
from .eval import evaluate
from .inspect import inspect
from .observe import observe
from .params import Root
from .plan import plan
from .push import push
from .report.command import report as report
from .status import status
from .tokens import make_tokens
from .verify import verify

_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    # REAM_STREAM_COMPRESS_RAM=16GB is compress --ram 16GB
    "auto_envvar_prefix": "REAM_STREAM",
}


_DIVIDED = frozenset({"compress", "eval", "compare", "sweep"})
"""Verbs that several ranks work on together; any other is done by rank 0 alone."""


@click.group(cls=Root, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="ream-stream")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Make a Mixture-of-Experts checkpoint smaller, one layer at a time.

    Example:

    \b
        ream-stream demo
        ream-stream compress ./Qwen3-30B-A3B ./Qwen3-23B --keep 75% --calibration text.jsonl
    """
    if is_other_rank() and ctx.invoked_subcommand not in _DIVIDED:
        ctx.exit()


for _verb in (
    compress,
    plan,
    observe,
    inspect,
    status,
    verify,
    clean,
    push,
    evaluate,
    compare,
    sweep,
    make_tokens,
    report,
    demo,
):
    cli.add_command(_verb)
