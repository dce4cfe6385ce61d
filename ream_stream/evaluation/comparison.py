"""Compressions of one checkpoint, each measured beside it and kept only as numbers.

A trial is one compression. Its folder holds what is being made; the numbers go into
``results/KEY.json`` when they are complete, and the compressed checkpoint goes away. The
same call goes on after the last trial that was finished, inside the one that was not.
What the original makes of the test tokens is computed once.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ream_stream import __version__, files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import Checkpoint, open_checkpoint
from ream_stream.compression.file_lock import claimed
from ream_stream.compression.pipeline import compress
from ream_stream.compression.shared_job import check_shared
from ream_stream.compression.statistics import Statistics
from ream_stream.compression.workspace import HOME, Workspace
from ream_stream.errors import DamagedError
from ream_stream.events import Comparing, Finished, Report, no_report
from ream_stream.file_access import read_own_json, regular_size
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Budgets
from ream_stream.settings import Settings

from .evaluate import evaluate
from .forward import identity
from .memory import plan_evaluation

ORIGINAL = "original"
_RANK = "rank-"
ALL = "all"
"""Name of the scores over all domains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One compression to be measured."""

    name: str
    """Name of the compared variant: a method, or a method with one changed part."""

    settings: Settings
    """Settings of the compression, its seed included."""

    calibration: Tokens
    """Calibration set of the compression."""

    mix: str = ""
    """Name of the calibration mix; empty for a single mix."""

    statistics: Statistics | None = None
    """Statistics that experts are chosen by, as `settings` say; None to take its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The numbers of a trial."""

    name: str
    """Name of the trial, or `ORIGINAL`."""

    mix: str
    """Name of the calibration mix."""

    seed: int
    """Seed of the trial's settings."""

    scores: Mapping[str, Mapping[str, Any]]
    """`Result.facts` by domain, `ALL` included."""

    seconds: float | None
    """Seconds of the compression (of its last part, if resumed); None for the original."""

    output_bytes: int | None
    """Bytes of the compressed checkpoint's shards."""

    fields: Mapping[str, Any]
    """Settings of the trial by field name."""

    @property
    def experts(self) -> int | None:
        """Experts that each layer keeps, of slices as many as have their neurons.

        None for the original.
        """
        kept: int | None = self.fields.get("whole_experts", self.fields.get("experts"))
        return kept

    def value(self, domain: str, measure: str) -> float | None:
        """Return one of `MEASURES` in a domain; None if it is not known there."""
        return MEASURES[measure](self.scores[domain])


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonSetup:
    """Shared inputs of all trials of a comparison."""

    source: Checkpoint
    """Checkpoint that the trials compress."""

    tests: Tokens
    """Test tokens of all domains."""

    folder: Path
    """Folder of the results and of the trials' outputs."""

    device: torch.device
    """Device that layers run on."""

    dtype: torch.dtype
    """Dtype of the evaluations' forward passes."""

    threads: int
    """Threads that solve the assignments of alignments."""

    budgets: Budgets
    """Limits on the memory and disk that runs and evaluations use."""

    ranks: Ranks = ALONE
    """Processes that divide the trials; each does its own alone."""

    @property
    def work(self) -> Path:
        """Folder of this rank's evaluations."""
        rank = self.ranks.rank
        return self.folder / f"{_RANK}{rank}" if rank else self.folder


def run_trials(
    bench: ComparisonSetup, trials: Sequence[Trial], report: Report = no_report
) -> tuple[Outcome, ...]:
    """Carry out the trials that are left, and return the outcomes of all.

    The first outcome is the original's, the others are in the trials' order.

    Raises
    ------
    OverBudgetError, InterruptedRunError, ReamStreamError
        As the runs and evaluations that it is made of.
    """
    with _claimed(bench):
        every, batch = [None, *trials], 0
        paths = [bench.folder / "results" / f"{_key(bench, trial)}.json" for trial in every]
        own = bench.ranks.own(len(every))
        left = sum(regular_size(paths[number]) is None for number in own)
        for number in own:
            trial, path = every[number], paths[number]
            if regular_size(path) is None:
                report(
                    Comparing(
                        number=number + 1,
                        trials=len(every),
                        to_do=left,
                        name=trial.name if trial else ORIGINAL,
                        mix=trial.mix if trial else "",
                        seed=trial.settings.seed if trial else None,
                    )
                )
                left -= 1
                batch = batch or _evaluated_at_once(bench)
                outcome = _carry_out(bench, trial, path.stem, batch, report)
                files.write_json(path, asdict(outcome))
            # made or not: what a kill left after the numbers were written goes too
            files.remove(_place(bench, path.stem))
        files.remove(bench.work / "evaluate")
        bench.ranks.gather(None)
        return tuple(map(_outcome, paths))


@contextmanager
def _claimed(bench: ComparisonSetup) -> Iterator[None]:
    """Keep others out of the folder for the block, which rank 0 does for all."""
    if not bench.ranks.is_first:
        check_shared(bench.folder / "results", bench.ranks)
        yield
        return
    with claimed(bench.folder):
        files.make_directory(bench.folder / "results")
        check_shared(bench.folder / "results", bench.ranks)
        yield
        for path in bench.folder.glob(f"{_RANK}*"):  # of earlier calls with more ranks too
            files.remove(path)


def _outcome(path: Path) -> Outcome:
    """Read the numbers of a trial."""
    found = read_own_json(path, finite=False)
    try:
        outcome = Outcome(**found)
        list(rows([outcome]))
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedError(
            f"{path} is not what a trial wrote ({error!r}): delete it, and it is made again"
        ) from error
    return outcome


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Return mean and standard deviation (of a single value 0); None if one is unknown."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def grouped(
    outcomes: Sequence[Outcome],
) -> dict[tuple[str, str, int | None], list[Outcome]]:
    """Return outcomes by mix, name and experts, in order: those that differ in their seed."""
    groups: dict[tuple[str, str, int | None], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.mix, outcome.name, outcome.experts), []).append(outcome)
    return groups


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return, for each mix, name and size, mean and spread of every measure in every domain."""
    return [
        {
            "mix": mix,
            "name": name,
            "experts": experts,
            "output_bytes": group[0].output_bytes,
            "runs": len(group),
            "scores": {
                domain: {
                    measure: spread([each.value(domain, measure) for each in group])
                    for measure in MEASURES
                }
                for domain in group[0].scores
            },
        }
        for (mix, name, experts), group in grouped(outcomes).items()
    ]


def rows(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Yield a flat row for each outcome and domain, as in a CSV file."""
    for outcome in outcomes:
        for domain in outcome.scores:
            yield {
                "mix": outcome.mix,
                "name": outcome.name,
                "experts": outcome.experts,
                "seed": outcome.seed,
                "domain": domain,
                **{measure: outcome.value(domain, measure) for measure in MEASURES},
            }


def _nats_more(facts: Mapping[str, Any]) -> float | None:
    return facts["difference"]["nats"] if "difference" in facts else 0.0


def _divergence(facts: Mapping[str, Any]) -> float | None:
    return facts["divergence"]["value"] if "divergence" in facts else 0.0


def _agreement(facts: Mapping[str, Any]) -> float | None:
    return facts["agreement"]["value"] if "agreement" in facts else 1.0


MEASURES: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "perplexity": lambda facts: facts["perplexity"],
    "nats": lambda facts: facts["nats"],
    "nats more": _nats_more,
    "divergence": _divergence,
    "accuracy": lambda facts: facts["accuracy"]["value"],
    "same top": _agreement,
    "effective rank": lambda facts: facts.get("effective_rank"),
}
"""Measures of a trial, computed from `Result.facts`; the original equals itself."""


def _evaluated_at_once(bench: ComparisonSetup) -> int:
    """Return the batch of all evaluations: the original's states are used again."""
    both, ram = [bench.source] * 2, bench.budgets.ram
    return plan_evaluation(both, bench.tests, bench.dtype, ram).batch_sequences


def _carry_out(
    bench: ComparisonSetup, trial: Trial | None, key: str, batch: int, report: Report
) -> Outcome:
    """Make one trial, or measure the original."""
    checkpoint: Checkpoint = bench.source
    finished: Finished | None = None
    fields: dict[str, Any] = {}
    if trial is not None:
        place = _place(bench, key)
        workspace = Workspace(output=place, work=place / HOME)
        with workspace.locked():
            journal = workspace.begun()
            plan = make_plan(
                bench.source,
                trial.settings,
                trial.calibration.num_sequences,
                trial.calibration.sequence_length,
                budgets=bench.budgets,
                threads=bench.threads,
                output=workspace.output,
                work=workspace.work,
                begun=journal.begun() if journal else None,
            )
            finished = compress(
                plan,
                trial.calibration,
                workspace,
                device=bench.device,
                statistics=trial.statistics,
                report=report,
            )
        checkpoint = open_checkpoint(place)
        fields = trial.settings.fields()
        if trial.settings.cuts:
            old, new = plan.experts
            fields["whole_experts"] = round(new.count * new.inner / old.inner)
    result = evaluate(
        checkpoint,
        bench.tests,
        bench.work,
        dtype=bench.dtype,
        device=bench.device,
        original=None if trial is None else bench.source,
        batch_sequences=batch,
        keep_original=True,
        report=report,
    )
    whole = {ALL: result, **result.by_domain(bench.tests)}
    return Outcome(
        name=trial.name if trial else ORIGINAL,
        mix=trial.mix if trial else "",
        seed=trial.settings.seed if trial else 0,
        scores={name: each.facts() for name, each in whole.items()},
        seconds=sum(finished.seconds.values()) if finished else None,
        output_bytes=finished.output_bytes if finished else None,
        fields=fields,
    )


def _place(bench: ComparisonSetup, key: str) -> Path:
    return bench.folder / "trials" / key


def _key(bench: ComparisonSetup, trial: Trial | None) -> str:
    """Return the name of a trial's results: all that they depend on."""
    told = {
        "version": __version__,
        "source": identity(bench.source),
        "tests": bench.tests.digest,
        "dtype": str(bench.dtype),
        "name": trial.name if trial else ORIGINAL,
        "mix": trial.mix if trial else "",
        "calibration": trial.calibration.digest if trial else None,
        "settings": trial.settings.fields() if trial else None,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
