"""Comparisons carried out: options to trials, trials to tables and files."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.table import Table

from ream_stream import files as durable
from ream_stream.calibration.mix import MIXES, parts_of
from ream_stream.calibration.packing import read_tokens
from ream_stream.calibration.token_cache import calibration_of, read_test_tokens
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import Checkpoint, open_checkpoint, vocab_size_of
from ream_stream.compression.candidate_plans import expert_layer
from ream_stream.compression.shared_job import check_alike, own_device
from ream_stream.errors import UsageError
from ream_stream.evaluation.comparison import (
    ALL,
    ORIGINAL,
    ComparisonSetup,
    Outcome,
    Trial,
    rows,
    run_trials,
    summary,
)
from ream_stream.evaluation.config import ComparisonOptions
from ream_stream.evaluation.pareto import correlation, front, hypervolume, reference
from ream_stream.evaluation.size_curve import size_curve
from ream_stream.evaluation.variants import named, settings_of
from ream_stream.file_access import resolved
from ream_stream.model.device import choose_device
from ream_stream.model.dtypes import compute_dtype
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.planning.schedule import Budgets
from ream_stream.planning.serving_limits import served_count
from ream_stream.settings import check_values
from ream_stream.units import format_size

from .console import columns
from .signals import stopping
from .trial_progress import comparing

AXIS_MEASURE = "accuracy"
"""Measure on the axes of a sweep's figure: percent of next tokens, one axis per domain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What is compared: each method on each mix, with each seed."""

    experts: tuple[int, ...]
    """Numbers of experts to keep."""

    methods: tuple[str, ...]
    """Methods to compare: keys of `variants.VARIANTS`."""

    seeds: tuple[int, ...]
    """Seeds of the order of calibration documents and of all random choices."""

    group_size: int | None
    """Group size C of REAM; None for its default."""

    mixes: tuple[str, ...] = ("",)
    """Calibration mixes: keys of `MIXES`; an empty name for the given calibration."""

    @classmethod
    def of(cls, options: ComparisonOptions, mixes: tuple[str, ...], source: Checkpoint) -> Self:
        """Return what the options ask for of a source."""
        check_values(options)
        return cls(
            experts=_sizes(options, source),
            methods=named(options.methods),
            seeds=tuple(range(options.seed, options.seed + options.seeds)),
            group_size=options.group_size,
            mixes=mixes,
        )


def _sizes(options: ComparisonOptions, source: Checkpoint) -> tuple[int, ...]:
    """Return the numbers of experts to keep, each once."""
    if (options.experts is None) == (not options.keep):
        raise UsageError("say how many experts to keep, by one of --experts and --keep")
    if options.experts is not None:
        return (options.experts,)
    layer = expert_layer(source)
    counts = (
        served_count(share, layer.count, layer.routing_groups) for share in options.keep or ()
    )
    return tuple(dict.fromkeys(counts))


def bench_of(
    source: Path,
    folder: Path,
    options: ComparisonOptions,
    ranks: Ranks = ALONE,
) -> ComparisonSetup:
    """Read headers and test tokens."""
    checkpoint = open_checkpoint(source)
    where = own_device(choose_device(options.device), ranks)
    check_alike(ranks, where)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tests = read_test_tokens(
        parts_of(options.text),
        checkpoint.folder,
        vocab_size=vocab_size_of(checkpoint.config),
        text_field=options.text_field,
        sequence_length=options.sequence_length,
        max_tokens=options.max_tokens,
    )
    return ComparisonSetup(
        source=checkpoint,
        tests=tests,
        folder=resolved(folder),
        device=where,
        dtype=compute_dtype(options.compute_dtype, checkpoint, where),
        threads=torch.get_num_threads(),
        budgets=Budgets.of(options.ram, processes=ranks.local_size),
        ranks=ranks,
    )


def token_maker(
    checkpoint: Checkpoint, options: ComparisonOptions
) -> Callable[[str, int], Tokens]:
    """Return what makes the calibration of a mix and a seed, each once."""
    made: dict[tuple[str, int], Tokens] = {}
    vocab_size = vocab_size_of(checkpoint.config)

    def make(mix: str, seed: int) -> Tokens:
        if (mix, seed) not in made:
            wanted = calibration_of(replace(options, mix=mix or options.mix, seed=seed))
            if wanted is None:
                raise UsageError("say what to calibrate on: --calibration")
            made[mix, seed] = read_tokens(wanted, checkpoint.folder, vocab_size=vocab_size)
        return made[mix, seed]

    return make


def trials_of(
    bench: ComparisonSetup, grid: Grid, tokens: Callable[[str, int], Tokens]
) -> list[Trial]:
    """Return the trials of a grid."""
    layer = expert_layer(bench.source)
    return [
        Trial(
            name=name,
            settings=settings_of(
                name,
                experts=experts,
                layer=layer,
                seed=seed,
                compute_dtype=str(bench.dtype).removeprefix("torch."),
                device_kind=bench.device.type,
                group_size=grid.group_size,
            ),
            calibration=tokens(mix, seed),
            mix=mix,
        )
        for mix in grid.mixes
        for experts in grid.experts
        for name in grid.methods
        for seed in grid.seeds
    ]


def carry_out(
    bench: ComparisonSetup,
    trials: Sequence[Trial],
    console: Console,
    asked: Callable[[], int | None],
) -> tuple[Outcome, ...]:
    """Run the trials that are left and show which one runs, until a signal is caught."""
    with comparing(console) as show:
        return run_trials(bench, trials, stopping(asked, show))


def comparison_facts(bench: ComparisonSetup, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return a comparison, for ``--json`` and `report`."""
    return {
        "kind": "comparison",
        "source": str(bench.source.folder),
        "tests": bench.tests.digest,
        "predicted": outcomes[0].scores[ALL]["predicted"],
        "summary": summary(outcomes),
        "runs": list(rows(outcomes)),
        "curve": size_curve(summary(outcomes), ALL),
    }


def comparison_table(outcomes: Sequence[Outcome]) -> Table:
    """Return mean and spread of perplexities by domain, and what tells most beside them."""
    listed = summary(outcomes)
    domains = [name for name in listed[0]["scores"] if name != ALL] or [ALL]
    several = len({each["mix"] for each in listed}) > 2
    sizes = _several_sizes(outcomes)
    heads = [*(["mix"] if several else []), "", *(["kept"] if sizes else []), *domains]
    heads += ["nats more", "divergence", "same top"]
    return columns(
        heads, [_table_row(each, domains, several=several, sizes=sizes) for each in listed]
    )


def _several_sizes(outcomes: Sequence[Outcome]) -> bool:
    return len({each.experts for each in outcomes if each.experts is not None}) > 1


def recommendation(known: Mapping[str, Any]) -> str | None:
    """Return the size that is recommended, with the rule; None if there is only one."""
    curve = known["curve"]
    if curve is None:
        return None
    point = curve["points"][curve["recommended"]]
    named = ", ".join(filter(None, (point["name"], point["mix"])))
    return (
        f"recommended: {point['experts']} experts by {named}, "
        f"{format_size(point['output_bytes'])}, {point['nats more'][0]:.4f} nats a token more "
        f"({curve['rule']})"
    )


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the same table as Markdown."""
    table = comparison_table(outcomes)
    lines = zip(*(list(column.cells) for column in table.columns), strict=True)
    heads = [str(column.header) for column in table.columns]
    body = [heads, ["---"] * len(heads), *([str(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """Return every run and domain as a row of a CSV file."""
    flat = list(rows(outcomes))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def sweep_facts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return a sweep: points by method and mix, what they cover and what they follow.

    A point is the mean over seeds of `AXIS_MEASURE` in percent, an axis a domain. The
    corner of the hypervolumes is that of all points together, so they can be compared.
    """
    listed = [each for each in summary(outcomes) if each["name"] != ORIGINAL]
    axes = [name for name in listed[0]["scores"] if name != ALL] or [ALL]
    sizes = _several_sizes(outcomes)
    points = [
        {
            "name": f"{each['name']}, {each['experts']} kept" if sizes else each["name"],
            "mix": each["mix"],
            "point": tuple(100 * each["scores"][a][AXIS_MEASURE][0] for a in axes),
            "spread": tuple(100 * each["scores"][a][AXIS_MEASURE][1] for a in axes),
        }
        for each in listed
    ]
    places = [each["point"] for each in points]
    best, corner = set(front(places)), reference(places)
    for number, each in enumerate(points):
        each["on front"] = number in best
    by_name: dict[str, list[dict[str, Any]]] = {}
    for each in points:
        by_name.setdefault(each["name"], []).append(each)
    return {
        "kind": "sweep",
        "axes": axes,
        "measure": f"{AXIS_MEASURE}, %",
        "original": tuple(100 * outcomes[0].scores[a]["accuracy"]["value"] for a in axes),
        "corner": corner,
        "points": points,
        "curve": size_curve(listed, ALL),
        "hypervolume": {
            name: hypervolume([each["point"] for each in own], corner)
            for name, own in by_name.items()
        },
        "correlations": {
            name: {
                weight: {
                    axis: correlation(
                        [MIXES[each["mix"]][weight] for each in own],
                        [each["point"][number] for each in own],
                    )
                    for number, axis in enumerate(axes)
                }
                for weight in next(iter(MIXES.values()))
            }
            for name, own in by_name.items()
        },
    }


def sweep_tables(known: Mapping[str, Any]) -> Iterator[Table]:
    """Yield a sweep as tables: points, hypervolumes, correlations of weights and scores."""
    axes = known["axes"]
    heads = ("mix", "method", *(f"{axis} %" for axis in axes), "front")
    yield columns(
        heads,
        [
            (
                each["mix"],
                each["name"],
                *(
                    f"{value:.2f}" + (f" +- {error:.2f}" if error else "")
                    for value, error in zip(each["point"], each["spread"], strict=True)
                ),
                "*" if each["on front"] else "",
            )
            for each in known["points"]
        ],
    )
    volumes = known["hypervolume"].items()
    yield columns(("method", "hypervolume"), [(name, f"{v:.2f}") for name, v in volumes])
    yield columns(
        ("method, share of", *(f"r with {axis}" for axis in axes)),
        [
            (f"{name}, {weight}", *("-" if r is None else f"{r:+.2f}" for r in found.values()))
            for name, weights in known["correlations"].items()
            for weight, found in weights.items()
        ],
    )


def write_files(folder: Path, files: Mapping[str, str | dict[str, Any]]) -> None:
    """Write results beside the trials' numbers."""
    for name, content in files.items():
        if isinstance(content, str):
            durable.write_bytes(folder / name, content.encode())
        else:
            durable.write_json(folder / name, content)


def _table_row(
    each: Mapping[str, Any], domains: Sequence[str], *, several: bool, sizes: bool
) -> list[str]:
    def cell(domain: str, measure: str, digits: int) -> str:
        found = each["scores"][domain][measure]
        if found is None:
            return "-"
        return f"{found[0]:.{digits}f}" + (
            f" +- {found[1]:.{digits}f}" if each["runs"] > 1 else ""
        )

    return [
        *([each["mix"]] if several else []),
        each["name"],
        *([str(each["experts"] or "all")] if sizes else []),
        *(cell(domain, "perplexity", 2) for domain in domains),
        *(cell(ALL, measure, 4) for measure in ("nats more", "divergence", "same top")),
    ]
