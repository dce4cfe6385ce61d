"""Comparisons: every trial once, the original once, and what follows from the numbers."""

import csv
import io
import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_runs import on_ranks
from reports import Events, StopAt, stop_when
from tiny_runs import CPU, settings

from ream_stream.calibration.tokens import from_tensors, joined
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.cli.comparison_view import (
    Grid,
    as_csv,
    comparison_facts,
    markdown,
    recommendation,
    sweep_facts,
    trials_of,
)
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.cli.report.figures import (
    bars,
    lines,
    pareto_picture,
    size_picture,
    standalone,
)
from ream_stream.compression import pipeline
from ream_stream.compression.candidate_plans import expert_layer
from ream_stream.compression.file_lock import MARK
from ream_stream.errors import InterruptedRunError, UsageError
from ream_stream.evaluation import comparison
from ream_stream.evaluation.comparison import (
    ALL,
    ORIGINAL,
    ComparisonSetup,
    Outcome,
    Trial,
    run_trials,
    spread,
    summary,
)
from ream_stream.evaluation.evaluate import evaluate
from ream_stream.evaluation.pareto import correlation, front, hypervolume, reference
from ream_stream.evaluation.size_curve import MOST_NATS, size_curve
from ream_stream.evaluation.variants import SETS, VARIANTS, named, settings_of
from ream_stream.events import Comparing, Finished, LayerDone, Step
from ream_stream.planning import allocation
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Budgets
from ream_stream.settings import Method


def drawn(sequences, length=24, *, seed):
    generator = torch.Generator().manual_seed(seed)
    ids_SL = torch.randint(2, 4096, (sequences, length), generator=generator)
    return from_tensors({"input_ids": ids_SL}, description="drawn")


def bench(folder):
    return ComparisonSetup(
        source=open_checkpoint(CHECKPOINT),
        tests=joined({"one": drawn(2, seed=1), "two": drawn(3, seed=2)}, description="tests"),
        folder=folder,
        device=CPU,
        dtype=torch.float32,
        threads=1,
        budgets=Budgets.of(10**11),
    )


def trial(name="reap", *, seed=0, experts=24):
    return Trial(
        name=name,
        settings=settings(experts, grouping="none", seed=seed),
        calibration=drawn(4, seed=10 + seed),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give two trials that were carried out: their bench, outcomes and events."""
    job = bench(tmp_path_factory.mktemp("trials"))
    events = Events()
    outcomes = run_trials(job, [trial(seed=0), trial(seed=1)], events)
    return job, outcomes, events


def test_the_numbers_are_those_of_an_evaluation(made, tmp_path):
    job, outcomes, _ = made
    assert [each.name for each in outcomes] == [ORIGINAL, "reap", "reap"]
    result = evaluate(job.source, job.tests, tmp_path, dtype=torch.float32, device=CPU)
    assert outcomes[0].value(ALL, "nats") == pytest.approx(result.evaluation.nats)
    domain = result.by_domain(job.tests)["two"]
    assert outcomes[0].value("two", "perplexity") == pytest.approx(domain.evaluation.perplexity)
    assert outcomes[0].value(ALL, "nats more") == 0
    first = outcomes[1]
    gap = first.value("one", "nats") - outcomes[0].value("one", "nats")
    assert first.value("one", "nats more") == pytest.approx(gap)
    assert first.value(ALL, "divergence") > 0
    assert first.output_bytes < 7_770_000
    assert first.fields["grouping"] == "none"


def test_the_original_is_run_once_and_compressed_checkpoints_are_removed(made):
    job, _, events = made
    assert sum(isinstance(event, Finished) for event in events) == 2
    evaluated = [
        e for e in events if isinstance(e, Step) and e.total == 5 and e.phase == "score"
    ]
    assert len(evaluated) == 3 * 5
    # four layers of the original, and of each output three on the way and four measured
    assert sum(isinstance(e, Step) and e.phase == "propagate" for e in events) == 4 + 2 * 7
    left = sorted(path.name for path in job.folder.iterdir())
    assert left == [MARK, "lock", "results", "trials"]
    assert list((job.folder / "trials").iterdir()) == []


def test_ranks_divide_the_trials_and_come_to_the_same_numbers(made, tmp_path):
    alone, outcomes, _ = made

    def job(ranks):
        events = Events()
        parted = replace(bench(tmp_path / "out"), ranks=ranks)
        found = run_trials(parted, [trial(seed=0), trial(seed=1)], events)
        numbers = [event.number for event in events if isinstance(event, Comparing)]
        return numbers, [[each.name, each.seed, each.scores] for each in found]

    endings = on_ranks(2, job, tmp_path / "told")
    assert [ending.error for ending in endings] == ["", ""]
    wanted = json.loads(json.dumps([[o.name, o.seed, o.scores] for o in outcomes]))
    assert [ending.value for ending in endings] == [[[1, 3], wanted], [[2], wanted]]
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {path.name for path in alone.folder.iterdir()}


def test_what_was_measured_is_not_done_again(made):
    job, outcomes, _ = made
    events = Events()
    again = run_trials(job, [trial(seed=0), trial(seed=1)], events)
    assert events == []
    assert again == outcomes


@pytest.mark.parametrize("after", [1, 9, 22, 31])
def test_an_interrupted_comparison_goes_on_to_the_same_numbers(made, tmp_path, after):
    _, outcomes, events = made
    with pytest.raises(InterruptedRunError):
        run_trials(bench(tmp_path), [trial(seed=0)], Events(after))
    left = Events()
    again = run_trials(bench(tmp_path), [trial(seed=0)], left)
    assert len(left) < len(events)
    assert [replace(each, seconds=None) for each in again] == [
        replace(each, seconds=None) for each in outcomes[:2]
    ]


def test_a_trial_goes_on_with_the_batch_it_began_with(tmp_path, monkeypatch):
    planned = []

    def compress(plan, *rest, **options):
        planned.append(plan.schedule.batch_sequences)
        return pipeline.compress(plan, *rest, **options)

    monkeypatch.setattr(comparison, "compress", compress)
    with monkeypatch.context() as smaller:
        smaller.setattr(allocation, "MAX_BATCH_TOKENS", 2 * 24)
        leave = stop_when(lambda event: isinstance(event, LayerDone))
        with pytest.raises(StopAt):
            run_trials(bench(tmp_path), [trial()], leave)
    run_trials(bench(tmp_path), [trial()])
    assert planned == [2, 2]


def outcome(name, seed, nats, *, mix="", **scores):
    facts = {"perplexity": math.exp(nats), "nats": nats, "accuracy": {"value": 0.5}}
    domains = {
        domain: {**facts, "accuracy": {"value": value}} for domain, value in scores.items()
    }
    return Outcome(
        name=name,
        mix=mix,
        seed=seed,
        scores={ALL: facts, **domains},
        seconds=None,
        output_bytes=None,
        fields={},
    )


def test_mean_and_spread_by_hand():
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert spread([1.0]) == (1.0, 0.0)
    assert spread([1.0, None]) is None
    listed = summary([outcome(ORIGINAL, 0, 1.0), outcome("a", 0, 2.0), outcome("a", 1, 4.0)])
    assert [(each["name"], each["runs"]) for each in listed] == [(ORIGINAL, 1), ("a", 2)]
    assert listed[1]["scores"][ALL]["nats"] == (3.0, pytest.approx(math.sqrt(2)))


def test_a_comparison_is_told_as_table_json_and_csv(made):
    job, outcomes, _ = made
    known = json.loads(json.dumps(comparison_facts(job, outcomes)))
    assert [each["runs"] for each in known["summary"]] == [1, 2]
    table = markdown(outcomes).splitlines()
    assert re.fullmatch(r"\| reap \| (\S+ \+- \S+ \| ){5}", table[3] + " ")
    flat = list(csv.DictReader(io.StringIO(as_csv(outcomes))))
    assert len(flat) == 3 * 3
    assert float(flat[4]["nats"]) == outcomes[1].value("one", "nats")


def test_the_front_and_the_hypervolume_by_hand():
    points = [(3.0, 1.0), (2.0, 2.0), (1.0, 3.0), (1.0, 1.0)]
    assert front(points) == [0, 1, 2]
    assert reference(points) == (0.0, 0.0)
    # boxes 3 x 1, 2 x 2 and 1 x 3: 1 x 3 at the bottom, 1 x 2 above it, 1 x 1 on top
    assert hypervolume(points, (0.0, 0.0)) == 6
    assert hypervolume([(5.0, 7.0)], (4.0, 6.0)) == 1
    assert hypervolume([(2.0, 3.0, 4.0)], (1.0, 1.0, 1.0)) == 6
    # two boxes 2x1x1 and 1x1x2 that share a unit
    assert hypervolume([(2.0, 1.0, 1.0), (1.0, 1.0, 2.0)], (0.0, 0.0, 0.0)) == 3
    assert hypervolume([(1.0, 5.0)], (1.0, 0.0)) == 0
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]


@given(
    points=st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=1, max_size=6),
)
def test_the_hypervolume_is_the_count_of_covered_unit_cubes(points):
    cubes = {
        (x, y, z)
        for point in points
        for x in range(point[0])
        for y in range(point[1])
        for z in range(point[2])
    }
    assert hypervolume([tuple(map(float, p)) for p in points], (0.0, 0.0, 0.0)) == len(cubes)


def test_a_correlation_of_what_never_varies_is_none():
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert correlation([1.0, 2.0], [3.0, 3.0]) is None
    assert correlation([1.0], [3.0]) is None


def swept():
    mixes = ("general-50-math-50-code-00", "general-00-math-30-code-70")
    outcomes = [
        outcome(ORIGINAL, 0, 1.0, general=0.9, code=0.9),
        outcome("a", 0, 1.0, mix=mixes[0], general=0.6, code=0.2),
        outcome("b", 0, 1.0, mix=mixes[0], general=0.5, code=0.2),
        outcome("a", 0, 1.0, mix=mixes[1], general=0.2, code=0.6),
        outcome("b", 0, 1.0, mix=mixes[1], general=0.1, code=0.7),
    ]
    return sweep_facts(outcomes)


def test_a_sweep_by_hand():
    known = swept()
    assert known["axes"] == ["general", "code"]
    assert known["corner"] == pytest.approx((9, 19))
    assert [each["on front"] for each in known["points"]] == [True, False, True, True]
    # a: 51 x 1 and 11 x 41 less what they share; b: 41 x 1 and 1 x 51
    assert known["hypervolume"]["a"] == pytest.approx(51 * 1 + 11 * 41 - 11 * 1)
    assert known["hypervolume"]["b"] == pytest.approx(41 * 1 + 1 * 51 - 1 * 1)
    assert known["correlations"]["a"]["general"]["general"] == pytest.approx(1)
    assert known["correlations"]["a"]["code"]["general"] == pytest.approx(-1)
    json.dumps(known)


def test_pictures_are_svg_that_brings_its_colors_along():
    figures = [
        pareto_picture(swept()),
        bars([0.0, 2.0], "bars & more", "height", marked=[1]),
        lines({"own": [0.1, 0.2], "total": [0.2, 0.3]}, "layer", "error"),
    ]
    for figure in figures:
        ElementTree.fromstring(figure)
    root = ElementTree.fromstring(standalone(figures[0]))
    assert root[0].tag.endswith("style")
    dots = [each for each in root.iter() if each.tag.endswith("title")]
    assert len(dots) == 5


def at_size(name, experts, nats, *, mix="", seed=0):
    measured = outcome(name, seed, nats, mix=mix)
    facts = {**measured.scores[ALL], "difference": {"nats": nats}}
    facts |= {"divergence": {"value": nats}, "agreement": {"value": 0.9}}
    return replace(
        measured, scores={ALL: facts}, output_bytes=experts * 1000, fields={"experts": experts}
    )


def recommended(*outcomes):
    curve = size_curve(summary([outcome(ORIGINAL, 0, 1.0), *outcomes]), ALL)
    if curve is None:
        return None
    point = curve["points"][curve["recommended"]]
    return point["name"], point["experts"]


def test_the_smallest_size_within_the_bound_is_recommended_or_the_one_that_loses_least():
    large, middle = at_size("a", 28, 0.01), at_size("a", 24, MOST_NATS)
    small = at_size("a", 16, MOST_NATS + 0.001)
    assert recommended(large, middle, small) == ("a", 24)
    assert recommended(large, small) == ("a", 28)
    # of one size the method that loses less; a mean over seeds counts
    assert recommended(large, middle, at_size("b", 24, 0.02)) == ("b", 24)
    assert recommended(large, middle, at_size("a", 24, 0.06, seed=1)) == ("a", 28)
    assert recommended(small, at_size("a", 20, 0.7), at_size("b", 20, 0.06)) == ("a", 16)
    assert recommended(middle, at_size("b", 24, 0.02)) is None


def test_loss_against_size_is_a_line_a_method_and_a_point_for_what_is_recommended():
    first, second = "general-50-math-50-code-00", "general-00-math-30-code-70"
    outcomes = [
        outcome(ORIGINAL, 0, 1.0),
        at_size("a", 28, 0.01, mix=first),
        at_size("a", 16, 0.4, mix=second),
    ]
    known = sweep_facts(outcomes)
    drawn = size_picture(known["curve"])
    ElementTree.fromstring(drawn)
    assert drawn.count("<polyline") == 4  # two lines, a point, and no front
    assert f"<title>a, {second}, 16 experts: 16000.00, 0.40</title>" in drawn
    assert "recommended: 28 experts, a" in drawn
    assert [each["name"] for each in known["points"]] == ["a, 28 kept", "a, 16 kept"]
    assert recommendation(known).startswith(
        f"recommended: 28 experts by a, {first}, 28.0 kB, 0.0100 nats a token more ("
    )
    assert "28" in markdown(outcomes)


def test_sets_of_variants_are_variants_that_can_be_planned():
    source = open_checkpoint(CHECKPOINT)
    assert named("ream, methods") == ("ream", "reap", "hc-smoe", "mc-smoe", "frequency")
    with pytest.raises(UsageError, match="'reem' is not known; there are: methods, ablation"):
        named("reem")
    for names in SETS.values():
        assert set(names) <= set(VARIANTS)
    seen = set()
    for name in VARIANTS:
        wanted = settings_of(
            name,
            experts=16,
            layer=expert_layer(source),
            seed=3,
            compute_dtype="float32",
            device_kind="cpu",
        )
        plan = make_plan(source, wanted, 4, 16)
        assert wanted.method.group_size == 32 or wanted.cuts
        old, new = plan.experts
        assert new.count * new.inner == pytest.approx(16 * old.inner, rel=0.04)
        seen.add(json.dumps(wanted.fields()))
    assert len(seen) == len(VARIANTS)
    assert VARIANTS["ream without gate term"]["gate_term"] is not Method().gate_term


def test_a_grid_has_each_method_on_each_mix_with_each_seed(tmp_path):
    grid = Grid(
        experts=(24,), methods=("ream", "reap"), seeds=(0, 1), group_size=4, mixes=("", "x")
    )
    trials = trials_of(bench(tmp_path), grid, lambda mix, seed: (mix, seed))
    assert [(t.mix, t.name, t.settings.seed) for t in trials] == [
        (mix, name, seed) for mix in ("", "x") for name in ("ream", "reap") for seed in (0, 1)
    ]
    assert all(t.calibration == (t.mix, t.settings.seed) for t in trials)
    assert {t.settings.method.group_size for t in trials} == {4}
