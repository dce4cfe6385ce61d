"""The verb `push`."""

from pathlib import Path

import click

from .params import FOLDER, Verb, exit_statuses, json_option, option


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3))
@click.argument("output", type=FOLDER)
@click.argument("repository")
@option("Output", "--private", is_flag=True, help="Make a new repository a private one.")
@option("Output", "--revision", help="A branch to push to; it is made if it is not there.")
@option("Output", "--dry-run", is_flag=True, help="Print what would be uploaded and stop.")
@json_option
def push(
    output: Path,
    repository: str,
    *,
    private: bool,
    revision: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish OUTPUT as ORG/NAME on the hub, in one commit.

    What the run wrote is uploaded, by the names in its manifest; work files, and what else
    lies in OUTPUT, are not. It is verified first, its shards by size. The token is that of
    hf auth login or HF_TOKEN.

    Example:

    \b
        ream-stream push ./Qwen3-23B my-org/Qwen3-23B --private
    """
    from ream_stream.checkpoint import hub
    from ream_stream.compression.finalize import published_files
    from ream_stream.compression.manifest import MANIFEST, read_manifest
    from ream_stream.errors import DamagedError
    from ream_stream.evaluation.verify import verify
    from ream_stream.units import format_size
    from ream_stream.untrusted import printable

    from .console import console, print_json
    from .next_view import say_clients

    bad = [finding.message for finding in verify(output, scan=False) if not finding.ok]
    if bad:
        raise DamagedError(f"{output} is not pushed: {bad[0]}")
    names = published_files(read_manifest(output / MANIFEST))
    url = None
    if not dry_run:
        url = hub.push(output, names, repository, private=private, revision=revision)
    if as_json:
        print_json({"url": url, "files": names})
        return
    for name in names:
        size = format_size((output / name).stat().st_size)
        click.echo(f"{printable(name)}  {size}", err=not dry_run)
    if url is not None:
        click.echo(url)
        say_clients(repository, output, console(stderr=True), on_hub=True, revision=revision)
