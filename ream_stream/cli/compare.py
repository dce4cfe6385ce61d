"""The verbs `compare` and `sweep`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ream_stream.calibration.mix import MIXES

from .options import calibration_options, machine_options
from .params import F, Size, Verb, exit_statuses, json_option, option, together

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def _options(*, output: str) -> Callable[[F], F]:
    """Return what both verbs ask for."""
    section, count = "Comparison", click.IntRange(min=1)
    return together(
        [
            option(section, "--experts", type=count, required=True, help="Experts to keep."),
            option(
                section,
                "--methods",
                default="methods",
                show_default=True,
                help="Names or sets (methods, ablation, controls, refit), separated by commas.",
            ),
            option(
                section,
                "--seeds",
                type=count,
                default=3,
                show_default=True,
                help="Runs of each, with seeds from --seed on: other documents, other draws.",
            ),
            option(section, "--group-size", type=click.IntRange(min=2), help="As in compress."),
            option(
                section,
                "--text",
                multiple=True,
                required=True,
                metavar="SOURCE",
                help="What is predicted, as in eval: NAME=SOURCE for each domain.",
            ),
            option(
                section,
                "--max-tokens",
                type=click.IntRange(min=2),
                help="Take no more of each.  [default: all]",
            ),
            *calibration_options(required=True),
            *machine_options(),
            option(
                "Machine",
                "--ram",
                type=Size(auto=True),
                default="auto",
                show_default=True,
                help="Host memory to stay within, such as 16GB; auto is 80% of what is free.",
            ),
            option("Machine", "--threads", type=count, help="Processor threads to use."),
            option(
                "Output",
                "--output",
                type=click.Path(file_okay=False, path_type=Path),
                default=output,
                show_default=True,
                metavar="DIR",
                help="Where results are kept; what is there is not done again.",
            ),
            json_option,
        ]
    )


@click.command("compare", cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 11, 12, 130))
@click.argument("source", type=_FOLDER)
@_options(output="compare-output")
def compare(source: Path, output: Path, *, as_json: bool, **values: Any) -> None:  # noqa: ANN401
    """Compress SOURCE by several methods and measure each beside it.

    Every method is run with several seeds; the table has mean and standard deviation of
    the runs, and comparison.json, comparison.csv and comparison.md in the output folder
    have the rest. Compressed checkpoints are removed once they are measured. Interrupted,
    the same command goes on.

    Example:

    \b
        ream-stream compare ./Qwen3-30B-A3B --experts 96 --methods ream,reap,frequency \\
            --calibration code=./src --calibration math=problems.jsonl \\
            --text code=test.jsonl --text general=test.txt
    """
    from .comparison_view import (
        as_csv,
        carry_out,
        comparison_facts,
        comparison_table,
        markdown,
        write_files,
    )
    from .console import console, print_json
    from .signals import stop_requests

    with stop_requests() as asked:
        bench, _, trials = _prepare(source, output, ("",), values)
        outcomes = carry_out(bench, trials, console(stderr=True), asked)
    known = comparison_facts(bench, outcomes)
    write_files(
        output,
        {
            "comparison.json": known,
            "comparison.csv": as_csv(outcomes),
            "comparison.md": markdown(outcomes) + "\n",
        },
    )
    if as_json:
        print_json(known)
    else:
        console(stderr=False).print(comparison_table(outcomes))


@click.command("sweep", cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 10, 11, 12, 130))
@click.argument("source", type=_FOLDER)
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
    from ream_stream.errors import UsageError

    from .comparison_view import carry_out, sweep_facts, sweep_tables, write_files
    from .console import console, print_json
    from .report.figures import pareto_picture, standalone
    from .signals import stop_requests

    names = tuple(name.strip() for name in mixes.split(","))
    unknown = [name for name in names if name not in MIXES]
    if unknown:
        raise UsageError(f"--mixes: {unknown[0]!r} is not one of {', '.join(MIXES)}")
    with stop_requests() as asked:
        bench, grid, trials = _prepare(source, output, names, values)
        outcomes = carry_out(bench, trials, console(stderr=True), asked)
    known = sweep_facts(bench, grid, outcomes)
    write_files(output, {"sweep.json": known, "sweep.svg": standalone(pareto_picture(known))})
    if as_json:
        print_json(known)
        return
    for table in sweep_tables(known):
        console(stderr=False).print(table)


def _prepare(
    source: Path,
    output: Path,
    mixes: tuple[str, ...],
    values: dict[str, Any],
) -> tuple[Any, Any, Any]:
    """Return bench, grid and trials."""
    from .comparison_view import Grid, bench_of, token_maker, trials_of
    from .variants import named

    grid = Grid(
        experts=values["experts"],
        methods=named(values["methods"]),
        seeds=tuple(range(values["seed"], values["seed"] + values["seeds"])),
        group_size=values["group_size"],
        mixes=mixes,
    )
    bench = bench_of(
        source,
        output,
        values["text"],
        text_field=values["text_field"],
        sequence_length=values["sequence_length"],
        max_tokens=values["max_tokens"],
        device=values["device"],
        dtype=values["compute_dtype"],
        threads=values["threads"],
        ram=values["ram"],
    )
    tokens = token_maker(bench.source, values)
    return bench, grid, trials_of(bench, grid, tokens)
