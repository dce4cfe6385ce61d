"""The verb `report`."""

from pathlib import Path

import click

from ream_stream.cli.params import (
    FILE,
    FOLDER,
    NEW_FILE,
    Verb,
    exit_statuses,
    json_option,
    option,
    work_dir_option,
)


@click.command("report", cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 11))
@click.argument("output", type=FOLDER)
@option(
    "Content",
    "--results",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="What eval --json or verify --json printed, or comparison.json or sweep.json; may be "
    "given for each.",
)
@option(
    "Content",
    "--card",
    is_flag=True,
    help="Write what eval measured into the model card of OUTPUT too.",
)
@work_dir_option
@option(
    "Output",
    "--html",
    type=NEW_FILE,
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="Where the page is written; one that is there is replaced.",
)
@json_option
def report(
    output: Path,
    results: tuple[Path, ...],
    *,
    card: bool,
    work_dir: Path | None,
    html: Path,
    as_json: bool,
) -> None:
    """Write one page about the compressed checkpoint in OUTPUT.

    Is it whole, how good was it measured to be, what each expert is worth and which was
    merged into which, time and memory as planned and as measured. Without what verify
    printed, headers and documents are checked. The page needs no network; --json prints the
    same numbers.

    Example:

    \b
        ream-stream report ./Qwen3-23B
        ream-stream report ./Qwen3-23B --results eval.json --results sweep.json --html a.html
        ream-stream report ./Qwen3-23B --results eval.json --card
    """
    from ream_stream import files
    from ream_stream.cli.console import console, print_json
    from ream_stream.compression.workspace import workspace_of
    from ream_stream.errors import DamagedError
    from ream_stream.file_access import resolved

    from .card import write_quality
    from .facts import gather, without_matrices
    from .page import page

    workspace = workspace_of(output, work_dir)
    facts = gather(workspace, results)
    try:
        text = page(facts)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        told = " or ".join(map(str, (*results, workspace.log)))
        raise DamagedError(f"{told} is not as it was written: {error!r}") from error
    if card:
        write_quality(workspace.output, facts["evaluation"])
    page_file = resolved(html.parent) / html.name
    files.make_directory(page_file.parent)
    files.write_bytes(page_file, text.encode(errors="backslashreplace"))
    if as_json:
        print_json(without_matrices(facts))
    else:
        console(stderr=False).print(f"wrote {html}", soft_wrap=True)
