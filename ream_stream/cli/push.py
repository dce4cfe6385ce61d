"""The verb `push`."""

from pathlib import Path

import click

from .params import FOLDER, Verb, exit_statuses, json_option, option


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3))
@click.argument("output", type=FOLDER)
@click.argument("repository")
@option("Output", "--private", is_flag=True, help="Make a new repository a private one.")
@option("Output", "--revision", help="A branch to push to; it is made if it is not there.")
@json_option
def push(
    output: Path, repository: str, *, private: bool, revision: str | None, as_json: bool
) -> None:
    """Publish OUTPUT as ORG/NAME on the hub, in one commit.

    It is verified first, its shards by size. The token is that of hf auth login or HF_TOKEN.

    Example:

    \b
        ream-stream push ./Qwen3-23B my-org/Qwen3-23B --private
    """
    from ream_stream.checkpoint import hub
    from ream_stream.errors import DamagedError
    from ream_stream.evaluation.verify import verify

    from .console import print_json

    bad = [finding.message for finding in verify(output, scan=False) if not finding.ok]
    if bad:
        raise DamagedError(f"{output} is not pushed: {bad[0]}")
    url = hub.push(output, repository, private=private, revision=revision)
    if as_json:
        print_json({"url": url})
    else:
        click.echo(url)
