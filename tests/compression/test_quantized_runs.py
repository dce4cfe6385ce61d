"""Models compressed in the format that they are published in."""

import json
import shutil
from functools import cache

import pytest
import quantized
import torch
from quantized import PUBLISHED
from slicing import by_expert, same_bits
from tiny_checkpoints import load_tensors, read_config, save_tensors
from tiny_families import EXPERTS
from tiny_runs import (
    CPU,
    forward_in_transformers,
    forward_streamed,
    groups_by_layer,
    refits_by_layer,
    run,
    settings,
    some_tokens,
)

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.held_back import held_back
from ream_stream.errors import DamagedError
from ream_stream.evaluation.source_diff import against
from ream_stream.evaluation.verify import verify
from ream_stream.model.experts import ExpertWeights, Form
from ream_stream.model.streamed_model import Batch, StreamedModel

OFTEN = {"deepseek_v3-fp8", "gpt_oss-mxfp4", "qwen3_moe-nvfp4"}
NAMES = [
    name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(PUBLISHED)
]
KEEP = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Give a quantized checkpoint and its floats."""

    @cache
    def give(name, dtype=torch.float32):
        return quantized.write(tmp_path_factory.mktemp(name), name, dtype)

    return give


@pytest.fixture(scope="module")
def merged(pair, tmp_path_factory):
    @cache
    def give(name):
        return run(pair(name)[0], tmp_path_factory.mktemp("out") / name, settings(KEEP))

    return give


def good(output, source):
    findings = [*verify(output, load=True, run=True), *against(output, source)]
    assert [finding.message for finding in findings if not finding.ok] == []


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_experts_loaded_beside_products_are_decoded_alike(pair, name):
    checkpoint = open_checkpoint(pair(name)[0])
    stack = next(iter(checkpoint.experts.values()))
    form = Form(is_gated=stack.is_gated, has_bias=stack.has_bias)
    with checkpoint.open() as tensors:
        alone, beside = (
            ExpertWeights(tensors, stack, torch.float32, torch.device("cpu"), form, beside=each)
            for each in (False, True)
        )
        for expert in range(stack.count):
            for want, found in zip(alone.load(expert), beside.load(expert), strict=True):
                assert want is found is None or torch.equal(want, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_model_has_the_bits_of_one_made_of_its_floats(pair, name, dtype):
    coded, plain = pair(name, dtype)
    tokens = some_tokens(padded=True)
    inputs = [
        (tokens.input_ids_SL, None),
        (tokens.input_ids_SL, tokens.attention_mask_SL),
    ]
    full = forward_in_transformers(plain, dtype, inputs)
    for ours, theirs in zip(forward_streamed(coded, dtype, inputs), full, strict=True):
        assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("name", NAMES)
def test_merging_makes_what_it_makes_of_the_floats_but_for_rounding(
    pair, merged, name, tmp_path
):
    coded, plain = pair(name)
    done = merged(name)
    good(done.output, coded)
    assert read_config(done.output)["quantization_config"] == PUBLISHED[name].config
    # the same names and dtypes, experts of groups of one byte for byte with their scales
    source, have = (by_expert(load_tensors(folder)) for folder in (coded, done.output))
    groups = {str(layer): groups for layer, groups in groups_by_layer(done).items()}
    seen = 0
    for key, tensor in have.items():
        if isinstance(key, tuple):
            group = groups[key[0]][int(key[1])]
            origin = source[key[0], str(group[0]), key[2]]
            assert (tensor.dtype, tensor.shape) == (origin.dtype, origin.shape)
            assert len(group) > 1 or same_bits(tensor, origin), key
            seen += len(group) == 1
        else:
            assert tensor.dtype == source[key].dtype
    assert seen
    # merged ones are near the merged floats
    wanted = settings(KEEP, dtype_out="bf16", sequential=False)
    decoded, floats = (run(folder, tmp_path / folder.name, wanted) for folder in (coded, plain))
    assert groups_by_layer(decoded) == groups_by_layer(floats)
    want = by_expert(load_tensors(floats.output))
    near = by_expert(load_tensors(decoded.output))
    assert near.keys() == want.keys()
    for key, tensor in near.items():
        torch.testing.assert_close(tensor.float(), want[key].float(), rtol=2**-8, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_experts_changes_no_byte(pair, tmp_path, name):
    coded, _ = pair(name)
    done = run(coded, tmp_path / "out", settings(EXPERTS))
    want, have = load_tensors(coded), load_tensors(done.output)
    assert have.keys() == want.keys()
    assert all(same_bits(have[key], want[key]) for key in want)
    assert read_config(done.output) == read_config(coded)


def given_by_experts(folder, layer, tokens):
    """Return what the experts of a layer give for each sequence, (S, L, H)."""
    model, given = StreamedModel(open_checkpoint(folder), torch.float32, CPU), []
    batch, hidden_BLH = Batch(input_ids_BL=tokens.input_ids_SL, attention_mask_BL=None), None
    with model.open_outside():
        for index in range(layer + 1):
            with model.open_layer(index) as experts:
                if index == layer:
                    experts.register_forward_hook(lambda _m, _args, out: given.append(out))
                hidden_BLH = model.run_layer(index, batch, hidden_BLH)
    return given[0].unflatten(0, tokens.input_ids_SL.shape)


@pytest.mark.parametrize(
    "method",
    [
        {"grouping": "none", "saliency": "energy"},
        pytest.param({"refit_experts": "changed"}, marks=pytest.mark.slow),
    ],
    ids=["pruned", "merged"],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_refit_is_judged_by_what_is_read_of_its_codes(pair, tmp_path, name, method):
    coded, _ = pair(name)
    tokens = some_tokens(20, 24)
    plain, refit = (
        run(coded, tmp_path / each, settings(KEEP, **{**method, "refit": each}), tokens)
        for each in ("none", "down")
    )
    good(refit.output, coded)
    first = min(refitted := refits_by_layer(refit))
    # the same enters the first layer with experts in all of them
    [original, before, after] = (
        given_by_experts(folder, first, tokens)[held_back(tokens, 0)].double()
        for folder in (coded, plain.output, refit.output)
    )
    lacking, left = ((each - original).square().sum().item() for each in (before, after))
    assert refitted[first].remaining_error == pytest.approx(left / lacking, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_output_computes_what_the_run_saw(merged, name):
    done = merged(name)
    [streamed] = forward_streamed(
        done.output, torch.float32, [(done.tokens.input_ids_SL, None)]
    )
    for layer, hidden_SLH in done.hidden.items():
        assert torch.equal(hidden_SLH, streamed.hidden[layer]), layer
    assert streamed.logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_written_as_floats_it_loads_in_transformers(pair, tmp_path, name):
    coded, _ = pair(name)
    wanted = settings(KEEP, dtype_out="bf16", grouping="none")
    done = run(coded, tmp_path / "out", wanted)
    good(done.output, coded)
    config = json.loads((done.output / "config.json").read_text(encoding="utf-8"))
    assert not {"quantization_config", "expert_dtype"} & set(config)
    inputs = [(done.tokens.input_ids_SL, None)]
    [full] = forward_in_transformers(done.output, torch.float32, inputs)
    [streamed] = forward_streamed(done.output, torch.float32, inputs)
    assert torch.equal(streamed.logits, full.logits)
    stored = {entry.dtype for entry in open_checkpoint(done.output).entries.values()}
    assert stored <= {"BF16", "F32", "I64"}  # the last a table of experts


def test_scales_of_activations_serve_all_members(pair, merged):
    """The smallest input_global_scale, which divides, has the widest range."""
    done, source = merged("qwen3_moe-nvfp4"), load_tensors(pair("qwen3_moe-nvfp4")[0])
    have = load_tensors(done.output)
    for layer, groups in groups_by_layer(done).items():
        for number, group in enumerate(groups):
            start = f"model.layers.{layer}.mlp.experts."
            want = min(source[f"{start}{e}.up_proj.input_global_scale"] for e in group)
            assert have[f"{start}{number}.up_proj.input_global_scale"] == want


def test_gate_and_up_of_a_merged_expert_share_the_outer_scale(merged):
    done = merged("qwen3_moe-nvfp4")
    have = load_tensors(done.output)
    for layer, groups in groups_by_layer(done).items():
        for number in (n for n, group in enumerate(groups) if len(group) > 1):
            start = f"model.layers.{layer}.mlp.experts.{number}."
            gate, up = (have[f"{start}{p}_proj.weight_global_scale"] for p in ("gate", "up"))
            assert torch.equal(gate, up)


@pytest.mark.parametrize(
    ("check", "change", "words"),
    [
        ("formats", lambda c: c.pop("quantization_config"), "has no quantization_config"),
        (
            "lists",
            lambda c: c["quantization_config"].update(
                modules_to_not_convert=["lm_head", "mlp.router", "model.layers.0.mlp.experts.6"]
            ),
            "names model.layers.0.mlp.experts.6 in modules_to_not_convert: there is no such",
        ),
        (
            "lists",
            lambda c: c["quantization_config"].update(
                ignore=["layers.2.self_attn.q_proj", "model.layers.3.self_attn", "x.layers.*"]
            ),
            "names model.layers.3.self_attn in ignore",
        ),
    ],
)
def test_a_config_that_tells_another_format_is_seen(merged, tmp_path, check, change, words):
    output = tmp_path / "out"
    shutil.copytree(merged("gpt_oss-mxfp4").output, output)
    config = read_config(output)
    change(config)
    (output / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (finding,) = (f for f in verify(output, scan=False) if not f.ok)
    assert finding.check == check
    assert words in finding.message


def test_lists_of_modules_lose_experts_that_are_gone(tmp_path):
    coded, _ = quantized.write(tmp_path, "qwen3_moe-nvfp4", torch.float32)
    config = read_config(coded)
    config["quantization_config"]["ignore"] = [
        "lm_head",
        "re:.*self_attn.*",
        *(f"model.layers.1.mlp.experts.{e}.up_proj" for e in (0, 5, 6, 7)),
        "model.layers.2.mlp.gate",
        "model.layers.3.mlp.gate",  # there never was one
    ]
    (coded / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run(coded, tmp_path / "out", settings(KEEP, grouping="none"))
    left = read_config(done.output)["quantization_config"]["ignore"]
    listed = config["quantization_config"]["ignore"]
    assert left == [*listed[:4], "model.layers.2.mlp.gate"]


def moved(coded, folder, place):
    """Return a copy of a checkpoint whose description of formats stands elsewhere."""
    copy = shutil.copytree(coded, folder)
    config = read_config(copy)
    described = config.pop("quantization_config")
    names = ["lm_head", *(f"model.layers.1.mlp.experts.{e}.up_proj" for e in (0, 7))]
    inside = {"quant_algo": "NVFP4", "exclude_modules": names}
    if place != "file":
        config["compression_config" if place == "older key" else "quantization_config"] = (
            described | {"quantized_layers": dict.fromkeys(names[1:], inside)}
        )
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if place in {"file", "both"}:
        text = json.dumps({"producer": {"version": "0.29.0"}, "quantization": inside})
        (copy / "hf_quant_config.json").write_text(text, encoding="utf-8")
    return copy


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "place", ["file", pytest.param("both", marks=SLOW), pytest.param("older key", marks=SLOW)]
)
def test_a_description_of_formats_is_followed_wherever_it_stands(pair, tmp_path, place):
    coded, _ = pair("glm4_moe-nvfp4-modelopt")
    source = moved(coded, tmp_path / "source", place)
    for dtype in ("keep", "bf16"):
        wanted = settings(KEEP, dtype_out=dtype, grouping="none")
        done = run(source, tmp_path / f"out-{dtype}", wanted)
        plain = run(coded, tmp_path / f"plain-{dtype}", wanted)
        good(done.output, source)
        have, want = load_tensors(done.output), load_tensors(plain.output)
        assert have.keys() == want.keys()
        assert all(same_bits(have[key], want[key]) for key in want)
        said = "".join(path.read_text(encoding="utf-8") for path in done.output.glob("*.json"))
        assert "experts.7" not in said
        is_coded = dtype == "keep"
        assert ("quant_algo" in said) is is_coded
        assert ("0.29.0" in said) is (is_coded and place != "older key")
        assert (done.output / "hf_quant_config.json").exists() is (
            is_coded and place != "older key"
        )


def test_a_description_that_is_lost_or_none_is_seen(pair, tmp_path):
    source = moved(pair("glm4_moe-nvfp4-modelopt")[0], tmp_path / "source", "both")
    done = run(source, tmp_path / "out", settings(KEEP, grouping="none"))
    (done.output / "hf_quant_config.json").unlink()
    [finding] = [finding for finding in against(done.output, source) if not finding.ok]
    assert "hf_quant_config.json" in finding.message
    (source / "hf_quant_config.json").write_text('{"quantization": []}', encoding="utf-8")
    with pytest.raises(DamagedError, match=r"quantization of hf_quant_config\.json is not an"):
        run(source, tmp_path / "other", settings(KEEP, grouping="none"))


@pytest.mark.parametrize(
    "names",
    [
        ("k_proj.k_scale", "v_proj.v_scale"),
        pytest.param(("k_scale", "v_scale", "q_scale", "prob_scale"), marks=SLOW),
    ],
    ids=["modelopt", "llm-compressor"],
)
def test_scales_of_the_cache_are_kept_with_the_format_and_no_longer(pair, tmp_path, names):
    source = shutil.copytree(pair("glm4_moe-fp8-channel")[0], tmp_path / "source")
    scales = {
        f"model.layers.{i}.self_attn.{n}": torch.tensor(0.5) for i in (0, 1) for n in names
    }
    save_tensors(source, load_tensors(source) | scales)
    done = run(source, tmp_path / "out", settings(KEEP, grouping="none"))
    good(done.output, source)
    assert scales.keys() <= load_tensors(done.output).keys()
    [note] = [f for f in verify(done.output, load=True) if f.is_note and f.check == "load"]
    assert f"{len(scales)} scales of cached keys and values" in note.message
    floats = run(source, tmp_path / "floats", settings(KEEP, dtype_out="bf16", grouping="none"))
    good(floats.output, source)
    assert not scales.keys() & load_tensors(floats.output).keys()
    assert not any(f.is_note and f.check == "load" for f in verify(floats.output, load=True))
