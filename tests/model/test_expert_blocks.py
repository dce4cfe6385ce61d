"""Experts in blocks outside, batches inside: what comes out does not depend on how many."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from reports import StopAt, stop_when
from safetensors.torch import load_file
from tiny_checkpoints import load_tensors
from tiny_runs import CPU, plan_for, run_plan, scheduled, settings, some_tokens

from ream_stream.compression.journal import load
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import OverBudgetError
from ream_stream.events import BatchHalved, LayerDone, Step
from ream_stream.model.expert_blocks import cut_experts
from ream_stream.model.experts import ExpertWeights
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.planning.allocation import OUTPUTS, SUMS

PLACES = ("memory", "disk", "again")
"""Of what attention gives; sums are in memory or on disk."""


@pytest.fixture(scope="module")
def done(checkpoints, tmp_path_factory):
    """Give a run in blocks, in batches of so many sequences; not to be changed."""

    @cache
    def give(name="qwen3_moe", blocks=1, batch=2, outputs="memory", *, padded=True, **fields):
        tokens = some_tokens(5, 12, padded=padded)
        wanted = settings(6, **fields)
        plan = plan_for(checkpoints(name, torch.float32), tokens, wanted)
        kept = {part: outputs if part == OUTPUTS else "memory" for part in (OUTPUTS, SUMS)}
        if outputs == "disk":
            kept[SUMS] = "disk"
        plan = replace(
            scheduled(plan, batch_sequences=batch, expert_blocks=blocks),
            memory={**plan.memory, **{k: int(place == "memory") for k, place in kept.items()}},
            scratch={k: 1 for k, place in kept.items() if place == "disk"},
        )
        output = tmp_path_factory.mktemp("blocks") / "output"
        return run_plan(plan, tokens, output)

    return give


def groups(run):
    return [layer["groups"] for layer in run.manifest["layers"]]


def statistics(run):
    found = {}
    for path in sorted((run.output / ".ream-stream").glob("statistics-*")):
        found |= {(path.name, key): tensor for key, tensor in load_file(path).items()}
    return found


def assert_nearly_the_same(got, wanted):
    assert groups(got) == groups(wanted)
    wanted = load_tensors(wanted.output)
    for name, tensor in load_tensors(got.output).items():
        assert (tensor - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "all-at-once"])
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_blocks_change_last_bits_at_most(done, name, sequential):
    whole = done(name, sequential=sequential)
    for blocks in (3, 8):
        assert_nearly_the_same(done(name, blocks, sequential=sequential), whole)


@pytest.mark.parametrize("blocks", [1, 3])
def test_bytes_do_not_depend_on_where_things_are_kept(done, blocks):
    first, *others = [done(blocks=blocks, outputs=place) for place in PLACES]
    for other in others:
        # the manifest, and so the digests of all shards
        assert other.files() == first.files()
        for layer, states in first.hidden.items():
            assert torch.equal(other.hidden[layer], states)


def test_the_first_layer_is_observed_bit_for_bit(done):
    whole, blocks = statistics(done()), statistics(done(blocks=3))
    assert whole.keys() == blocks.keys()
    for (file, key), tensor in whole.items():
        if file == "statistics-00000.safetensors":
            assert torch.equal(tensor, blocks[file, key]), key


def test_batches_and_blocks_do_not_change_the_groups(done):
    whole = done(batch=5)
    for batch, blocks in ((1, 1), (1, 3), (4, 2)):
        assert_nearly_the_same(done(batch=batch, blocks=blocks), whole)


def test_a_wrong_sum_would_be_seen(done, checkpoints, tmp_path, monkeypatch):
    from ream_stream.model import experts

    add = experts._Sums.add
    monkeypatch.setattr(
        experts._Sums, "add", lambda self, slot, weighted: add(self, slot, weighted * 1.0001)
    )
    whole = done()
    plan = scheduled(whole.plan, expert_blocks=3)
    off = run_plan(plan, whole.tokens, tmp_path / "output")
    with pytest.raises(AssertionError):
        assert_nearly_the_same(off, whole)


def test_all_batches_are_run_through_a_block_before_the_next_is_read(
    done, tmp_path, monkeypatch
):
    whole, loaded = done(), []
    load_expert = ExpertWeights.load
    monkeypatch.setattr(
        ExpertWeights, "load", lambda self, e: (loaded.append(e), load_expert(self, e))[1]
    )

    def observed(blocks):
        """Return the experts that are loaded while layer 0 is observed, in order."""
        loaded.clear()
        plan = scheduled(whole.plan, expert_blocks=blocks)
        output = tmp_path / f"output-{blocks}"
        workspace = Workspace(output=output, work=output / ".ream-stream")
        with workspace.locked(), pytest.raises(StopAt) as left:
            compress(
                plan,
                whole.tokens,
                workspace,
                device=CPU,
                report=stop_when(
                    lambda event: (
                        isinstance(event, Step)
                        and event.phase == "observe"
                        and event.done == event.total
                    )
                ),
            )
        assert left.value.args[0].total == blocks * 3
        return loaded.copy()

    one, all_of_them = observed(1), observed(8)
    assert all_of_them == sorted(one) != one


def test_a_run_goes_on_with_the_blocks_it_began_with(done, tmp_path):
    whole = done(blocks=3)
    output = tmp_path / "output"
    workspace = Workspace(output=output, work=output / ".ream-stream")
    with workspace.locked():
        leave = stop_when(lambda event: isinstance(event, LayerDone))
        with pytest.raises(StopAt):
            compress(whole.plan, whole.tokens, workspace, device=CPU, report=leave)
    assert load(workspace.journal).schedule.expert_blocks == 3
    again = run_plan(scheduled(whole.plan, expert_blocks=1), whole.tokens, output)
    assert again.files() == whole.files()
    assert not list((output / ".ream-stream").glob("scratch-*"))


@pytest.mark.parametrize("count", [1, 5, 8, 128])
def test_blocks_of_experts_cover_all_once_and_differ_by_one_at_most(count):
    for blocks in (1, 2, 3, 7, 200):
        cut = cut_experts(count, blocks)
        assert [e for block in cut for e in block] == list(range(count))
        sizes = [len(block) for block in cut]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        assert len(cut) == min(blocks, count)


def short_of_memory(monkeypatch, layer, times):
    """Let a GPU be out of memory: the first batch of a layer's observation fails so often."""
    observe, left = StreamedModel.observe_layer, [times]

    def observe_layer(self, index, *args, **kwargs):
        if index == layer and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return observe(self, index, *args, **kwargs)

    monkeypatch.setattr(StreamedModel, "observe_layer", observe_layer)


@pytest.mark.parametrize(("times", "batch"), [(1, 2), (2, 1)])
def test_a_device_short_of_memory_gets_half_as_much_at_once(
    done, tmp_path, monkeypatch, times, batch
):
    whole = done(batch=4)
    plan = scheduled(whole.plan, resident_experts=3)
    short_of_memory(monkeypatch, 2, times)
    again = run_plan(plan, whole.tokens, tmp_path / "output")
    halved = [event for event in again.events if isinstance(event, BatchHalved)]
    assert [event.layer for event in halved] == [2] * times
    assert (halved[-1].batch_sequences, halved[-1].resident_experts) == (batch, 3 >> times)
    assert_nearly_the_same(again, whole)


def test_a_run_that_was_short_of_memory_goes_on_with_the_smaller_batch(
    done, tmp_path, monkeypatch
):
    whole = done(batch=4)
    short_of_memory(monkeypatch, 2, 1)
    wanted = run_plan(whole.plan, whole.tokens, tmp_path / "wanted")
    short_of_memory(monkeypatch, 2, 1)
    output = tmp_path / "output"
    workspace = Workspace(output=output, work=output / ".ream-stream")
    with workspace.locked():
        leave = stop_when(lambda event: isinstance(event, BatchHalved))
        with pytest.raises(StopAt):
            compress(whole.plan, whole.tokens, workspace, device=CPU, report=leave)
    again = run_plan(whole.plan, whole.tokens, output)
    assert again.files() == wanted.files()


def test_one_sequence_that_does_not_fit_the_device_ends_the_run(done, tmp_path, monkeypatch):
    whole = done(batch=4)
    short_of_memory(monkeypatch, 2, 9)
    with pytest.raises(OverBudgetError, match=r"layer 2 does not fit .*--sequence-length"):
        run_plan(whole.plan, whole.tokens, tmp_path / "output")
