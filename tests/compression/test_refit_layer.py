"""Refits in a run, against dense least squares in float64 on what transformers computes."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from reports import StopAt, stop_when
from tiny_checkpoints import load_tensors
from tiny_runs import (
    CPU,
    forward_in_transformers,
    plan_for,
    refits_by_layer,
    run,
    run_plan,
    scheduled,
    settings,
    some_tokens,
    storing,
)
from transformers import AutoModelForCausalLM

from ream_stream.calibration.tokens import from_tensors
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.held_back import held_back
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import OverBudgetError, UsageError
from ream_stream.events import LayerDone, Step
from ream_stream.model.attention_cache import main_output
from ream_stream.planning.planner import make_plan
from ream_stream.planning.refit_memory import ACTIVATIONS, KEPT
from ream_stream.planning.schedule import Budgets, Solver

KEEP = 6
FAMILIES = [
    "qwen2_moe",
    "deepseek_v3",
    "mixtral",
    pytest.param("deepseek_v4", marks=pytest.mark.slow),
]
"""With a gated shared expert; sigmoid, scaled, grouped and a shared expert; neither; of another
activation, with a table of experts and several states of a token."""
pruned = partial(settings, KEEP, grouping="none", saliency="energy")
refitted = partial(pruned, refit="down")


@pytest.fixture(scope="module")
def tokens():
    return some_tokens(20, 24)


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints("qwen3_moe", torch.float32)


def downs(model, index):
    module = next(
        module
        for path, module in model.model.layers[index].named_modules()
        if path.endswith("experts") and hasattr(module, "down_proj")
    )
    return module, module.down_proj.detach().double()


@torch.no_grad()
def called(model, index, tokens):
    """Return a layer's experts, what they are called with, and what they give."""
    module, _ = downs(model, index)
    seen = []
    handle = module.register_forward_hook(lambda _m, args, output: seen.append((args, output)))
    model(input_ids=tokens.input_ids_SL, attention_mask=tokens.attention_mask_SL)
    handle.remove()
    return module, *seen[0]


@torch.no_grad()
def design(module, hidden_TH, index_TK, weight_TK):
    """Return the activations of all experts, times their coefficients: (T, E, I)."""
    wide = module.gate_up_proj.shape[1] // 2
    matrix_TEI = torch.zeros(len(hidden_TH), len(module.gate_up_proj), wide).double()
    for expert, gate_up in enumerate(module.gate_up_proj.double()):
        inner_TI = module._apply_gate(torch.nn.functional.linear(hidden_TH.double(), gate_up))
        coefficient_T = ((index_TK == expert) * weight_TK).sum(dim=1).double()
        matrix_TEI[:, expert] = inner_TI * coefficient_T[:, None]
    return matrix_TEI


def least_squares(matrix_TEI, lacking_TH, penalty):
    count, inner = matrix_TEI.shape[1:]
    mean_E = matrix_TEI.square().sum(dim=0).mean(dim=1)
    root = (penalty * mean_E).sqrt().repeat_interleave(inner)
    matrix = torch.cat([matrix_TEI.flatten(1), torch.diag(root)])
    target = torch.cat([lacking_TH, torch.zeros(len(root), lacking_TH.shape[1]).double()])
    return torch.linalg.lstsq(matrix, target, driver="gelsd").solution.view(count, inner, -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_refitted_as_dense_least_squares_would(
    checkpoints, tmp_path, tokens, name
):
    source = checkpoints(name, torch.float32)
    done = run(source, tmp_path / "out", refitted(refit_iterations=50), tokens)
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    held_T = held_back(tokens, 0).repeat_interleave(24)
    groups = {layer["index"]: layer["groups"] for layer in done.manifest["layers"]}
    assert any(found.penalty for found in refits_by_layer(done).values())
    for index, found in refits_by_layer(done).items():
        before, after = load(source).eval(), load(done.output).eval()
        module, old_EHI = downs(before, index)
        kept = [group[0] for group in groups[index]]
        _, given, _ = called(after, index, tokens)
        module, new_EHI = downs(after, index)
        change_EIH = (new_EHI - old_EHI[kept]).transpose(1, 2)
        matrix_TEI = design(module, *given)
        after.model.layers[index] = before.model.layers[index]
        _, _, wanted_TH = called(after, index, tokens)
        output_TH = torch.einsum("tei,ehi->th", matrix_TEI, old_EHI[kept])
        lacking_TH = wanted_TH.double() - output_TH
        energy = lacking_TH[held_T].square().sum()
        seen, held = (matrix_TEI[~held_T], lacking_TH[~held_T]), matrix_TEI[held_T]
        for penalty, share in found.tried:
            # each expert's own equations, and the best step along their solution
            alone = [least_squares(seen[0][:, [e]], seen[1], penalty) for e in range(KEEP)]
            predicted_TH = torch.einsum("tei,eih->th", held, torch.cat(alone))
            shared = max(0, (predicted_TH * lacking_TH[held_T]).sum())
            gained = shared**2 / predicted_TH.square().sum()
            assert share == pytest.approx((1 - gained / energy).item(), rel=1e-3)
        assert found.error_before == pytest.approx(
            (energy / wanted_TH[held_T].double().square().sum()).item(), rel=1e-3
        )
        if found.penalty is None:
            assert not change_EIH.any()
        else:
            wanted_EIH = least_squares(*seen, found.penalty)
            predicted_TH = torch.einsum("tei,eih->th", held, wanted_EIH)
            left = (lacking_TH[held_T] - predicted_TH).square().sum()
            assert found.remaining_error == pytest.approx((left / energy).item(), rel=1e-3)
            assert (change_EIH - wanted_EIH).norm() < 1e-5 * wanted_EIH.norm() + 1e-6


@torch.no_grad()
def leaving(model, index, tokens):
    """Return what leaves a layer, (T, H)."""
    seen = []
    handle = model.model.layers[index].register_forward_hook(
        lambda _m, _args, output: seen.append(main_output(output))
    )
    model(input_ids=tokens.input_ids_SL, attention_mask=tokens.attention_mask_SL)
    handle.remove()
    return seen[0].flatten(0, 1).double()


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_a_trajectory_is_refitted_to_what_leaves_each_layer_of_the_original(
    checkpoints, tmp_path, tokens, name
):
    source = checkpoints(name, torch.float32)
    wanted = refitted(refit_iterations=50, refit_target="trajectory")
    done = run(source, tmp_path / "out", wanted, tokens)
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    before, after = load(source).eval(), load(done.output).eval()
    held_T = held_back(tokens, 0).repeat_interleave(24)
    groups = {layer["index"]: layer["groups"] for layer in done.manifest["layers"]}
    assert any(found.penalty for found in refits_by_layer(done).values())
    for index, found in refits_by_layer(done).items():
        old_EHI = downs(before, index)[1][[group[0] for group in groups[index]]]
        module, given, _ = called(after, index, tokens)
        change_EIH = (downs(after, index)[1] - old_EHI).transpose(1, 2)
        matrix_TEI = design(module, *given)
        made_TH = torch.einsum("tei,eih->th", matrix_TEI, change_EIH)
        lacking_TH = leaving(before, index, tokens) - leaving(after, index, tokens) + made_TH
        target_TH = lacking_TH + torch.einsum("tei,ehi->th", matrix_TEI, old_EHI)
        energy = lacking_TH[held_T].square().sum()
        share = energy / target_TH[held_T].square().sum()
        assert found.error_before == pytest.approx(share.item(), rel=1e-3)
        if found.penalty is not None:
            expected = least_squares(matrix_TEI[~held_T], lacking_TH[~held_T], found.penalty)
            assert (change_EIH - expected).norm() < 1e-4 * expected.norm() + 1e-6
            left = (lacking_TH - made_TH)[held_T].square().sum() / energy
            assert found.remaining_error == pytest.approx(left.item(), rel=1e-3)
    assert not list((done.output / ".ream-stream").glob("original*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "qwen2_moe",
        "gpt_oss",  # with biases
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("deepseek_v3", "deepseek_v4", "mixtral", "llama4_text", "gemma4_text")
        ),
    ],
)
def test_what_enters_the_next_layer_is_what_the_written_one_gives(
    checkpoints, tmp_path, name, dtype
):
    source, padded = checkpoints(name, dtype), some_tokens(20, 24, padded=True)
    wanted = settings(KEEP, group_size=2, refit="down", dtype=str(dtype).removeprefix("torch."))
    done = run(source, tmp_path / "out", wanted, padded)
    assert any(found.penalty for found in refits_by_layer(done).values())
    real_SL = padded.attention_mask_SL.bool()
    given = [(padded.input_ids_SL, padded.attention_mask_SL)]
    (full,) = forward_in_transformers(done.output, dtype, given)
    for layer, hidden_SLH in done.hidden.items():
        ours, theirs = (each[real_SL].float() for each in (hidden_SLH, full.hidden[layer]))
        # as far apart as roundings in the dtype take them from layer to layer
        assert (ours - theirs).norm() < 4 * torch.finfo(dtype).eps * theirs.norm(), layer


@pytest.mark.parametrize("experts", ["all", "changed"])
def test_activations_made_again_give_the_same_bytes_as_kept_ones(
    checkpoints, tmp_path, tokens, experts
):
    wanted = settings(KEEP, group_size=2, refit="down", refit_experts=experts, dtype="bfloat16")
    plan = plan_for(checkpoints("qwen2_moe"), tokens, wanted)
    assert plan.memory[ACTIVATIONS] > 0
    plan = scheduled(plan, batch_sequences=7)
    kept = run_plan(plan, tokens, tmp_path / "kept")
    plan = replace(plan, memory={**plan.memory, ACTIVATIONS: 0})
    again = run_plan(plan, tokens, tmp_path / "again")
    assert any(found.penalty for found in refits_by_layer(kept).values())
    assert kept.files() == again.files()
    for layer, hidden_SLH in kept.hidden.items():
        assert torch.equal(hidden_SLH, again.hidden[layer])


def test_a_budget_too_small_for_a_refit_is_refused_with_what_else_would_do(source, tokens):
    with pytest.raises(OverBudgetError, match=r"Give --ram \d+MB or more, .* or --refit none"):
        make_plan(open_checkpoint(source), refitted(), 20, 24, budgets=Budgets.of(1000))
    with pytest.raises(OverBudgetError, match=r"--similarity-tokens$"):
        make_plan(open_checkpoint(source), pruned(), 20, 24, budgets=Budgets.of(1000))


def test_a_trajectory_takes_twice_the_disk_for_states(source, tokens):
    one, two = (
        plan_for(source, tokens, refitted(refit_target=target))
        for target in ("layer", "trajectory")
    )
    assert two.disk["hidden states"] == 2 * one.disk["hidden states"]
    assert two.disk_bytes == one.disk_bytes + one.disk["hidden states"]


@pytest.mark.parametrize(
    "name", ["gemma4_text", pytest.param("deepseek_v4", marks=pytest.mark.slow)]
)
def test_a_layer_that_puts_its_experts_outputs_through_a_norm_or_factor_has_no_trajectory(
    checkpoints, tokens, name
):
    wanted = refitted(refit_target="trajectory")
    source = checkpoints(name, torch.float32)
    with pytest.raises(UsageError, match=f"layer 0 of {name} does not simply"):
        plan_for(source, tokens, wanted)
    plan_for(source, tokens, refitted())


def test_a_refit_goes_on_with_the_batch_it_began_with(source, tmp_path, tokens):
    plan = plan_for(source, tokens, refitted())
    plan = replace(plan, memory={**plan.memory, KEPT: 0})  # stores of as many rows as batches
    small, large = (scheduled(plan, batch_sequences=size) for size in (3, 20))
    wanted = run_plan(small, tokens, tmp_path / "wanted")
    output = tmp_path / "output"
    workspace = Workspace(output=output, work=output / ".ream-stream")
    leave = stop_when(lambda event: isinstance(event, LayerDone))
    with workspace.locked(), pytest.raises(StopAt):
        compress(small, tokens, workspace, device=CPU, report=leave)
    assert run_plan(large, tokens, output).files() == wanted.files()


def test_only_down_projections_change(source, tmp_path, tokens):
    plain = run(source, tmp_path / "plain", pruned(sequential=False), tokens)
    done = run(source, tmp_path / "out", refitted(sequential=False), tokens)
    ours, theirs = load_tensors(done.output), load_tensors(plain.output)
    helped = {layer for layer, found in refits_by_layer(done).items() if found.penalty}
    assert helped
    for key, tensor in theirs.items():
        layer = int(key.split(".")[2]) if "layers" in key else None
        changes = ".experts." in key and "down" in key and layer in helped
        assert torch.equal(ours[key], tensor) != changes, key


WAYS = {
    "gathered": Solver(preconditioner="blocks", gathered=True, column_blocks=1),
    "passes": Solver(preconditioner="blocks", gathered=False, column_blocks=1),
    "columns": Solver(preconditioner="blocks", gathered=False, column_blocks=5),
    "gathered-columns": Solver(preconditioner="blocks", gathered=True, column_blocks=2),
    "diagonal": Solver(preconditioner="diagonal", gathered=False, column_blocks=2),
}


def test_every_way_to_solve_comes_to_the_same(source, tmp_path, tokens):
    wanted = refitted(refit_iterations=30, refit_lambda=(1.0,))
    plan = plan_for(source, tokens, wanted)
    assert plan.schedule.solver == WAYS["gathered"]
    runs = {
        name: run_plan(scheduled(plan, solver=way), tokens, tmp_path / name)
        for name, way in WAYS.items()
    }
    first = load_tensors(runs["gathered"].output)
    for name, done in runs.items():
        for index, found in refits_by_layer(done).items():
            wanted = refits_by_layer(runs["gathered"])[index]
            assert found.penalty == wanted.penalty
            assert found.remaining_error == pytest.approx(wanted.remaining_error, rel=1e-4)
            assert found.residuals[-1] == pytest.approx(wanted.residuals[-1], rel=1e-4)
        for key, tensor in load_tensors(done.output).items():
            torch.testing.assert_close(tensor, first[key], rtol=1e-5, atol=1e-5, msg=name)


def test_stores_on_disk_give_the_same_bytes_and_are_gone_afterwards(source, tmp_path, tokens):
    plan = plan_for(source, tokens, refitted())
    assert plan.memory[KEPT] > 0
    one = run_plan(plan, tokens, tmp_path / "memory")
    plan = scheduled(replace(plan, memory={**plan.memory, KEPT: 0}), batch_sequences=20)
    other = run_plan(plan, tokens, tmp_path / "disk")
    assert one.files() == other.files()
    assert not list((other.output / ".ream-stream").glob("scratch*"))


@pytest.mark.parametrize(
    ("where", "target", "columns"),
    [
        ("disk", "layer", 1),
        ("both", "trajectory", 3),
        *(
            pytest.param(*way, marks=pytest.mark.slow)
            for way in (("memory", "layer", 3), ("both", "layer", 3), ("disk", "trajectory", 1))
        ),
    ],
)
def test_stored_activations_give_the_bytes_of_experts_run_at_once(
    source, tmp_path, tokens, where, target, columns
):
    plan = scheduled(
        plan_for(source, tokens, refitted(refit_target=target)),
        batch_sequences=7,
        solver=Solver(preconditioner="blocks", gathered=False, column_blocks=columns),
    )
    once = run_plan(plan, tokens, tmp_path / "once")
    plan = storing(plan, 1, where)
    assert plan.refit_blocks == [range(KEEP)]
    done = run_plan(plan, tokens, tmp_path / "stored")
    assert any(found.penalty for found in refits_by_layer(done).values())
    assert done.files() == once.files()
    for layer, hidden_SLH in once.hidden.items():
        assert torch.equal(hidden_SLH, done.hidden[layer])
    assert not list((done.output / ".ream-stream").glob("scratch*"))


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [
        ("gpt_oss", "float32", "layer"),  # with biases
        ("qwen3_moe", "float32", "trajectory"),
        pytest.param("qwen3_moe", "float32", "layer", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "bfloat16", "layer", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "bfloat16", "trajectory", marks=pytest.mark.slow),
    ],
)
def test_a_refit_in_blocks_differs_in_last_bits_at_most(
    checkpoints, tmp_path, tokens, name, dtype, target
):
    source = checkpoints(name, getattr(torch, dtype))
    wanted = refitted(dtype=dtype, refit_target=target, refit_lambda=(1.0,))
    plan = scheduled(plan_for(source, tokens, wanted), batch_sequences=7)
    whole = run_plan(plan, tokens, tmp_path / "whole")
    first = run_plan(storing(plan, 3, "memory"), tokens, tmp_path / "memory")
    assert (
        run_plan(storing(plan, 3, "disk"), tokens, tmp_path / "disk").files() == first.files()
    )
    ours, theirs = load_tensors(first.output), load_tensors(whole.output)
    helped = [found.remaining_error for found in refits_by_layer(whole).values()]
    assert [found.remaining_error for found in refits_by_layer(first).values()] == (
        pytest.approx(helped, rel=1e-4 if dtype == "float32" else 0.02)
    )
    part = 1e-5 if dtype == "float32" else 0.02
    for key, tensor in theirs.items():
        difference = (ours[key].float() - tensor.float()).norm()
        assert difference <= part * tensor.float().norm(), key


@pytest.mark.parametrize("done", [1, 9, 15])
def test_a_refit_in_blocks_that_is_stopped_goes_on_to_the_same_bytes(
    source, tmp_path, tokens, done
):
    plan = scheduled(plan_for(source, tokens, refitted()), batch_sequences=4)
    plan = storing(plan, 2, "disk")
    whole = run_plan(plan, tokens, tmp_path / "whole")
    output = tmp_path / "output"
    workspace = Workspace(output=output, work=output / ".ream-stream")
    leave = stop_when(
        lambda event: isinstance(event, Step) and (event.phase, event.done) == ("refit", done)
    )
    with workspace.locked(), pytest.raises(StopAt):
        compress(plan, tokens, workspace, device=CPU, report=leave)
    assert run_plan(plan, tokens, output).files() == whole.files()
    assert not list((output / ".ream-stream").glob("scratch*"))


@pytest.mark.parametrize("grouping", ["none", "ream"])
def test_keeping_all_experts_changes_no_byte(source, tmp_path, tokens, grouping):
    plain = run(source, tmp_path / "plain", settings(8, grouping=grouping), tokens)
    done = run(source, tmp_path / "out", settings(8, grouping=grouping, refit="down"), tokens)
    assert done.shards() == plain.shards()
    assert set(refits_by_layer(done).values()) == {None}
    assert "refit" not in {event.phase for event in done.events if isinstance(event, Step)}


def test_a_layer_that_refitting_does_not_help_is_left_as_it_was(source, tmp_path):
    few = some_tokens(3, 5)
    plain = run(source, tmp_path / "plain", pruned(), few)
    done = run(source, tmp_path / "out", refitted(refit_lambda=(1e-4,)), few)
    first = min(refits_by_layer(done))
    found = refits_by_layer(done)[first]
    assert found.penalty is None
    assert found.remaining_error == 1
    shard = done.plan.layers[first].shards[0].name
    assert done.shards()[shard] == plain.shards()[shard]
    assert done.manifest["layers"][0]["refitted"]["penalty"] is None


def test_experts_that_were_not_merged_may_be_left_as_they_are(source, tmp_path, tokens):
    done = run(
        source,
        tmp_path / "out",
        settings(KEEP, group_size=2, refit="down", refit_experts="changed"),
        tokens,
    )
    before, after = load_tensors(source), load_tensors(done.output)
    assert any(found.penalty for found in refits_by_layer(done).values())
    for layer in done.manifest["layers"]:
        start = f"model.layers.{layer['index']}.mlp.experts."
        for number, group in enumerate(layer["groups"]):
            same = torch.equal(
                after[f"{start}{number}.down_proj.weight"],
                before[f"{start}{group[0]}.down_proj.weight"],
            )
            assert same == (len(group) == 1)


def test_padding_is_neither_fitted_nor_judged_by(source, tmp_path, tokens):
    ids_SL = torch.nn.functional.pad(tokens.input_ids_SL, (0, 6), value=5)
    mask_SL = torch.nn.functional.pad(torch.ones_like(tokens.input_ids_SL), (0, 6))
    wide = from_tensors({"input_ids": ids_SL, "attention_mask": mask_SL}, description="wide")
    one = run(source, tmp_path / "one", refitted(), tokens)
    other = run(source, tmp_path / "other", refitted(), wide)
    for index, found in refits_by_layer(one).items():
        padded = refits_by_layer(other)[index]
        assert found.penalty == padded.penalty
        assert found.error_before == pytest.approx(padded.error_before, rel=1e-3)
        assert found.remaining_error == pytest.approx(padded.remaining_error, rel=1e-3)


def test_the_objective_falls_and_the_events_count_up(source, tmp_path, tokens):
    done = run(source, tmp_path / "out", refitted(), tokens)
    for found in refits_by_layer(done).values():
        assert list(found.residuals) == sorted(found.residuals, reverse=True)
        assert dict(found.tried)[found.penalty] == min(dict(found.tried).values())
        assert found.remaining_error < 1
    for layer in refits_by_layer(done):
        steps = [
            step
            for step in done.events
            if isinstance(step, Step) and (step.layer, step.phase) == (layer, "refit")
        ]
        assert [step.done for step in steps] == sorted(step.done for step in steps)
        assert sum(step.done == step.total for step in steps) == 1


def test_the_manifest_tells_what_refitting_came_to(source, tmp_path, tokens):
    done = run(source, tmp_path / "out", refitted(), tokens)
    for layer in done.manifest["layers"]:
        found = refits_by_layer(done)[layer["index"]]
        assert layer["refitted"]["remaining_error"] == found.remaining_error
        assert layer["refitted"]["tried"] == [list(pair) for pair in found.tried]
    assert json.loads(json.dumps(done.manifest))["fingerprint"]["refit_lambda"] == [0.3, 1, 3]


def test_a_tenth_of_each_domain_is_held_back():
    ids_SL = torch.ones(50, 2, dtype=torch.int64)
    domain_S = torch.tensor([0] * 29 + [1] * 20 + [2])
    tokens = from_tensors({"input_ids": ids_SL, "domain": domain_S}, description="three")
    held_S = held_back(tokens, 0)
    assert [int(held_S[domain_S == domain].sum()) for domain in range(3)] == [3, 2, 0]
    assert torch.equal(held_S, held_back(tokens, 0))
    assert not torch.equal(held_S, held_back(tokens, 1))


def test_one_sequence_cannot_be_judged_by_another(source, tmp_path):
    with pytest.raises(UsageError, match="holds back"):
        run(source, tmp_path / "out", refitted(), some_tokens(1, 12))
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"refit_lambda": ()}, "above 0"),
        ({"refit_lambda": (0.0,)}, "above 0"),
        ({"refit_lambda": (1.0, 1.0)}, "twice"),
        ({"refit_iterations": 0}, "at least 1"),
        ({"refit_experts": "changed"}, "no expert"),
        ({"refit_target": "trajectory", "sequential": False}, "no other trajectory"),
    ],
)
def test_what_cannot_be_refitted_is_refused(source, tokens, wanted, message):
    with pytest.raises(UsageError, match=message):
        plan_for(source, tokens, refitted(**wanted))
