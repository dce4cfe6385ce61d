"""What a run writes, in every family, against transformers and against slicing by hand."""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import cycle

import numpy as np
import plain_method
import pytest
import torch
from safetensors.torch import load_file
from slicing import by_expert, same_bits, sliced_by_hand
from tiny_checkpoints import load_tensors, read_config, save_tensors, write_checkpoint
from tiny_families import EXPERTS, TINY, TOP_K
from tiny_parameters import families, families_in
from tiny_runs import (
    forward_in_transformers,
    forward_streamed,
    groups_by_layer,
    output_in_transformers,
    plan_for,
    routed_to,
    run,
    run_plan,
    same_in,
    scheduled,
    settings,
    some_tokens,
)
from transformers import AutoModelForCausalLM

from ream_stream.calibration.tokens import from_tensors, joined
from ream_stream.checkpoint.reader import INDEX
from ream_stream.compression.manifest import read_manifest
from ream_stream.evaluation.verify import verify
from ream_stream.events import Finished, LayerDone, Started, Step
from ream_stream.method.alignment import ALIGNMENTS
from ream_stream.method.grouping import GROUPINGS
from ream_stream.method.merging import MERGES
from ream_stream.method.saliency import SALIENCIES, RoutedSums
from ream_stream.method.similarity import SIMILARITIES

FAMILIES = families()
KEEP = 6


@pytest.fixture(scope="session")
def ream(checkpoints, tmp_path_factory):
    """Give a family's run with REAM's defaults, from bf16 to bf16; not to be changed."""

    @cache
    def give(name, dtype="float32"):
        output = tmp_path_factory.mktemp("outputs") / f"{name}-{dtype}"
        return run(checkpoints(name), output, settings(KEEP, dtype=dtype))

    return give


@pytest.fixture(scope="session")
def pruned(checkpoints, tmp_path_factory):
    """Give a family pruned on padded tokens, layers seeing the source; not to be changed."""
    wanted = settings(KEEP, grouping="none", sequential=False)

    @cache
    def give(name):
        output = tmp_path_factory.mktemp("pruned") / name
        return run(checkpoints(name), output, wanted, some_tokens(padded=True))

    return give


@torch.no_grad()
def experts_inputs(folder, tokens):
    """Return each layer's experts module in transformers, and what it was called with."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = {}
    for index, layer in enumerate(model.model.layers):
        for path, module in layer.named_modules():
            is_llama4 = type(module).__name__ == "Llama4TextExperts"
            if path.endswith("experts") and (is_llama4 or hasattr(module, "has_gate")):
                module.register_forward_hook(
                    lambda module, args, _, index=index: seen.update(
                        {index: (module, *routed_to(args))}
                    )
                )
    # a cache of linear attention alone cannot tell its length
    model(
        input_ids=tokens.input_ids_SL,
        attention_mask=tokens.attention_mask_SL,
        use_cache=False,
    )
    return seen


@pytest.mark.parametrize(
    ("name", "dtype"),
    families_in({"float32": ["float32"], "bfloat16": ["bfloat16"]}, seldom=False),
)
def test_the_output_loads_and_computes_what_the_streamed_passes_did(ream, name, dtype):
    done, run_in = ream(name, dtype), getattr(torch, dtype)
    others = some_tokens(5, 10, seed=3, padded=True)
    inputs = [
        (done.tokens.input_ids_SL, None),
        (others.input_ids_SL, None),
        (others.input_ids_SL, others.attention_mask_SL),
    ]
    full = forward_in_transformers(done.output, run_in, inputs)
    # what the run itself propagated through the layers it had just written
    assert sorted(done.hidden) == list(range(len(full[0].hidden) - 1))
    same = same_in(name, run_in)
    for layer, hidden_SLH in done.hidden.items():
        assert (torch.equal if name == "jamba" else same)(hidden_SLH, full[0].hidden[layer])
    streamed = forward_streamed(done.output, run_in, inputs)
    for ours, theirs in zip(streamed, full, strict=True):
        if name == "jamba":  # last bits depend on where in memory a matrix of mamba is
            error = (ours.logits - theirs.logits).norm() / theirs.logits.norm()
            assert error < {"float32": 1e-5, "bfloat16": 2**-5}[dtype]
        else:
            assert same(ours.logits, theirs.logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_dtypes_and_shapes_are_those_of_a_sliced_source(ream, checkpoints, name):
    done = ream(name)
    want = sliced_by_hand(name, load_tensors(checkpoints(name)), groups_by_layer(done))
    have = load_tensors(done.output)
    assert have.keys() == want.keys()
    for key, tensor in have.items():
        assert (tensor.dtype, tensor.shape) == (want[key].dtype, want[key].shape), key
    biases = {t.dtype for key, t in have.items() if key.endswith("correction_bias")}
    assert biases <= {TINY[name].bias_dtype}


@pytest.mark.parametrize("name", FAMILIES)
def test_only_experts_of_merged_groups_differ_from_a_sliced_source(ream, checkpoints, name):
    done = ream(name)
    groups = groups_by_layer(done)
    want = by_expert(sliced_by_hand(name, load_tensors(checkpoints(name)), groups))
    have = by_expert(load_tensors(done.output))
    assert have.keys() == want.keys()
    different = {key for key, tensor in have.items() if not same_bits(tensor, want[key])}
    merged = {
        (str(layer), str(number))
        for layer, members in groups.items()
        for number, group in enumerate(members)
        if len(group) > 1
    }
    assert merged
    assert {key[:2] for key in different} == merged
    tensors = {key[2] for key in want if isinstance(key, tuple) and key[0] == min(merged)[0]}
    assert len(different) == len(tensors) * len(merged)


@pytest.mark.parametrize("name", FAMILIES)
def test_config_json_differs_in_the_count_alone(ream, checkpoints, name):
    pairs = [
        json.loads((folder / "config.json").read_text(encoding="utf-8"), object_pairs_hook=list)
        for folder in (checkpoints(name), ream(name).output)
    ]
    key = TINY[name].count_key
    assert (key, EXPERTS) in map(tuple, pairs[0])
    assert [(k, KEEP if k == key else v) for k, v in pairs[0]] == list(map(tuple, pairs[1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_experts_changes_no_tensor(checkpoints, tmp_path, name):
    done = run(checkpoints(name), tmp_path / "out", settings(EXPERTS))
    want, have = load_tensors(checkpoints(name)), load_tensors(done.output)
    assert have.keys() == want.keys()
    assert all(same_bits(have[key], want[key]) for key in want)
    assert read_config(done.output) == read_config(checkpoints(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_pruning_is_slicing(pruned, checkpoints, name):
    done = pruned(name)
    groups = groups_by_layer(done)
    assert set(groups) == set(range(len(done.plan.layers))) - set(TINY[name].dense)
    want = sliced_by_hand(name, load_tensors(checkpoints(name)), groups)
    have = load_tensors(done.output)
    assert have.keys() == want.keys()
    assert all(same_bits(have[key], want[key]) for key in want)
    for layer in done.manifest["layers"]:
        # the best of each of the router's groups, of which most families have one
        size = EXPERTS // done.plan.routing_groups
        best = [
            expert
            for start in range(0, EXPERTS, size)
            for expert in sorted(
                sorted(range(start, start + size), key=lambda e: -layer["saliency"][e])[
                    : KEEP // done.plan.routing_groups
                ]
            )
        ]
        assert layer["groups"] == [[expert] for expert in best]


@pytest.mark.parametrize("name", FAMILIES)
def test_saliency_is_the_mean_of_what_transformers_adds_to_a_token(pruned, checkpoints, name):
    """Reap by hand: coefficient times norm, averaged over the tokens of an expert."""
    done = pruned(name)
    tokens = done.tokens
    seen = experts_inputs(checkpoints(name), tokens)
    keep_T = tokens.attention_mask_SL.reshape(-1).bool()
    assert sorted(seen) == [layer["index"] for layer in done.manifest["layers"]]
    for layer in done.manifest["layers"]:
        module, x_TH, index_TK, weight_TK = seen[layer["index"]]
        for expert in range(EXPERTS):
            token, slot = (index_TK[keep_T] == expert).nonzero(as_tuple=True)
            x = x_TH[keep_T][token].double()
            norm = output_in_transformers(module, expert, x).norm(dim=1)
            want = (weight_TK[keep_T][token, slot].double() * norm).mean() if len(x) else 0.0
            assert layer["saliency"][expert] == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_sequential_every_layer_sees_the_source(pruned, checkpoints, name):
    done = pruned(name)
    inputs = [(done.tokens.input_ids_SL, done.tokens.attention_mask_SL)]
    [full] = forward_in_transformers(checkpoints(name), torch.float32, inputs)
    assert sorted(done.hidden) == list(range(len(full.hidden) - 1))
    same = torch.equal if name == "jamba" else same_in(name, torch.float32)
    for layer, hidden_SLH in done.hidden.items():
        assert same(hidden_SLH, full.hidden[layer]), layer


def test_with_sequential_later_layers_see_what_earlier_ones_became(ream, checkpoints, tmp_path):
    done = run(checkpoints("olmoe"), tmp_path / "out", settings(KEEP, sequential=False))
    ours, theirs = done.manifest["layers"], ream("olmoe").manifest["layers"]
    assert ours[0] == theirs[0]  # nothing is compressed before it
    assert ours[1]["saliency"] != theirs[1]["saliency"]


def test_a_whole_run_agrees_with_plain_loops_over_the_equations(checkpoints, tmp_path):
    """The output model itself shows what enters each layer: it is what the run saw."""
    source, tokens = checkpoints("qwen3_moe", torch.float32), some_tokens()
    done = run(source, tmp_path / "out", settings(5, group_size=3), tokens)
    seen = experts_inputs(done.output, tokens)
    assert sorted(seen) == sorted(groups_by_layer(done)) == [0, 2]
    before, after = (
        {key: tensor.double().numpy() for key, tensor in load_tensors(folder).items()}
        for folder in (source, done.output)
    )

    def expert(tensors, layer, number):
        start = f"model.layers.{layer}.mlp.experts.{number}."
        return [tensors[f"{start}{part}_proj.weight"] for part in ("gate", "up", "down")]

    for layer in done.manifest["layers"]:
        index = layer["index"]
        plain = plain_method.compress_layer(
            seen[index][1].double().numpy(),
            [expert(before, index, number) for number in range(EXPERTS)],
            before[f"model.layers.{index}.mlp.gate.weight"],
            top_k=TOP_K,
            keep=5,
            group_size=3,
        )
        assert layer["groups"] == plain.groups
        np.testing.assert_allclose(layer["saliency"], plain.saliency, rtol=1e-5)
        for number, group in enumerate(plain.groups):
            for ours, theirs in zip(
                expert(after, index, number), plain.experts[group[0]], strict=True
            ):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "name",
    # attention of every kind that can leave out padding
    families(
        *("deepseek_v3", "gemma4_text", "gpt_oss", "llama4_text", "qwen3_next"),
    ),
)
def test_padding_changes_nothing(ream, checkpoints, tmp_path, name):
    if name in {"minimax", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "axk2"}:
        pytest.skip("its attention does not leave out padding in transformers either")
    # hunyuan normalizes after the rotary embedding, and llama 4 cuts text into chunks:
    # positions are not relative there
    starts = [0, 0, 0, 0] if name in {"hunyuan_v1_moe", "llama4_text"} else [0, 5, 2, 0]
    ids_SL = some_tokens().input_ids_SL
    wide_SL = torch.full((4, 17), 5)
    mask_SL = torch.zeros_like(wide_SL)
    for row, start in enumerate(starts):
        wide_SL[row, start : start + 12] = ids_SL[row]
        mask_SL[row, start : start + 12] = 1
    wide = from_tensors({"input_ids": wide_SL, "attention_mask": mask_SL}, description="wide")
    plain, padded = ream(name), run(checkpoints(name), tmp_path / "out", settings(KEEP), wide)
    assert groups_by_layer(plain) == groups_by_layer(padded)
    for path in sorted((plain.output / ".ream-stream").glob("statistics-*")):
        sums, others = load_file(path), load_file(padded.output / ".ream-stream" / path.name)
        assert sums["tokens"] == others["tokens"] == 48
        assert torch.equal(sums["count_E"], others["count_E"])
        # attention with a mask adds up in another order: float32's last digits differ
        for key in RoutedSums.NAMES:
            torch.testing.assert_close(sums[key], others[key], rtol=2e-4, atol=0)


def test_statistics_and_saliency_are_kept_by_domain_and_add_up(checkpoints, tmp_path):
    parts = {"code": some_tokens(3, seed=1, padded=True), "math": some_tokens(2, seed=2)}
    mix = joined(parts, description="mix")
    source, wanted = checkpoints("mixtral"), settings(KEEP)
    mixed = run(source, tmp_path / "mix", wanted, mix)
    # inputs of layer 0 do not depend on what was merged
    alone = {
        name: run(source, tmp_path / name, wanted, tokens) for name, tokens in parts.items()
    }

    def layer_0(made):
        return load_file(made.output / ".ream-stream" / "statistics-00000.safetensors")

    sums = layer_0(mixed)
    for name in RoutedSums.NAMES:
        apart = [layer_0(alone[domain])[name] for domain in parts]
        for domain, expected in zip(parts, apart, strict=True):
            torch.testing.assert_close(sums[f"{name}/{domain}"], expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(sums[name], sum(apart), rtol=1e-4, atol=0)
    told = mixed.manifest["layers"][0]["domains"]
    for domain in parts:
        expected = alone[domain].manifest["layers"][0]["saliency"]
        assert told[domain] == pytest.approx(expected, rel=1e-4)
        assert "domains" not in alone[domain].manifest["layers"][0]
    manifest = read_manifest(mixed.output / "ream_stream.json")
    assert manifest.layers[0].domains.keys() == parts.keys()


def test_padding_is_not_drawn_into_the_sample(checkpoints, tmp_path):
    ids_SL = some_tokens().input_ids_SL
    wide_SL = torch.nn.functional.pad(ids_SL, (0, 6), value=5)
    mask_SL = torch.nn.functional.pad(torch.ones_like(ids_SL), (0, 6))
    wanted = settings(5, similarity_tokens=30, alignment_tokens=16, group_size=2)
    one, other = (
        run(
            checkpoints("mixtral", torch.float32),
            tmp_path / kind,
            wanted,
            from_tensors(tensors, description=kind),
        )
        for kind, tensors in (
            ("plain", {"input_ids": ids_SL}),
            ("padded", {"input_ids": wide_SL, "attention_mask": mask_SL}),
        )
    )
    assert groups_by_layer(one) == groups_by_layer(other)
    ours, theirs = load_tensors(one.output), load_tensors(other.output)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_the_same_run_gives_the_same_bytes_in_another_folder(ream, checkpoints, tmp_path, name):
    again = run(checkpoints(name), tmp_path / "some" / "other" / "place", settings(KEEP))
    assert again.files() == ream(name).files()


@pytest.mark.parametrize("name", FAMILIES)
def test_playing_attention_back_gives_the_bytes_of_running_it_twice(
    ream, checkpoints, tmp_path, name
):
    # nemotron has nothing beside the experts in their layers
    assert (ream(name).plan.memory["attention outputs"] > 0) == (name != "nemotron_h")
    plan = plan_for(checkpoints(name), some_tokens(), settings(KEEP))
    plan = replace(plan, memory={**plan.memory, "attention outputs": 0})
    again = run_plan(plan, some_tokens(), tmp_path / "out")
    assert again.files() == ream(name).files()
    for layer, hidden_SLH in again.hidden.items():
        assert torch.equal(hidden_SLH, ream(name).hidden[layer])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_the_size_of_a_batch_does_not_matter(checkpoints, tmp_path, name, batch):
    """Stored in float32: rounding to bf16 would hide, or enlarge, what differs."""
    source = checkpoints(name, torch.float32)
    whole = plan_for(source, some_tokens(), settings(KEEP))
    assert whole.schedule.batch_sequences == 4
    runs = [
        run_plan(scheduled(whole, batch_sequences=size), some_tokens(), tmp_path / str(size))
        for size in (4, batch)
    ]
    assert groups_by_layer(runs[0]) == groups_by_layer(runs[1])
    one, other = (load_tensors(done.output) for done in runs)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("grouping", ["ream", "mc-smoe", "none"])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_the_routers_groups_stay_equal_even_if_all_in_one_matter_less(tmp_path, name, grouping):
    source = write_checkpoint(tmp_path / "source", name, torch.bfloat16)
    tensors = load_tensors(source)
    for key in tensors:
        if re.search(r"\.experts\.[0-3]\.down_proj", key):
            tensors[key] /= 100
    save_tensors(source, tensors)
    done = run(source, tmp_path / "out", settings(KEEP, grouping=grouping))
    for layer in done.manifest["layers"]:
        assert max(layer["saliency"][:4]) < min(layer["saliency"][4:])
        assert [group[0] // 4 for group in layer["groups"]] == [0, 0, 0, 1, 1, 1]


def test_a_run_that_is_complete_is_left_alone(checkpoints, tmp_path):
    done = run(checkpoints("mixtral"), tmp_path / "out", settings(KEEP))
    times = {path: path.stat().st_mtime_ns for path in done.output.iterdir() if path.is_file()}
    again = run(checkpoints("mixtral"), tmp_path / "out", settings(KEEP))
    started, finished = again.events
    assert isinstance(started, Started)
    assert started.committed == 3
    assert isinstance(finished, Finished)
    assert finished.already_complete
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_events_tell_every_layer_once_in_order(ream):
    for name in ("qwen3_moe", "deepseek_v3"):
        done = ream(name)
        assert isinstance(done.events[0], Started)
        assert isinstance(done.events[-1], Finished)
        layers = [event for event in done.events if isinstance(event, LayerDone)]
        assert [event.layer for event in layers] == [0, 1, 2]
        for event in layers:
            dense = event.layer in TINY[name].dense
            counts = (event.experts_before, event.experts_after)
            assert counts == ((0, 0) if dense else (EXPERTS, KEEP))
            phases = Counter(
                step.phase
                for step in done.events
                if isinstance(step, Step)
                and step.layer == event.layer
                and step.done == step.total
            )
            last = event.layer == 2
            want = {"check", "write"}
            if not dense:
                want |= {"observe", "compare", "align"}
            assert phases == dict.fromkeys(want if last else want | {"propagate"}, 1)
        shards = sum(event.written_bytes for event in layers)
        outside = sum(shard.nbytes for shard in done.plan.outside)
        assert shards + outside == done.events[-1].output_bytes
        assert done.events[-1].output_bytes == sum(map(len, done.shards().values()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_manifest_tells_what_was_done(ream, name):
    done = ream(name)
    manifest = done.manifest
    assert list(manifest) == [
        *("format", "fingerprint", "versions", "experts", "source_bytes", "files"),
        *("documents", "layers"),
    ]
    assert manifest["source_bytes"] == done.plan.source_bytes
    inner = done.plan.experts[0].inner
    assert manifest["experts"] == {"before": EXPERTS, "after": KEEP, "width_before": inner}
    assert manifest["fingerprint"]["calibration"] == done.tokens.digest
    assert manifest["fingerprint"]["source"] == done.plan.source.digest()
    assert manifest["fingerprint"]["saliency"] == "reap"
    sizes = {name: file["size"] for name, file in manifest["files"].items()}
    assert sizes == {name: len(data) for name, data in done.shards().items()}
    for layer in manifest["layers"]:
        assert len(layer["saliency"]) == EXPERTS
        assert sorted(e for group in layer["groups"] for e in group) == list(range(8))
        assert layer["groups"] == sorted(layer["groups"])
        assert len(layer["groups"]) == KEEP
        config = TINY[name].config
        routed = config.get("n_group", config.get("num_expert_group", 1))
        for number, group in enumerate(layer["groups"]):
            # a centroid stays in its routing group, so that the router's groups stay equal
            assert number // (KEEP // routed) == group[0] // (EXPERTS // routed)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_index_and_other_files_are_complete(ream, checkpoints, name):
    done = ream(name)
    index = json.loads((done.output / INDEX).read_text(encoding="utf-8"))
    have = load_tensors(done.output)
    assert index["weight_map"].keys() == have.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in have.values())
    for path in done.output.glob("*.safetensors"):
        assert set(load_file(path)) == {
            k for k, v in index["weight_map"].items() if v == path.name
        }
    for other in ("tokenizer.json", "generation_config.json"):
        if (checkpoints(name) / other).is_file():
            assert done.files()[other] == (checkpoints(name) / other).read_bytes()
    allowed = {"config.json", INDEX, "README.md", "ream_stream.json", *done.shards()}
    assert set(done.files()) - allowed <= {"tokenizer.json", "generation_config.json"}


def test_files_in_folders_are_copied_and_weights_beside_the_index_are_not(tmp_path):
    source = write_checkpoint(tmp_path / "source", "mixtral", torch.bfloat16)
    copied = ["chat_template.jinja", "additional_chat_templates/rag.jinja", "a/b/config.json"]
    left = [
        # the first two would be loaded in place of the output's own
        "model.safetensors",
        "model-00001-of-00004.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "original/consolidated.00.PTH",
        ".cache/huggingface/download/config.json.metadata",
        "a/.DS_Store",
    ]
    assert (source / INDEX).is_file()
    for name in copied + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"by hand: {name}")
    done = run(source, tmp_path / "out", settings(KEEP, grouping="none"))
    for name in copied:
        assert (done.output / name).read_text() == f"by hand: {name}"
    have = {p.relative_to(done.output).as_posix() for p in done.output.rglob("*")}
    assert have & set(left) == {"model-00001-of-00004.safetensors"}
    assert all(finding.ok for finding in verify(done.output))
    AutoModelForCausalLM.from_pretrained(done.output)


def test_the_source_is_not_changed(checkpoints, tmp_path):
    source = write_checkpoint(tmp_path / "source", "deepseek_v3", torch.bfloat16)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    run(source, tmp_path / "out", settings(KEEP))
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_shards_are_cut_at_the_size_asked_for(ream, checkpoints, tmp_path):
    done = run(checkpoints("mixtral"), tmp_path / "out", settings(KEEP, max_shard_bytes=9_000))
    assert len(done.shards()) > len(ream("mixtral").shards()) == 4
    for data in done.shards().values():
        header = 8 + int.from_bytes(data[:8], "little")
        assert len(data) - header <= 9_000
    want, have = load_tensors(ream("mixtral").output), load_tensors(done.output)
    assert have.keys() == want.keys()
    assert all(same_bits(have[key], want[key]) for key in want)
    AutoModelForCausalLM.from_pretrained(done.output)


def test_tensors_that_the_model_does_not_know_are_copied(tmp_path):
    source = write_checkpoint(tmp_path / "source", "mixtral", torch.bfloat16)
    unknown = {
        # older exports have the first, multi-token-prediction and vision towers the others
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "mtp.norm.weight": torch.randn(32).bfloat16(),
        "visual.blocks.0.attn.bias": torch.randint(-9, 9, (3, 5), dtype=torch.int8),
    }
    save_tensors(source, {**load_tensors(source), **unknown})
    done = run(source, tmp_path / "out", settings(KEEP))
    have = load_tensors(done.output)
    assert all(same_bits(have[key], tensor) for key, tensor in unknown.items())


CHOICES = [
    {"saliency": saliency, "grouping": grouping, "alignment": alignment, "merge": merge}
    | {"similarity": similarity, "gate_term": gate_term, "similarity_tokens": tokens}
    for saliency, grouping, alignment, merge, similarity, gate_term, tokens in zip(
        SALIENCIES,
        cycle(GROUPINGS),
        cycle(sorted(ALIGNMENTS)),
        cycle(MERGES),
        cycle([name for name in SIMILARITIES for _ in MERGES]),
        cycle([True, True, False]),
        cycle([0, 7, 48]),
        strict=False,
    )
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice["saliency"])
def test_every_choice_of_the_method_gives_a_model_that_loads(checkpoints, tmp_path, choice):
    """In the family with the most rules: routing groups, a biased router, a dense layer."""
    wanted = settings(KEEP, group_size=3, alignment_tokens=5, **choice)
    done = run(checkpoints("deepseek_v3"), tmp_path / "out", wanted)
    inputs = [(done.tokens.input_ids_SL, None)]
    [full] = forward_in_transformers(done.output, torch.float32, inputs)
    assert full.logits.isfinite().all()
    assert done.manifest["fingerprint"].items() >= choice.items()


def test_the_choices_above_are_all_there_are():
    for field, table in [
        ("saliency", SALIENCIES),
        ("grouping", GROUPINGS),
        ("alignment", ALIGNMENTS),
        ("merge", MERGES),
        ("similarity", SIMILARITIES),
    ]:
        assert {choice[field] for choice in CHOICES} == set(table)


def test_threads_do_not_change_the_result(ream, checkpoints, tmp_path):
    source = checkpoints("olmoe")
    alone = run(source, tmp_path / "one", settings(4))
    plan = plan_for(source, some_tokens(), settings(4))
    together = run_plan(scheduled(plan, threads=3), some_tokens(), tmp_path / "three")
    assert alone.files() == together.files()
