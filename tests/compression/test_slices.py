"""Experts cut into slices, in every family, against transformers and against plain code."""

import itertools
from dataclasses import replace

import pytest
import quantized
import torch
from plain_removal import damped, one_by_one
from quantized import PUBLISHED
from slicing import by_expert, same_bits
from tiny_checkpoints import add_mtp, load_tensors, read_config, write_checkpoint
from tiny_families import EXPERTS, TOP_K
from tiny_parameters import families
from tiny_runs import (
    forward_in_transformers,
    forward_streamed,
    plan_for,
    run,
    run_plan,
    scheduled,
    settings,
    some_tokens,
)

from ream_stream.calibration.tokens import from_tensors
from ream_stream.compression.held_back import held_back
from ream_stream.errors import UsageError
from ream_stream.evaluation.source_diff import against
from ream_stream.evaluation.verify import verify
from ream_stream.model.streamed_model import Batch
from ream_stream.planning.plan import GRAMS

WHOLE = {
    "bailing_hybrid": "two best",
    "deepseek_v3": "two best",
    "deepseek_v32": "two best",
    "deepseek_v4": "table of token ids",
    "hunyuan_v1_moe": "as wide as",
    "llama4_text": "chooses one expert",
    "phimoe": "masks what is near",
}
"""Families whose experts cannot be cut, and a part of the reason."""

OFTEN = ("qwen3_moe", "glm4_moe", "gpt_oss", "granitemoe", *WHOLE)
FLOAT32 = torch.float32


def relative(found, wanted):
    """Return the norm of a difference in shares of what was wanted."""
    return float((found - wanted).norm() / wanted.norm())


def cut(experts, **fields):
    return settings(experts, grouping="none", slices=2, **fields)


def good(output, source):
    findings = [*verify(output, load=True, run=True), *against(output, source)]
    assert [finding.message for finding in findings if not finding.ok] == []


@pytest.mark.parametrize("name", families(*OFTEN))
def test_a_model_of_all_slices_is_the_original_to_rounding_or_is_refused(
    checkpoints, tmp_path, name
):
    source, output = checkpoints(name, FLOAT32), tmp_path / "output"
    if name in WHOLE:
        with pytest.raises(UsageError, match=WHOLE[name]):
            run(source, output, cut(2 * EXPERTS))
        assert not output.exists()
        return
    tokens = some_tokens()
    run(source, output, cut(2 * EXPERTS, refit="down"), tokens)
    good(output, source)
    inputs = [(tokens.input_ids_SL, None)]
    (before,), (after,) = (
        forward_in_transformers(folder, FLOAT32, inputs) for folder in (source, output)
    )
    assert relative(after.logits, before.logits) < 1e-5


@pytest.mark.parametrize("normalizes", [True, False])
def test_one_group_of_experts_and_a_layer_for_more_tokens_are_cut_too(tmp_path, normalizes):
    # where coefficients are not normalized each slice gets all of its expert's
    source, groups = tmp_path / "source", {"n_group": 1, "topk_group": 1}
    write_checkpoint(source, "deepseek_v3", FLOAT32, **groups, norm_topk_prob=normalizes)
    add_mtp(source, "deepseek_v3")
    whole, part, tokens = tmp_path / "whole", tmp_path / "part", some_tokens()
    run(source, whole, cut(2 * EXPERTS), tokens)
    good(whole, source)
    config = read_config(whole)
    assert (config["n_routed_experts"], config["n_shared_experts"]) == (2 * EXPERTS, 2)
    inputs = [(tokens.input_ids_SL, None)]
    (before,), (after,) = (
        forward_streamed(folder, FLOAT32, inputs) for folder in (source, whole)
    )
    assert relative(after.logits, before.logits) < 1e-5
    run(source, part, cut(12, refit="down"), tokens)
    good(part, source)


@pytest.mark.parametrize("name", families(*OFTEN[:4]))
def test_what_is_left_of_slices_loads_and_runs_as_it_was_streamed(checkpoints, tmp_path, name):
    if name in WHOLE:
        pytest.skip("its experts are not cut")
    source, output = checkpoints(name), tmp_path / "output"
    tokens = some_tokens(padded=True)
    run(source, output, cut(12, refit="down", refit_target="layer"), tokens)
    good(output, source)
    inputs = [(tokens.input_ids_SL, tokens.attention_mask_SL)]
    (ours,) = forward_streamed(output, FLOAT32, inputs)
    (theirs,) = forward_in_transformers(output, FLOAT32, inputs)
    assert torch.equal(ours.logits, theirs.logits)


def plain_slices(tensors, hidden_TH, index_TK, weight_TK, keep, width):
    """Choose the slices of a layer of qwen3_moe by the equations, in float64."""
    slices, chosen = 2, {}
    for expert in range(EXPERTS):
        gate_IH, up_IH, down_HI = (
            tensors["0", str(expert), f"{part}_proj.weight"].double()
            for part in ("gate", "up", "down")
        )
        token_R, slot_R = (index_TK == expert).nonzero(as_tuple=True)
        x_RH = hidden_TH[token_R].double()
        inner_RI = torch.nn.functional.silu(x_RH @ gate_IH.T) * (x_RH @ up_IH.T)
        inner_RI = inner_RI * weight_TK[token_R, slot_R].double()[:, None]
        gram_II = inner_RI.T @ inner_RI
        order, errors = one_by_one(gram_II, down_HI)
        first, second = sum(errors[:width]), sum(errors[width : 2 * width])
        chosen[expert] = (order, [first, min(first, second)], damped(gram_II), down_HI)
    ranked = sorted(
        itertools.product(range(slices), range(EXPERTS)),
        key=lambda each: (-chosen[each[1]][1][each[0]], each),
    )[:keep]
    made = []
    for expert in range(EXPERTS):
        count = sum(1 for _, owner in ranked if owner == expert)
        order, _, damped_II, down_HI = chosen[expert]
        neurons = order[: count * width]
        parts = [sorted(neurons[n * width : (n + 1) * width]) for n in range(count)]
        flat = [q for part in parts for q in part]
        new_NH = torch.linalg.solve(damped_II[flat][:, flat], damped_II[flat] @ down_HI.T)
        for rank, part in enumerate(parts):
            down_HW = slices * new_NH[rank * width : (rank + 1) * width].T
            made.append((expert, rank, part, down_HW))
    return made


def test_slices_of_a_layer_are_those_of_the_equations(checkpoints, tmp_path):
    source, output = checkpoints("qwen3_moe", FLOAT32), tmp_path / "output"
    tokens = some_tokens(8, 16)
    done = run(source, output, cut(12, width=7), tokens)
    plan, seen = done.plan, []
    model = plan.source_model
    with model.open_outside(), model.open_layer(0) as experts:
        handle = experts.register_forward_pre_hook(lambda _module, args: seen.append(args))
        batch = Batch(input_ids_BL=tokens.input_ids_SL, attention_mask_BL=None)
        model.observe_layer(0, batch, None)
        handle.remove()
    before, after = by_expert(load_tensors(source)), by_expert(load_tensors(output))
    made = plain_slices(before, *seen[0], keep=12, width=7)
    assert [list(each) for each in done.manifest["layers"][0]["groups"]] == [
        [expert] for expert, *_ in made
    ]
    router_EH = before["model.layers.0.mlp.gate.weight"]
    for number, (expert, rank, neurons, down_HW) in enumerate(made):
        for part in ("gate", "up"):
            rows = before["0", str(expert), f"{part}_proj.weight"][neurons]
            assert same_bits(after["0", str(number), f"{part}_proj.weight"], rows)
        found_HW = after["0", str(number), "down_proj.weight"].double()
        assert relative(found_HW, down_HW) < 1e-4
        row_H = after["model.layers.0.mlp.gate.weight"][number]
        assert torch.allclose(row_H, router_EH[expert] * (1 - 0.01 * rank))
    config, old = read_config(output), read_config(source)
    changed = {key for key in config if config[key] != old[key]}
    assert changed == {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}
    assert (config["num_experts_per_tok"], config["moe_intermediate_size"]) == (2 * TOP_K, 7)


def test_blocks_and_scratch_files_change_no_byte(checkpoints, tmp_path):
    source, tokens = checkpoints("qwen3_moe", FLOAT32), some_tokens(8, 12)
    wanted = cut(12, refit="down", refit_target="trajectory")
    plan = plan_for(source, tokens, wanted)
    outputs = [tmp_path / "one", tmp_path / "blocks"]
    run_plan(scheduled(plan, batch_sequences=2), tokens, outputs[0])
    several = scheduled(plan, batch_sequences=2, gram_blocks=3)
    several = replace(several, scratch={**several.scratch, GRAMS: 1})
    run_plan(several, tokens, outputs[1])
    one, other = map(load_tensors, outputs)
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], other[name]) for name in one)


def test_held_back_sequences_and_padding_are_in_no_sum(checkpoints, tmp_path):
    source = checkpoints("qwen3_moe", FLOAT32)
    tokens = some_tokens(10, 8, padded=True)
    wanted = cut(12, refit="down", refit_target="layer")
    held_S = held_back(tokens, 0)
    other = some_tokens(10, 8, seed=1)
    changed_SL = torch.where(held_S[:, None], other.input_ids_SL, tokens.input_ids_SL)
    mask_SL = tokens.attention_mask_SL
    # what stands where padding is, and what is held back, changes nothing of the choice
    changed_SL = torch.where(mask_SL.bool(), changed_SL, other.input_ids_SL)
    again = from_tensors(
        {"input_ids": changed_SL, "attention_mask": mask_SL}, description="changed"
    )
    done = [
        run(source, tmp_path / str(n), wanted, each) for n, each in enumerate((tokens, again))
    ]
    first, second = (each.manifest["layers"][0] for each in done)
    assert first["groups"] == second["groups"]
    one, two = (by_expert(load_tensors(each.output)) for each in done)
    for number in range(12):
        key = ("0", str(number), "gate_proj.weight")
        assert same_bits(one[key], two[key])


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_slices_of_quantized_experts_are_those_of_their_floats_encoded_again(tmp_path, name):
    coded, plain = quantized.write(tmp_path / "sources", name, FLOAT32)
    multiple = PUBLISHED[name].codec.multiple
    if PUBLISHED[name].family in WHOLE:
        with pytest.raises(UsageError, match=WHOLE[PUBLISHED[name].family]):
            run(coded, tmp_path / "refused", cut(12))
        return
    inner = plan_for(coded, some_tokens(), settings()).experts[0].inner
    if inner % multiple == 0 and inner // 2 % multiple:
        with pytest.raises(UsageError, match=rf"groups of {multiple}.*--dtype bf16"):
            run(coded, tmp_path / "refused", cut(12))
        run(coded, tmp_path / "decoded", cut(12, dtype_out="bf16"))
        good(tmp_path / "decoded", coded)
        return
    done = run(coded, tmp_path / "coded", cut(12))
    good(done.output, coded)
    assert read_config(done.output)["quantization_config"] == PUBLISHED[name].config
    one, other = (
        run(folder, tmp_path / f"{folder.name} at once", cut(12, sequential=False)).manifest
        for folder in (coded, plain)
    )
    assert one["layers"] == other["layers"]
