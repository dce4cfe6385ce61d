"""The verbs `compare` and `sweep`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ream_stream.calibration.mix import MIXES
from ream_stream.evaluation.config import ComparisonOptions
from ream_stream.model.ranks.group import is_other_rank

from .options import options_for
from .params import (
    FOLDER,
    NEW_FOLDER,
    F,
    Verb,
    exit_statuses,
    json_option,
    option,
    quiet_option,
    together,
)

_SIZES = "sizes.svg"


def _options(*, output: str) -> Callable[[F], F]:
    """Return what both verbs ask for."""
    where = option(
        "Output",
        "--output",
        type=NEW_FOLDER,
        default=output,
        show_default=True,
        metavar="DIR",
        help="Where results are kept; what is there is not done again.",
    )
    return together([options_for(ComparisonOptions), where, quiet_option, json_option])


@click.command("compare", cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 11, 12, 130))
@click.argument("source", type=FOLDER)
@_options(output="compare-output")
def compare(
    source: Path,
    output: Path,
    *,
    quiet: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401
) -> None:
    """Compress SOURCE by several methods and measure each beside it.

    Every method runs with several seeds; the table has mean and standard deviation, and
    comparison.json, comparison.csv and comparison.md in the output folder have the rest.
    Compressed checkpoints are removed once measured. Of several sizes, sizes.svg has loss
    against size, and one is recommended: the smallest that loses at most 0.05 nats a token, or
    the one that loses least. Interrupted, the same command goes on.

    Example:

    \b
        ream-stream compare ./Qwen3-30B-A3B --experts 96 --methods ream,reap,frequency \\
            --calibration code=./src --calibration math=problems.jsonl \\
            --text code=test.jsonl --text general=test.txt
        ream-stream compare ./Qwen3-30B-A3B --keep 50%,75%,90% --methods energy --seeds 1 \\
            --calibration text.jsonl --text test.jsonl
    """
    from ream_stream.compression.finalize import check_names

    from .comparison_view import (
        as_csv,
        comparison_facts,
        comparison_table,
        markdown,
        recommendation,
        write_files,
    )
    from .console import console, print_json

    check_names(output, (*(f"comparison.{end}" for end in ("json", "csv", "md")), _SIZES))
    bench, outcomes = _carried_out(source, output, ("",), values, quiet=quiet)
    if is_other_rank():
        return
    known = comparison_facts(bench, outcomes)
    told = recommendation(known)
    write_files(
        bench.folder,
        {
            "comparison.json": known,
            "comparison.csv": as_csv(outcomes),
            "comparison.md": "\n".join([markdown(outcomes), *(["", told] if told else []), ""]),
            **_sizes_drawn(known),
        },
    )
    if as_json:
        print_json(known)
        return
    shown = console(stderr=False)
    shown.print(comparison_table(outcomes))
    shown.print(told or "", soft_wrap=True, end="\n" if told else "")


@click.command("sweep", cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 11, 12, 130))
@click.argument("source", type=FOLDER)
@option(
    "Comparison",
    "--mixes",
    default=",".join(MIXES),
    show_default="the paper's ten",
    help="Mixes to calibrate on, separated by commas; names as in --mix.",
)
@_options(output="sweep-output")
def sweep(
    source: Path,
    output: Path,
    mixes: str,
    *,
    quiet: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401
) -> None:
    """Compress SOURCE by methods x calibration mixes and tell which are not beaten.

    Calibration is of sources called general, math and code. Each domain that is predicted
    is an axis; the Pareto front, the hypervolume of each method (from the smallest value
    minus 1 on each axis) and the correlation of each share with each score are told, and
    sweep.json and sweep.svg in the output folder have them.

    Example:

    \b
        ream-stream sweep ./Qwen3-30B-A3B --experts 96 --methods ream,reap --seeds 1 \\
            --calibration general=test.txt --calibration math=problems.jsonl \\
            --calibration code=./src --text code=test.jsonl --text general=test.txt
    """
    from ream_stream.compression.finalize import check_names
    from ream_stream.errors import UsageError

    from .comparison_view import (
        recommendation,
        sweep_facts,
        sweep_tables,
        write_files,
    )
    from .console import console, print_json
    from .report.figures import pareto_picture, standalone

    names = tuple(name.strip() for name in mixes.split(","))
    unknown = [name for name in names if name not in MIXES]
    if unknown:
        raise UsageError(f"--mixes: {unknown[0]!r} is not one of {', '.join(MIXES)}")
    check_names(output, ("sweep.json", "sweep.svg", _SIZES))
    bench, outcomes = _carried_out(source, output, names, values, quiet=quiet)
    if is_other_rank():
        return
    known = sweep_facts(outcomes)
    drawn = {"sweep.svg": standalone(pareto_picture(known)), **_sizes_drawn(known)}
    write_files(bench.folder, {"sweep.json": known, **drawn})
    if as_json:
        print_json(known)
        return
    shown = console(stderr=False)
    for table in sweep_tables(known):
        shown.print(table)
    if told := recommendation(known):
        shown.print(told, soft_wrap=True)


def _sizes_drawn(known: Mapping[str, Any]) -> dict[str, str]:
    """Return the picture of loss against size by its file's name, if there is one."""
    from .report.figures import size_picture, standalone

    return {_SIZES: standalone(size_picture(known["curve"]))} if known["curve"] else {}


def _carried_out(
    source: Path,
    output: Path,
    mixes: tuple[str, ...],
    values: Mapping[str, Any],
    *,
    quiet: bool,
) -> tuple[Any, Any]:
    """Return the bench and the outcomes of all trials, which ranks divide."""
    from ream_stream.model.ranks.launch import joined

    from .comparison_view import Grid, bench_of, carry_out, token_maker, trials_of
    from .console import console
    from .signals import stop_requests

    options = ComparisonOptions(**values)
    with stop_requests() as asked, joined() as ranks:
        bench = bench_of(source, output, options, ranks)
        grid = Grid.of(options, mixes, bench.source)
        trials = trials_of(bench, grid, token_maker(bench.source, options))
        return bench, carry_out(bench, trials, console(stderr=True, quiet=quiet), asked)
