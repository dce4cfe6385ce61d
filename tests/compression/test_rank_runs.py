"""Runs on several ranks: the bytes of one process, killed and resumed with other numbers."""

import dataclasses
import signal

import pytest
import quantized
import torch
from crash import digests, kills
from killed_runs import VARIANTS, WORK, Runs, check_what_is_left, write_mtp_source
from rank_runs import on_ranks
from tiny_runs import CPU, Workspace, plan_for, scheduled, settings, some_tokens

from ream_stream.calibration.tokens import from_tensors
from ream_stream.compression.pipeline import compress
from ream_stream.model.ranks import connected, heartbeat
from ream_stream.planning.plan import GRAMS, OUTPUTS
from ream_stream.planning.refit_memory import ACTIVATIONS, KEPT
from ream_stream.planning.schedule import Solver

pytestmark = pytest.mark.crash

DEFAULT = {"ream", "refit"}
SIZES = (2, 4)
"""Of 5 batches, so that ranks have unlike numbers of them."""


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(
            name,
            size,
            marks=() if (name, size) in {("ream", 2), ("refit", 2)} else pytest.mark.slow,
        )
        for name in VARIANTS
        for size in SIZES
    ],
)
def test_several_ranks_write_the_bytes_of_one(name, size, crash_source, tmp_path):
    source = write_mtp_source(tmp_path / "source") if name == "mtp" else crash_source
    runs = Runs(source, VARIANTS[name], tmp_path, batch=1)
    runs.run(tmp_path / "one")
    found = runs.on_ranks(tmp_path / "several", size)
    assert [ending.error for ending in found] == [""] * size
    assert digests(tmp_path / "several") == digests(tmp_path / "one")


SCHEDULES = {
    "blocks": {"expert_blocks": 3, "gram_blocks": 2},
    "columns": {
        "solver": Solver(preconditioner="diagonal", gathered=False, column_blocks=3),
        "gram_blocks": 4,
    },
    "gathered": {"solver": Solver(preconditioner="blocks", gathered=True, column_blocks=1)},
}
METHODS = {
    "ream": {},
    "energy": {"grouping": "none", "saliency": "energy", "refit": "down"},
    "all-at-once": {"sequential": False, "refit": "down"},
    "slices": {
        "grouping": "none",
        "slices": 2,
        "refit": "down",
        "refit_target": "trajectory",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_padded_sets_of_several_domains_in_any_schedule(
    method, keeps, schedule, checkpoints, tmp_path
):
    experts = 12 if method == "slices" else 6
    wanted = settings(experts, dtype="bfloat16", **METHODS[method])
    asked = SCHEDULES[schedule]
    if wanted.method.refit != "none" and wanted.sequential:
        # a layer that runs from kept activations has no experts to cut into blocks
        asked = {**asked, "expert_blocks": 1}
    check(checkpoints("qwen3_moe"), wanted, tmp_path, asked, keeps=keeps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3-fp8", "gpt_oss-mxfp4", "qwen3_moe-nvfp4"])
@pytest.mark.parametrize("method", ["ream", "energy"])
def test_quantized_checkpoints(name, method, tmp_path):
    source, _ = quantized.write(tmp_path, name, torch.float32)
    check(source, settings(6, **METHODS[method]), tmp_path, {}, keeps=True)


def check(source, wanted, folder, schedule, *, keeps):
    """Compare what one, two and three ranks make of a padded set of two domains."""
    drawn = some_tokens(5, padded=True)
    tokens = from_tensors(
        {**drawn.tensors(), "domain": torch.tensor([0, 1, 0, 1, 1])},
        domains=("code", "text"),
        description="drawn",
    )
    plan = scheduled(plan_for(source, tokens, wanted), batch_sequences=1, **schedule)
    if not keeps:  # stores on the disk, and activations made anew in each pass
        memory = {**plan.memory, OUTPUTS: 0, GRAMS: 0, ACTIVATIONS: 0}
        memory |= {KEPT: 0} if KEPT in memory else {}
        plan = dataclasses.replace(plan, memory=memory, scratch={OUTPUTS: 1, GRAMS: 1})

    def job(ranks, output):
        workspace = Workspace(output=output, work=output / WORK, rank=ranks.rank)
        if ranks.is_first:
            with workspace.locked():
                ranks.gather(None)
                compress(plan, tokens, workspace, device=CPU, ranks=ranks)
        else:
            ranks.gather(None)
            compress(plan, tokens, workspace, device=CPU, ranks=ranks)

    found = {}
    for size in (1, 2, 3):
        output = folder / str(size)
        endings = on_ranks(size, lambda ranks: job(ranks, output), folder / f"told-{size}")  # noqa: B023
        assert [ending.error for ending in endings] == [""] * size
        found[size] = digests(output)
    assert found[2] == found[1]
    assert found[3] == found[1]


@pytest.fixture
def quick_signs(monkeypatch):
    for module in (heartbeat, connected):
        monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
        monkeypatch.setattr(module, "SILENT_SECONDS", 1.0)


CASES = [(0, 2, 1), (1, 2, 3), (0, 3, 2), (2, 3, 1)]
"""Rank that is killed, number of ranks then, and number that go on."""


@pytest.mark.parametrize(
    ("name", "every", "whole"),
    [
        ("ream", 60, False),
        pytest.param("ream", 9, False, marks=pytest.mark.slow),
        pytest.param("ream", 9, True, marks=pytest.mark.slow),
        pytest.param("refit-trajectory", 19, False, marks=pytest.mark.slow),
        pytest.param("slices", 19, False, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_are_killed_go_on_with_another_number_of_them(
    name, every, whole, crash_source, tmp_path, quick_signs
):
    runs = Runs(crash_source, VARIANTS[name], tmp_path)
    control = runs.control()
    points = kills(control.ending.steps, thin=True)[every // 2 :: every]
    killed = 0
    for place, kill in enumerate(points):
        victim, size, then = CASES[place % len(CASES)]
        output = tmp_path / f"{kill.step}-{kill.moment}"
        # the others take fewer steps than rank 0
        at = kill if victim == 0 else dataclasses.replace(kill, step=kill.step // 8)
        found = runs.on_ranks(output, size, at, victim, whole=whole)
        if found[victim].status == -signal.SIGKILL:
            killed += 1
            for rank, ending in enumerate(found):
                if rank != victim and not whole:
                    assert f"rank {victim} (" in ending.error
            check_what_is_left(output, control)
        assert all(e.status == 0 for e in runs.on_ranks(output, then))
        assert digests(output) == control.output, f"{kill}, rank {victim} of {size}"
    assert killed >= len(points) // 2
