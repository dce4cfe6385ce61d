"""Multi-token-prediction layers: what enters them, what becomes of their experts.

Letters in shapes: B sequences, L tokens of a sequence, H hidden, T tokens.
"""

import json
import shutil
from dataclasses import dataclass
from functools import cache

import pytest
import quantized
import torch
from real_layers import LENGTH, SEQUENCES, Really
from safetensors.torch import load_file
from slicing import by_expert, same_bits
from slicing import sliced_by_hand as sliced
from tiny_checkpoints import (
    INDEX,
    add_mtp,
    load_tensors,
    read_config,
    save_tensors,
    write_checkpoint,
)
from tiny_families import BESIDE, EXPERTS, MTP, TINY
from tiny_parameters import mtp_families
from tiny_runs import (
    CPU,
    forward_streamed,
    groups_by_layer,
    output_in_transformers,
    run,
    settings,
    some_tokens,
)
from tiny_wrappers import write_wrapper
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from ream_stream.calibration.tokens import from_tensors, mask_without_next
from ream_stream.checkpoint.config_json import find_mtp
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.errors import UnsupportedModelError
from ream_stream.evaluation.source_diff import against
from ream_stream.evaluation.verify import verify
from ream_stream.model.mtp import WIRINGS, without_mtp
from ream_stream.model.streamed_model import Batch, StreamedModel
from ream_stream.planning.activation_memory import Footprints

FAMILIES = mtp_families()
SLOW = pytest.mark.slow
KEEP = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Give a family's checkpoint with such a layer; not to be changed."""

    @cache
    def give(name):
        folder = tmp_path_factory.mktemp("sources") / name
        add_mtp(write_checkpoint(folder, name, torch.bfloat16), name)
        return folder

    return give


@pytest.fixture(scope="module")
def ream(source, tmp_path_factory):
    """Give a family's run with REAM's defaults."""

    @cache
    def give(name):
        return run(source(name), tmp_path_factory.mktemp("ream") / name, settings(KEEP))

    return give


@pytest.fixture(scope="module")
def pruned(source, tmp_path_factory):
    """Give a family pruned on padded tokens, layers seeing the source."""
    wanted = settings(KEEP, grouping="none", sequential=False)

    @cache
    def give(name):
        output = tmp_path_factory.mktemp("pruned") / name
        return run(source(name), output, wanted, some_tokens(padded=True))

    return give


@dataclass(frozen=True)
class Published:
    """What the published forward makes of tokens; of the last, which has no next, nothing."""

    entering_BLH: torch.Tensor
    leaving_BLH: torch.Tensor
    experts: tuple
    """The experts' module, and what it was called with."""


def decoder_alone(folder, into):
    """Write a checkpoint without its multi-token-prediction layer."""
    shutil.copytree(folder, into)
    tensors, config = load_tensors(folder), read_config(folder)
    gone = find_mtp(tensors, config)
    save_tensors(into, {key: t for key, t in tensors.items() if key not in gone})
    return into


def block_alone(folder, into, last):
    """Write the layer's decoder block as the only layer of a model."""
    decoder_alone(folder, into)
    tensors, config = load_tensors(folder), read_config(folder)
    block = {key: t for key, t in tensors.items() if not key.startswith("model.layers.")}
    for start in ("mtp.layers.0.", f"model.layers.{last}."):
        block |= {
            key.replace(start, "model.layers.0."): t
            for key, t in tensors.items()
            if key.startswith(start)
        }
    beside = ("mtp.", *(f"model.layers.0.{p}" for p in ("e", "hn", "shared_head")))
    save_tensors(into, {k: t for k, t in block.items() if not k.startswith(beside)})
    config |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "mlp_only_layers": []}
    one = {"mlp_layer_types": ["sparse"], "indexer_types": ["full"]}
    if "layer_types" in config:
        kinds = {"deepseek_v32": "indexed_attention", "glm_moe_dsa": "indexed_attention"}
        kinds["mellum"] = "sliding_attention"
        one["layer_types"] = [kinds.get(config["model_type"], "full_attention")]
    config |= {key: value for key, value in one.items() if key in config}
    (into / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return into


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def published(folder, name, tokens, tmp_path):
    """Compute the layer as the published code does, in plain torch around transformers."""
    if name == "deepseek_v4":
        return published_of_states(folder, tokens, tmp_path)
    tensors, config = load_tensors(folder), read_config(folder)
    last, qwen = config["num_hidden_layers"], name.startswith("qwen")
    beside = name in BESIDE
    ids_BL, mask_BL = tokens.input_ids_SL, tokens.attention_mask_SL
    trunk = load(decoder_alone(folder, tmp_path / "decoder"))
    hidden_BLH = trunk.model(ids_BL, mask_BL, use_cache=False).last_hidden_state
    embedded_BLH = tensors["model.embed_tokens.weight"][ids_BL[:, 1:]].float()
    embedded_BLH = functional.pad(embedded_BLH, (0, 0, 0, 1))

    def norm(x, key):
        weight_H = tensors[key].float() + qwen  # theirs are kept as what is added to one
        scale = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        return x * scale * weight_H

    start = "mtp." if beside else f"model.layers.{last}."
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc")
    enorm, hnorm, projection = (
        f"{start}{part}.weight" for part in (names if beside else ("enorm", "hnorm", "eh_proj"))
    )
    both = torch.cat([norm(embedded_BLH, enorm), norm(hidden_BLH, hnorm)], dim=-1)
    entering_BLH = both @ tensors[projection].float().T
    block = load(block_alone(folder, tmp_path / "block", last))
    seen = []
    layer = block.model.layers[0]
    layer.register_forward_hook(
        lambda _module, _args, output: seen.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    layer.mlp.experts.register_forward_hook(
        lambda module, args, _: seen.append((module, *args))
    )
    block.model(inputs_embeds=entering_BLH, attention_mask=mask_BL, use_cache=False)
    return Published(entering_BLH=entering_BLH, leaving_BLH=seen[1], experts=seen[0])


def published_of_states(folder, tokens, tmp_path):
    """The same of a family whose layers pass several states of a token on."""
    tensors, config = load_tensors(folder), read_config(folder)
    ids_BL, mask_BL = tokens.input_ids_SL, tokens.attention_mask_SL
    trunk, seen = load(decoder_alone(folder, tmp_path / "decoder")), []
    trunk.model.layers[-1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    trunk.model(ids_BL, mask_BL, use_cache=False)
    embedded_BLH = tensors["embed.weight"][ids_BL[:, 1:]].float()
    embedded_BLH = functional.pad(embedded_BLH, (0, 0, 0, 1))

    def part(x, norm, projection):
        scale = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        normed = x * scale * tensors[f"mtp.0.{norm}.weight"].float()
        return normed @ tensors[f"mtp.0.{projection}.weight"].float().T

    entering = part(embedded_BLH, "enorm", "e_proj")[:, :, None] + part(
        seen.pop(), "hnorm", "h_proj"
    )
    alone = tmp_path / "block"
    decoder_alone(folder, alone)
    others = ("mtp.0.e", "mtp.0.hn", "mtp.0.h_", "mtp.0.norm", "layers.")
    block = {
        key.replace("mtp.0.", "layers.0."): tensor
        for key, tensor in tensors.items()
        if not key.startswith(others)
    }
    save_tensors(alone, block)
    config |= {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    config["mlp_layer_types"] = ["moe"]
    (alone / "config.json").write_text(json.dumps(config), encoding="utf-8")
    block = load(alone)
    layer = block.model.layers[0]
    layer.register_forward_pre_hook(lambda _module, args: (entering, *args[1:]))
    layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
    layer.mlp.experts.register_forward_hook(
        lambda module, args, _: seen.append((module, *args))
    )
    block.model(ids_BL, mask_BL, use_cache=False)
    return Published(entering_BLH=entering, leaving_BLH=seen[1].flatten(2), experts=seen[0])


@torch.no_grad()
def streamed(folder, tokens):
    """Return what enters the layer and what leaves it, as a run has it."""
    model = StreamedModel(open_checkpoint(folder), torch.float32, CPU)
    batch = Batch(input_ids_BL=tokens.input_ids_SL, attention_mask_BL=tokens.attention_mask_SL)
    hidden_BLH, entering = None, []
    with model.open_outside():
        for index in range(model.num_layers + 1):
            with model.open_layer(index):
                if index == model.num_layers:
                    layer = model._decoder[index]
                    getattr(layer, "attn_hc", layer.input_layernorm).register_forward_pre_hook(
                        lambda _module, args: entering.append(args[0])
                    )
                hidden_BLH = model.run_layer(index, batch, hidden_BLH)
    return entering[0], hidden_BLH


def good(output, source):
    findings = [*verify(output, load=True, run=True), *against(output, source)]
    assert [finding.message for finding in findings if not finding.ok] == []


def as_last(tensors, last):
    """Name tensors of a layer of its own as those of layer `last`."""
    start = f"model.layers.{last}."
    return {
        key.replace("mtp.layers.0.", start).replace("mtp.0.", f"layers.{last}."): tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_given_what_the_published_forward_gives_it(source, tmp_path, name, padded):
    tokens = some_tokens(padded=padded)
    want = published(source(name), name, tokens, tmp_path)
    entering_BLH, leaving_BLH = streamed(source(name), tokens)
    counts_BL = mask_without_next(tokens).attention_mask_SL.bool()
    assert torch.equal(entering_BLH[counts_BL], want.entering_BLH[counts_BL])
    # experts that the last token is sent to get other rows then: last bits of products differ
    torch.testing.assert_close(
        leaving_BLH[counts_BL], want.leaving_BLH[counts_BL], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
@torch.no_grad()
def test_what_leaves_it_is_what_transformers_drafts_from(source, tmp_path, name):
    """Of these families transformers has the layer itself, for drafts of one sequence."""
    folder, tokens = source(name), some_tokens(1)
    main = load(decoder_alone(folder, tmp_path / "decoder"))
    last = main.config.num_hidden_layers
    # by this it finds the layer's tensors: published models have 61 or 92 there
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{last}.*"]
    main.config.name_or_path, main.config.num_mtp_layers = str(folder), 1
    theirs = MtpModel.from_pretrained(main).eval()
    ids_BL = tokens.input_ids_SL
    hidden_BLH = main(ids_BL, use_cache=False, output_hidden_states=True).hidden_states[-1]
    want_BLH = theirs.forward_layer(
        0,
        hidden_BLH[:, :-1],
        torch.arange(1, ids_BL.shape[1])[None],
        MtpCache(config=main.config.get_mtp_config()),
        input_ids=ids_BL[:, 1:],
    )
    _, leaving_BLH = streamed(folder, tokens)
    have_BLH = theirs.layers[0].post_norm(leaving_BLH[:, :-1])
    torch.testing.assert_close(have_BLH, want_BLH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_experts_are_merged_to_the_same_number_under_their_names(source, ream, name):
    done = ream(name)
    good(done.output, source(name))
    last = read_config(done.output)["num_hidden_layers"]
    assert max(groups_by_layer(done)) == last
    groups = groups_by_layer(done)
    before, after = (
        as_last(load_tensors(folder), last) for folder in (source(name), done.output)
    )
    want, have = by_expert(sliced(name, before, groups)), by_expert(after)
    assert have.keys() == want.keys()
    different = {key[:2] for key in have if not same_bits(have[key], want[key])}
    merged = {
        (str(layer), str(number))
        for layer, members in groups.items()
        for number, group in enumerate(members)
        if len(group) > 1
    }
    assert different == merged
    assert any(layer == str(last) for layer, _ in merged)
    changed = {
        key
        for key, value in read_config(source(name)).items()
        if read_config(done.output)[key] != value
    }
    assert changed == {TINY[name].count_key}


@pytest.mark.parametrize("name", FAMILIES)
def test_pruning_it_is_slicing_and_keeping_all_changes_no_byte(source, pruned, tmp_path, name):
    done = pruned(name)
    last = done.plan.layers[-1].keys.index
    before, after = (
        as_last(load_tensors(folder), last) for folder in (source(name), done.output)
    )
    want = sliced(name, before, groups_by_layer(done))
    assert after.keys() == want.keys()
    assert all(same_bits(after[key], want[key]) for key in want)
    whole = run(source(name), tmp_path / "whole", settings(EXPERTS))
    have, want = load_tensors(whole.output), load_tensors(source(name))
    assert have.keys() == want.keys()
    assert all(same_bits(have[key], want[key]) for key in want)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_saliency_is_of_the_tokens_that_have_a_next_one(source, pruned, tmp_path, name):
    done, tokens = pruned(name), some_tokens(padded=True)
    want = published(source(name), name, tokens, tmp_path)
    module, x_TH, index_TK, weight_TK = want.experts
    keep_T = mask_without_next(tokens).attention_mask_SL.reshape(-1).bool()
    assert int(keep_T.sum()) == 4 * 11 - 4 - 3
    record = done.manifest["layers"][-1]
    for expert in range(EXPERTS):
        token, slot = (index_TK[keep_T] == expert).nonzero(as_tuple=True)
        x = x_TH[keep_T][token].double()
        norm = output_in_transformers(module, expert, x).norm(dim=1)
        mean = (weight_TK[keep_T][token, slot].double() * norm).mean() if len(x) else 0.0
        assert record["saliency"][expert] == pytest.approx(float(mean), rel=1e-4)
    path = done.output / ".ream-stream" / f"statistics-{record['index']:05d}.safetensors"
    assert int(load_file(path)["tokens"]) == int(keep_T.sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_decoder_runs_as_if_it_were_not_there(source, tmp_path, name):
    tokens = some_tokens(padded=True)
    inputs = [(tokens.input_ids_SL, tokens.attention_mask_SL)]
    alone = decoder_alone(source(name), tmp_path / "alone")
    [ours], [theirs] = (
        forward_streamed(folder, torch.float32, inputs) for folder in (source(name), alone)
    )
    assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3-fp8", "deepseek_v4-fp4"])
def test_a_quantized_one_keeps_its_format(tmp_path, name):
    coded, _ = quantized.write(tmp_path, name, torch.float32)
    added = add_mtp(coded, quantized.PUBLISHED[name].family)
    done = run(coded, tmp_path / "out", settings(KEEP))
    good(done.output, coded)
    before, after = load_tensors(coded), load_tensors(done.output)
    assert {after[key].dtype for key in added & after.keys()} == {
        before[key].dtype for key in added
    }
    assert any(len(group) > 1 for group in groups_by_layer(done)[3])


@pytest.mark.slow
def test_one_beside_a_wrapped_decoder_is_compressed_with_it(tmp_path):
    folder = write_wrapper(tmp_path / "source", "qwen3_5_moe")
    path = "model.language_model.layers"
    added = add_mtp(folder, "qwen3_5_moe_text", path=path)
    done = run(folder, tmp_path / "out", settings(KEEP))
    good(done.output, folder)
    assert max(groups_by_layer(done)) == 3
    numbers = {
        key.split(".")[5]
        for key in added & load_tensors(done.output).keys()
        if ".experts." in key
    }
    assert numbers == {str(number) for number in range(KEEP)}


@pytest.mark.parametrize("target", ["layer", pytest.param("trajectory", marks=SLOW)])
@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("qwen3_next", marks=SLOW)])
def test_it_is_refitted_on_the_tokens_that_have_a_next_one(source, tmp_path, name, target):
    """What a last token is joined with, a first one or padding, does not matter then."""
    wanted = settings(KEEP, grouping="none", refit="down", refit_target=target)
    tokens = some_tokens(6, 24)
    wide = {
        "input_ids": functional.pad(tokens.input_ids_SL, (0, 5), value=7),
        "attention_mask": functional.pad(torch.ones(6, 24, dtype=torch.int64), (0, 5)),
    }
    padded = from_tensors(wide, description="wide")
    plain, done = (
        run(source(name), tmp_path / each.description, wanted, each)
        for each in (tokens, padded)
    )
    assert [finding.message for finding in verify(done.output) if not finding.ok] == []
    ours, theirs = done.manifest["layers"][-1], plain.manifest["layers"][-1]
    assert ours["index"] == done.plan.layers[-1].keys.index
    for key in ("error_before", "remaining_error"):
        assert ours["refitted"][key] == pytest.approx(theirs["refitted"][key], rel=1e-3)
    assert 0 < ours["refitted"]["remaining_error"] <= 1


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next"])
def test_its_memory_is_planned_as_a_layers_is(source, name):
    checkpoint = open_checkpoint(source(name))
    told = Footprints(StreamedModel(checkpoint, torch.float32, CPU))
    really = Really(checkpoint, torch.float32, padded=True)
    index = told.kinds()[-1]
    assert index == checkpoint.config["num_hidden_layers"]
    footprint = told.of(index, SEQUENCES, LENGTH)
    assert footprint.run == pytest.approx(really.run(index), rel=0.06)
    assert footprint.observe == pytest.approx(really.observe(index), rel=0.06)


def test_shards_hold_and_the_index_names_all_of_it(source, tmp_path):
    done = run(source("glm4_moe"), tmp_path / "out", settings(KEEP, max_shard_bytes=20_000))
    weight_map = json.loads((done.output / INDEX).read_text(encoding="utf-8"))["weight_map"]
    assert weight_map.keys() == load_tensors(done.output).keys()
    own = find_mtp(weight_map, read_config(done.output))
    shards = {weight_map[name] for name in own}
    assert len(shards) > 1
    assert shards.isdisjoint(weight_map[name] for name in weight_map.keys() - own)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_it_is_in_neither_tensors_nor_config(source, tmp_path, name):
    folder = source(name)
    done = run(folder, tmp_path / "out", settings(mtp="drop"))
    have, config = load_tensors(done.output), read_config(done.output)
    assert not find_mtp(have, config)
    key = "mtp_num_hidden_layers" if name.startswith("qwen") else "num_nextn_predict_layers"
    assert (read_config(folder)[key], config[key]) == (1, 0)
    good(done.output, folder)
    load(done.output)


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("mimo_v2_flash", "model.mtp.layers.0.", "of model type 'mimo_v2_flash' is not known"),
        ("qwen3_moe", "mtp.layers.0.", "of model type 'qwen3_moe' is not known"),
        ("deepseek_v3", "mtp.layers.0.", "other names"),
        ("qwen3_next", "mtp.layers.1.", "other names"),
    ],
)
def test_what_is_not_known_is_refused_by_name(checkpoints, tmp_path, name, place, message):
    folder = shutil.copytree(checkpoints(name), tmp_path / "source")
    tensors = load_tensors(folder)
    layer = f"model.layers.{2 if name == 'qwen3_moe' else 1}."
    extra = {
        key.replace(layer, place): tensor.clone()
        for key, tensor in tensors.items()
        if key.startswith(layer)
    }
    save_tensors(folder, {**tensors, **extra})
    with pytest.raises(UnsupportedModelError, match=f"{message}.* --mtp drop"):
        run(folder, tmp_path / "out", settings(KEEP))
    assert not (tmp_path / "out" / "config.json").exists()
    done = run(folder, tmp_path / "dropped", settings(KEEP, mtp="drop"))
    assert not set(extra) & set(load_tensors(done.output))


def test_compressed_keys_there_are_refused(source, tmp_path):
    folder = shutil.copytree(source("deepseek_v4"), tmp_path / "source")
    config = read_config(folder) | {"compress_ratios": [4, 0, 128, 4]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"compress_ratios .* --mtp drop"):
        run(folder, tmp_path / "out", settings(KEEP))


def test_a_second_one_is_refused(source, tmp_path):
    folder = shutil.copytree(source("deepseek_v3"), tmp_path / "source")
    tensors = load_tensors(folder)
    second = {
        key.replace("layers.3.", "layers.4."): tensor.clone()
        for key, tensor in tensors.items()
        if "layers.3." in key
    }
    save_tensors(folder, {**tensors, **second})
    with pytest.raises(UnsupportedModelError, match="there are 2 of them"):
        run(folder, tmp_path / "out", settings(KEEP))


def test_embeddings_of_its_own_are_refused(source, tmp_path):
    folder = shutil.copytree(source("qwen3_next"), tmp_path / "source")
    config = read_config(folder) | {"mtp_use_dedicated_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="embeddings of its own"):
        run(folder, tmp_path / "out", settings(KEEP))


def test_layers_after_the_last_are_found_and_others_are_not():
    config = {"text_config": {"num_hidden_layers": 3}, "num_nextn_predict_layers": 2}
    found = {
        "model.layers.3.eh_proj.weight",
        "model.layers.12.mlp.gate.weight",
        "language_model.model.layers.3.enorm.weight",
        "mtp.fc.weight",
        "model.mtp.layers.0.norm.weight",
        "model.mtp_block.0.weight",
    }
    others = {
        "model.layers.2.mlp.gate.weight",
        "model.visual.layers.7.weight",
        "model.embed_tokens.weight",
    }
    assert find_mtp(found | others, config) == found
    assert without_mtp(config) == {**config, "num_nextn_predict_layers": 0}


def test_every_known_family_is_tried():
    assert set(WIRINGS) - set(MTP) == {"kimi_k2"}  # deepseek_v3 by another name
