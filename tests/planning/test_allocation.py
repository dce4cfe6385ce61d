"""What a plan takes of budgets: batch, blocks of experts, places for what is kept."""

import re
from dataclasses import replace

import pytest
from tiny_families import TOP_K
from tiny_runs import SCHEDULE, settings

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.errors import OverBudgetError
from ream_stream.model.expert_blocks import cut_experts
from ream_stream.planning import allocation, disk, memory, planner, schedule
from ream_stream.planning.allocation import CHUNKS, NORMS, OUTPUTS, SUMS
from ream_stream.planning.cost import cost_of
from ream_stream.planning.phase_cost import total
from ream_stream.planning.refit_memory import ACTIVATIONS, INPUTS, KEPT
from ream_stream.planning.schedule import Begun, Budgets
from ream_stream.units import parse_size, size_option

SEQUENCES, LENGTH, HIDDEN = 64, 2, 32
OURS = 300_000_000
"""What the interpreter seems to take."""


@pytest.fixture
def plan_of(checkpoints, monkeypatch):
    """Plan a run; `cache` is what the machine has beyond what the interpreter takes."""
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: OURS)
    monkeypatch.setattr(schedule, "anonymous_bytes", lambda: OURS)
    monkeypatch.setattr(allocation, "MAX_BATCH_TOKENS", 4 * LENGTH)
    checkpoint = open_checkpoint(checkpoints("qwen3_moe"))

    def give(cache=1 << 40, ram=1 << 40, disk=None, vram=None, refit="none", **options):
        monkeypatch.setattr(schedule, "available_bytes", lambda: cache)
        # comparing experts would take more than any batch of so small a model
        wanted = settings(6, grouping="none", refit=refit)
        plan = planner.make_plan(
            checkpoint,
            wanted,
            SEQUENCES,
            LENGTH,
            budgets=Budgets.of(ram, disk=disk, vram=vram),
            **options,
        )
        assert sum(plan.memory.values()) == plan.memory_bytes <= ram
        return plan

    return give


def scarce(plan):
    """A cache that holds less than a layer's experts beside what is planned."""
    return plan.memory_bytes - OURS + 20_000


def test_a_layer_that_the_page_cache_holds_is_not_cut(plan_of):
    plan = plan_of()
    assert (plan.schedule.batch_sequences, plan.schedule.expert_blocks) == (4, 1)
    assert not plan.scratch
    assert NORMS not in plan.memory


def test_a_layer_that_it_does_not_hold_is_cut_and_read_once_a_phase(plan_of):
    whole = plan_of()
    plan = plan_of(cache=scarce(whole))
    # 8 experts of 3 KiB in blocks that fill half of 20 kB
    assert plan.schedule.expert_blocks == 3
    tokens = SEQUENCES * LENGTH
    assert plan.memory[NORMS] == 4 * tokens * TOP_K
    assert plan.memory[SUMS] == 4 * tokens * HIDDEN
    one, cut = (total(cost_of(each, cache_bytes=0).values()) for each in (whole, plan))
    # 2 layers of experts are observed in 16 batches, and the first, with 6, is propagated
    experts = 3 * 32 * 16 * 2 * (8 + 8 + 6)
    states = plan.hidden_bytes
    saved = one.read_bytes - cut.read_bytes
    assert saved == pytest.approx(15 * experts - 2 * states, rel=0.05)


def test_one_batch_reads_a_layer_once_anyway(plan_of, monkeypatch):
    monkeypatch.setattr(allocation, "MAX_BATCH_TOKENS", SEQUENCES * LENGTH)
    assert plan_of(cache=scarce(plan_of())).schedule.expert_blocks == 1


def test_experts_are_not_cut_where_passes_would_read_more_than_batches(plan_of, monkeypatch):
    monkeypatch.setattr(allocation, "MAX_BATCH_TOKENS", 16 * LENGTH)
    whole = plan_of()
    # 3 more readings of 24 kB against 2 more passes over 16 kB of states, read and written
    assert (whole.num_batches, plan_of(cache=scarce(whole)).schedule.expert_blocks) == (4, 1)


def test_what_memory_has_no_room_for_goes_to_disk_and_its_chunk_is_counted(plan_of):
    whole = plan_of()
    plain = sum(size for part, size in whole.memory.items() if part != OUTPUTS)
    states = 4 * SEQUENCES * LENGTH * HIDDEN
    assert whole.memory[OUTPUTS] == states
    plan = plan_of(ram=plain + states - 1)
    assert plan.memory[OUTPUTS] == 0
    assert plan.memory[CHUNKS] == 3 * states // 16
    assert plan.scratch == {OUTPUTS: states}
    assert plan.disk_bytes == whole.disk_bytes + states
    # with no room for a chunk either, attention runs again
    assert not plan_of(ram=plain + 1000).keeps(OUTPUTS)


def test_attention_that_is_kept_nowhere_is_counted_in_each_pass(plan_of):
    whole = plan_of()
    cut = plan_of(cache=scarce(whole))
    again = replace(cut, memory={**cut.memory, OUTPUTS: 0})
    flop = [total(cost_of(p, cache_bytes=0).values()).product_flop for p in (whole, cut, again)]
    assert flop[0] == flop[1] < flop[2]


def test_a_disk_without_room_for_sums_leaves_experts_whole(plan_of):
    whole = plan_of()
    plain = sum(size for part, size in whole.memory.items() if part != OUTPUTS)
    cache, ram = plain - OURS + 20_000, plain + 12_000
    roomy = plan_of(cache=cache, ram=ram)
    assert roomy.schedule.expert_blocks > 1
    assert roomy.scratch[SUMS] == 4 * SEQUENCES * LENGTH * HIDDEN
    tight = plan_of(cache=cache, ram=ram, disk=whole.disk_bytes)
    assert tight.schedule.expert_blocks == 1
    assert not tight.scratch


def test_a_disk_budget_is_kept_or_refused_with_the_smallest_that_works(plan_of):
    needed = plan_of().disk_bytes
    assert plan_of(disk=needed).disk_bytes == needed
    with pytest.raises(OverBudgetError, match=r"largest parts are .* Give --disk") as refused:
        plan_of(disk=needed - 1)
    told = parse_size(re.search(r"--disk (\w+)", str(refused.value))[1])
    assert needed <= told < 1.01 * needed  # three digits, rounded up


def test_other_files_are_part_of_the_disk(plan_of):
    plan = plan_of()
    assert plan.disk["other files"] == sum(
        (plan.source.folder / name).stat().st_size
        for name in ("tokenizer.json", "generation_config.json")
    )


def test_parts_of_device_memory_add_up_to_no_more_than_its_budget(plan_of):
    roomy = plan_of(vram=1 << 34)
    assert roomy.schedule.resident_experts == 8
    assert roomy.schedule.expert_blocks == 1
    least = sum(roomy.device_memory.values()) - roomy.device_memory["experts kept"]
    # room for half of the experts: two blocks of four, each kept
    half = plan_of(vram=least + 4 * 3 * 32 * 16 * 4)
    assert (half.schedule.expert_blocks, half.schedule.resident_experts) == (2, 4)
    assert half.schedule.batch_sequences == roomy.schedule.batch_sequences
    assert sum(half.device_memory.values()) == least + 4 * 3 * 32 * 16 * 4
    # less: a smaller batch, down to a refusal
    small = plan_of(vram=least - 1)
    assert small.schedule.batch_sequences < roomy.schedule.batch_sequences
    assert sum(small.device_memory.values()) <= least - 1
    with pytest.raises(OverBudgetError, match=r"of device memory .* Give --vram (\d+)"):
        plan_of(vram=1000)


def begun(batch, blocks=1):
    then = replace(SCHEDULE, batch_sequences=batch, expert_blocks=blocks)
    return Begun(schedule=then, layers=0, written_bytes=0)


def test_what_a_device_keeps_is_not_cut_for_the_page_cache(plan_of):
    plain = plan_of(vram=1 << 34)
    cache = scarce(plain)
    assert plan_of(cache=cache).schedule.expert_blocks > 1
    whole = plan_of(cache=cache, vram=1 << 34)
    assert (whole.schedule.expert_blocks, whole.schedule.resident_experts) == (1, 8)
    # each expert is read from disk once a phase, as with blocks
    assert cost_of(whole, cache_bytes=0)["observe"].read_bytes == (
        cost_of(plain, cache_bytes=1 << 40)["observe"].read_bytes
    )
    least = sum(plain.device_memory.values()) - plain.device_memory["experts kept"]
    half = plan_of(cache=cache, vram=least + 4 * 3 * 32 * 16 * 4)
    assert (half.schedule.expert_blocks, half.schedule.resident_experts) == (2, 4)


def test_a_run_that_is_gone_on_with_keeps_batch_and_blocks(plan_of):
    plan = plan_of(begun=begun(3, 2))
    assert (plan.schedule.batch_sequences, plan.schedule.expert_blocks) == (3, 2)
    assert plan.memory[NORMS] > 0


def test_a_smaller_budget_than_its_batch_needs_is_refused(plan_of):
    needed = {}
    for batch in (4, 16):
        plan = plan_of(begun=begun(batch))
        needed[batch] = plan.memory_bytes - plan.memory[OUTPUTS]
    assert needed[4] < needed[16]
    assert plan_of(ram=needed[4]).schedule.batch_sequences == 4, "begun anew, it would fit"
    with pytest.raises(OverBudgetError, match=r"begun with 16 sequences at a time") as refused:
        plan_of(ram=needed[4], begun=begun(16))
    assert f"--ram {size_option(needed[16])} or more" in str(refused.value)


def test_scratch_stores_take_no_more_than_the_disk_has_free(plan_of, tmp_path, monkeypatch):
    whole = plan_of()
    ram = sum(size for part, size in whole.memory.items() if part != OUTPUTS) + 12_000
    output = tmp_path / "out"
    monkeypatch.setattr(disk, "free_bytes", lambda _path: whole.disk_bytes)
    assert not plan_of(ram=ram, output=output).scratch
    monkeypatch.setattr(disk, "free_bytes", lambda _path: whole.disk_bytes + (1 << 16))
    assert plan_of(ram=ram, output=output).scratch


def test_padding_is_counted_where_there_is_some(plan_of):
    with_masks, without = plan_of(), plan_of(padded=False)
    assert with_masks.memory_bytes > without.memory_bytes


def test_experts_that_all_stay_are_not_compared(checkpoints):
    source = open_checkpoint(checkpoints("qwen3_moe"))
    merged, kept = (
        planner.make_plan(source, settings(experts), 4, 12).memory for experts in (6, 8)
    )
    # running an expert on the sample is more than any batch of so small a model
    assert merged["token sample"] > 0
    assert "work: compare" in merged
    assert not {"token sample", "mean outputs", "work: compare"} & set(kept)


def cut_for_a_refit(plan_of, **options):
    """Plan a refit on a device with room for half of the experts."""
    plain = plan_of(refit="down", vram=1 << 34)
    kept = plain.device_memory["experts kept"]
    least = sum(plain.device_memory.values()) - kept
    return plan_of(refit="down", vram=least + kept // 2, **options)


def test_a_refit_on_a_device_that_cannot_keep_the_experts_stores_activations(plan_of):
    plain = plan_of(refit="down", vram=1 << 34)
    assert (plain.schedule.expert_blocks, plain.refit_blocks) == (1, [])
    assert plain.memory[INPUTS] == plain.hidden_bytes
    plan = cut_for_a_refit(plan_of)
    assert plan.refit_blocks == cut_experts(6, plan.schedule.expert_blocks)
    activations = 1.05 * SEQUENCES * LENGTH * TOP_K * 16 * 4
    assert plan.memory[ACTIVATIONS] == int(activations)
    assert INPUTS not in plan.memory
    # targets and a tenth of them, and down projections in the dtype of the checkpoint
    assert plan.memory[KEPT] == int(1.1 * 4 * SEQUENCES * LENGTH * HIDDEN) + 2 * 6 * 16 * HIDDEN
    for each in (plain, plan):
        assert not each.scratch
    # as little is read as with a page cache that holds all experts
    assert cost_of(plan, cache_bytes=0)["refit"].read_bytes < (
        1.5 * cost_of(plain, cache_bytes=1 << 40)["refit"].read_bytes
    )


def test_what_a_refit_keeps_takes_the_memory_there_is_and_the_disk_for_the_rest(plan_of):
    whole = cut_for_a_refit(plan_of)
    sizes = {part: whole.memory[part] for part in (ACTIVATIONS, KEPT)}
    placed = sum(whole.memory.get(part, 0) for part in (*sizes, SUMS, OUTPUTS))
    bare = whole.memory_bytes - placed
    ram = bare + sizes[ACTIVATIONS] // 2 + 3 * placed // 16
    # where a page cache holds the layer, computing them again is cheaper than the disk
    assert cut_for_a_refit(plan_of, ram=ram).refit_blocks == []
    plan = cut_for_a_refit(plan_of, ram=ram, cache=bare - OURS + 20_000)
    assert plan.memory_bytes <= ram
    assert 0 < plan.memory[ACTIVATIONS] < sizes[ACTIVATIONS]
    for part, nbytes in sizes.items():
        assert plan.memory[part] + plan.scratch.get(part, 0) == nbytes
    assert plan.schedule == whole.schedule
    one, other = (cost_of(each, cache_bytes=0)["refit"] for each in (whole, plan))
    assert other.read_bytes > one.read_bytes
    assert other.expert_flop == one.expert_flop


def test_a_refit_on_the_processor_cuts_a_layer_that_the_page_cache_does_not_hold(plan_of):
    whole = plan_of(refit="down")
    assert (whole.schedule.expert_blocks, whole.refit_blocks) == (1, [])
    assert whole.memory[ACTIVATIONS] > 0
    kept = sum(whole.memory[part] for part in (ACTIVATIONS, KEPT, OUTPUTS))
    cache = whole.memory_bytes - kept - OURS + 20_000
    plan = plan_of(refit="down", cache=cache)
    assert plan.schedule.expert_blocks > 1
    assert plan.refit_blocks == cut_experts(6, plan.schedule.expert_blocks)
    reads = [total(cost_of(p, cache_bytes=0).values()).read_bytes for p in (whole, plan)]
    assert reads[1] < reads[0] / 3
    begun_whole = plan_of(refit="down", cache=cache, begun=begun(4))
    assert (begun_whole.schedule.expert_blocks, begun_whole.refit_blocks) == (1, [])
