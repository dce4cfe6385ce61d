"""Every check is shown to fail on an output damaged in the one way it is there for."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import INDEX, load_tensors, save_tensors
from tiny_parameters import families
from tiny_runs import run, settings

from ream_stream.checkpoint.formats import Modules
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.compression.finalize import MANIFEST
from ream_stream.errors import UsageError
from ream_stream.evaluation import verify as verification
from ream_stream.evaluation.checks import CHECKS, Subject
from ream_stream.evaluation.load_checks import LOAD, RUN
from ream_stream.evaluation.verify import SHARD_CHECKS, verify
from ream_stream.host_memory import gauge
from ream_stream.model import finite as module

ALL = (*CHECKS, LOAD, RUN, *SHARD_CHECKS)

CONFIG = "config.json"
EXPERTS = "model.layers.0.mlp.experts"
"""Of the first MoE layer of qwen3_moe."""
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def outputs(checkpoints, tmp_path_factory):
    """Give a good output of a family, without its work folder; not to be changed."""
    made = {}

    def give(name, experts=6, **fields):
        key = (name, experts, *fields.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("outputs") / name
            wanted = settings(experts, max_shard_bytes=30_000, **fields)
            run(checkpoints(name, torch.bfloat16), folder, wanted)
            shutil.rmtree(folder / ".ream-stream")
            made[key] = folder
        return made[key]

    return give


@pytest.fixture
def output(outputs, tmp_path):
    """A good output of qwen3_moe, to be damaged."""
    return shutil.copytree(outputs("qwen3_moe"), tmp_path / "output")


def failures(folder, **options):
    """Return the messages of what fails, by check."""
    found = {}
    for finding in verify(folder, **options):
        assert finding.message
        assert "\n" not in finding.message
        if not finding.ok:
            found.setdefault(finding.check, []).append(finding.message)
    return found


def edit(path, change):
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def set_config(**values):
    return lambda folder: edit(folder / CONFIG, lambda config: config.update(values))


def edit_manifest(change):
    return lambda folder: edit(folder / MANIFEST, change)


def edit_groups(change):
    """Let `change` at the groups of the first MoE layer."""
    return edit_manifest(lambda manifest: change(manifest["layers"][0]["groups"]))


def edit_index(change):
    return lambda folder: edit(folder / INDEX, change)


def shard_of(folder, tensor):
    index = json.loads((folder / INDEX).read_bytes())
    return folder / index["weight_map"][tensor]


def flip_last_byte(folder):
    path = shard_of(folder, f"{EXPERTS}.0.gate_proj.weight")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(folder):
    path = shard_of(folder, f"{EXPERTS}.0.gate_proj.weight")
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(folder):
    path = shard_of(folder, f"{EXPERTS}.0.gate_proj.weight")
    path.write_bytes(path.read_bytes() + b"\0")


def wreck_header(folder):
    path = shard_of(folder, f"{EXPERTS}.0.gate_proj.weight")
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def remove_shard(folder):
    shard_of(folder, f"{EXPERTS}.0.gate_proj.weight").unlink()


def rename_shard(folder):
    path = shard_of(folder, f"{EXPERTS}.0.gate_proj.weight")
    path.rename(path.with_name("other.safetensors"))


def add_orphan(folder):
    save_file({"x": torch.ones(1)}, folder / "model-99999-of-99999.safetensors")


def add_partial(folder):
    (folder / "model-00001-of-00002.safetensors.partial").write_bytes(b"")


def change_tensors(change):
    """Rewrite the whole output as one shard, its index right, after `change` at its tensors."""

    def damage(folder):
        tensors = load_tensors(folder)
        change(tensors)
        save_tensors(folder, tensors)

    return damage


def drop_expert(number):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith(f"{EXPERTS}.{number}.")]:
            del tensors[name]

    return change_tensors(drop)


def plant(value, where="model.layers.2.self_attn.q_proj.weight"):
    """Put a number into a tensor, in the middle of it, its shard otherwise as it was."""

    def damage(folder):
        path = shard_of(folder, where)
        tensors = load_file(path)
        tensors[where].view(-1)[tensors[where].numel() // 2] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def swap_first_groups(groups):
    groups[0], groups[1] = groups[1], groups[0]


def merge_centroid_away(groups):
    """Let the largest group begin with an expert that is not a centroid."""
    largest = max(groups, key=len)
    assert len(largest) > 1
    largest.reverse()
    groups.sort()


def drop_row(name):
    return change_tensors(lambda tensors: tensors.update({name: tensors[name][1:].clone()}))


DAMAGES = [
    # name, damage, the check that must fail, what its message must say
    (
        "no manifest",
        lambda folder: (folder / MANIFEST).unlink(),
        "manifest",
        "has not finished",
    ),
    (
        "no tokenizer",
        lambda folder: (folder / "tokenizer.json").unlink(),
        "complete",
        "tokenizer.json is missing",
    ),
    (
        "a manifest that names a file elsewhere",
        edit_manifest(
            lambda m: m["documents"].update({"../x": m["documents"]["tokenizer.json"]})
        ),
        "manifest",
        "is not the name of a file of an output",
    ),
    (
        "a cut manifest",
        lambda folder: (folder / MANIFEST).write_text("{", encoding="utf-8"),
        "manifest",
        "not valid JSON",
    ),
    (
        "a manifest of the future",
        edit_manifest(lambda manifest: manifest.update(format=2)),
        "manifest",
        "format 2",
    ),
    (
        "a manifest without groups",
        edit_manifest(lambda manifest: manifest.pop("layers")),
        "manifest",
        "'layers'",
    ),
    (
        "a manifest that leads out of the folder",
        edit_manifest(
            lambda manifest: manifest["files"].update(
                {"../x.safetensors": {"size": 1, "sha256": "0" * 64}}
            )
        ),
        "manifest",
        "not the name of a shard",
    ),
    (
        "a manifest of another count",
        edit_manifest(lambda manifest: manifest["experts"].update(after=7)),
        "manifest",
        "7 are kept",
    ),
    ("no config", lambda folder: (folder / CONFIG).unlink(), "headers", "no config.json"),
    ("a truncated shard", truncate, "headers", "truncated"),
    ("a truncated shard, by size", truncate, "sizes", "the manifest says"),
    ("a lengthened shard", lengthen, "headers", "describes"),
    ("a shard with a wrecked header", wreck_header, "headers", "not a safetensors file"),
    ("a missing shard", remove_shard, "headers", "lacks model-"),
    ("a missing shard, by name", remove_shard, "sizes", "is missing"),
    ("a renamed shard", rename_shard, "sizes", "is missing"),
    (
        "a tensor that is not in the index",
        edit_index(lambda index: index["weight_map"].pop(f"{EXPERTS}.0.up_proj.weight")),
        "headers",
        "the index names no file",
    ),
    (
        "an index of a tensor that is nowhere",
        edit_index(
            lambda index: index["weight_map"].update(
                {"x": index["weight_map"]["model.norm.weight"]}
            )
        ),
        "headers",
        "which lacks it",
    ),
    (
        "an index that leads out of the folder",
        edit_index(lambda index: index["weight_map"].update(x="../x.safetensors")),
        "headers",
        "in the folder itself",
    ),
    (
        "a manifest that lacks a shard",
        edit_manifest(lambda manifest: manifest["files"].popitem()),
        "shards",
        "not in the manifest",
    ),
    ("shards cut anew", change_tensors(lambda tensors: None), "shards", "not in the index"),
    ("an orphan shard", add_orphan, "strays", "model-99999-of-99999.safetensors is not in"),
    ("a partial file", add_partial, "strays", "cut off"),
    (
        "a wrong total",
        edit_index(lambda index: index["metadata"].update(total_size=1)),
        "total",
        "total_size 1",
    ),
    ("no total", edit_index(lambda index: index.pop("metadata")), "total", "total_size None"),
    (
        "a cut tokenizer",
        lambda folder: (folder / "tokenizer.json").write_text('{"a": ', encoding="utf-8"),
        "documents",
        "tokenizer.json is not valid JSON",
    ),
    ("the source's count", set_config(num_experts=8), "experts", "has 6 experts"),
    ("the source's count, to load", set_config(num_experts=8), "model", "config.json says 8"),
    ("a count that is no number", set_config(num_experts="6"), "experts", "num_experts='6'"),
    (
        "a renamed count",
        lambda folder: edit(folder / CONFIG, lambda config: config.pop("num_experts")),
        "experts",
        "no num_experts or num_local_experts",
    ),
    (
        "counts that differ",
        set_config(num_local_experts=8),
        "kept",
        "num_local_experts=8",
    ),
    ("a gap between experts", drop_expert(2), "experts", "gaps: 2 missing"),
    ("a lost last expert", drop_expert(5), "experts", "has 5 experts"),
    (
        "a lost projection",
        change_tensors(lambda tensors: tensors.pop(f"{EXPERTS}.3.up_proj.weight")),
        "experts",
        "lacks one of gate, up and down",
    ),
    (
        "another number of experts than asked for",
        edit_manifest(
            lambda m: (m["experts"].update(after=7), m["fingerprint"].update(experts=7))
        ),
        "kept",
        "has 6 experts, the manifest says 7",
    ),
    (
        "a router of another size",
        drop_row("model.layers.0.mlp.gate.weight"),
        "routers",
        "model.layers.0.mlp.gate.weight has shape (5, 32)",
    ),
    (
        "no router",
        change_tensors(lambda tensors: tensors.pop("model.layers.0.mlp.gate.weight")),
        "routers",
        "model.layers.0.mlp.gate.weight is missing",
    ),
    (
        "a missing tensor of a layer",
        change_tensors(lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight")),
        "model",
        "lacks model.layers.1.input_layernorm.weight",
    ),
    (
        "a missing tensor outside the layers",
        change_tensors(lambda tensors: tensors.pop("model.norm.weight")),
        "model",
        "lacks model.norm.weight",
    ),
    (
        "a tensor of another shape",
        drop_row("model.layers.1.input_layernorm.weight"),
        "model",
        "has shape (31,), the model (32,)",
    ),
    ("another width", set_config(moe_intermediate_size=8), "model", "experts of (8, 32)"),
    (
        "a format that no tensor has",
        set_config(quantization_config={"quant_method": "fp8"}),
        "formats",
        "no tensor is quantized",
    ),
    ("another family", set_config(model_type="nothing"), "model", "not supported"),
    ("a config no class takes", set_config(hidden_size="wide"), "model", ""),
    ("a config without layers", set_config(num_hidden_layers=0), "model", ""),
    ("too few experts for a token", set_config(num_experts_per_tok=7), "routing", "to 7"),
    (
        "groups of a layer that has none",
        edit_manifest(lambda manifest: manifest["layers"][0].update(index=1)),
        "groups",
        "groups for layers [1, 2], those with experts are [0, 2]",
    ),
    ("a lost group", edit_groups(list.pop), "groups", "layer 0: 5 groups"),
    ("an empty group", edit_groups(lambda groups: groups[0].clear()), "groups", "5 groups"),
    ("groups out of order", edit_groups(swap_first_groups), "groups", "not in the order"),
    (
        "an expert in two groups",
        edit_groups(lambda groups: groups[0].append(groups[1][0])),
        "groups",
        "in two groups",
    ),
    (
        "an expert in no group",
        edit_groups(lambda groups: max(groups, key=len).pop()),
        "groups",
        "are in no group",
    ),
    (
        "an expert that the source does not have",
        edit_groups(lambda groups: groups[0].append(8)),
        "groups",
        "not one of the source's 0 to 7",
    ),
    ("a group that begins otherwise", edit_groups(merge_centroid_away), "groups", "salient"),
    (
        "a missing saliency",
        edit_manifest(lambda manifest: manifest["layers"][0]["saliency"].pop()),
        "groups",
        "no 8 finite saliencies",
    ),
    (
        "a saliency that is no number",
        edit_manifest(
            lambda manifest: manifest["layers"][0]["saliency"].__setitem__(0, math.nan)
        ),
        "manifest",
        "NaN is no number of JSON",
    ),
    ("a flipped bit", flip_last_byte, "digest", "its bytes changed"),
    (
        "a tensor of another dtype in one layer",
        change_tensors(lambda tensors: tensors.update({NORM: tensors[NORM].float()})),
        "dtypes",
        f"{NORM} is F32, in most layers it is BF16",
    ),
    (
        "a list of a layer that is gone",
        set_config(quantization_config={"ignore": ["model.layers.3.mlp.gate"]}),
        "lists",
        "names model.layers.3.mlp.gate in ignore: there is no such module",
    ),
    (
        "a tensor of no module",
        change_tensors(lambda tensors: tensors.update({"model.draft.weight": torch.ones(3)})),
        "load",
        "model.draft.weight has no place in Qwen3MoeForCausalLM",
    ),
    (
        "a huge norm",
        change_tensors(lambda tensors: tensors["model.norm.weight"].fill_(3e38)),
        "run",
        "the logits are not finite",
    ),
    (
        "huge weights of a layer",
        change_tensors(lambda t: t["model.layers.1.self_attn.o_proj.weight"].fill_(3e38)),
        "run",
        "what leaves layer 1 is not finite",
    ),
    ("a planted NaN", plant(math.nan), "finite", "q_proj.weight in model-"),
    ("a planted infinity", plant(-math.inf), "finite", "q_proj.weight in model-"),
    ("a planted NaN, by digest", plant(math.nan), "digest", "its bytes changed"),
]


@pytest.mark.parametrize("name", families())
def test_a_good_output_of_every_family_passes_every_check(outputs, name):
    findings = list(verify(outputs(name, 6), load=True, run=True))
    assert [finding for finding in findings if not finding.ok] == []
    assert {f.check for f in findings if not f.is_note} == {check.name for check in ALL}


@pytest.mark.parametrize("grouping", ["none", "mc-smoe", "hc-smoe"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_good_output_of_every_grouping_passes(outputs, name, grouping):
    assert failures(outputs(name, 6, grouping=grouping)) == {}


@pytest.mark.parametrize(
    ("damage", "check", "words"),
    [pytest.param(*rest, id=name) for name, *rest in DAMAGES],
)
def test_a_damaged_output_fails_the_check_that_is_there_for_it(output, damage, check, words):
    damage(output)
    found = failures(output, load=check == LOAD.name, run=check == RUN.name)
    assert check in found
    assert any(words in message for message in found[check]), found[check]


def test_every_check_has_a_damage_it_is_shown_to_find():
    assert {check for _, _, check, _ in DAMAGES} == {check.name for check in ALL}


def test_what_servers_refuse_is_told_of_a_good_output(output):
    notes = [finding.message for finding in verify(output, scan=False) if finding.is_note]
    assert [note.split(" with ")[0] for note in notes] == [
        "TensorRT-LLM, FlashInfer: fails",
        "SGLang, AITER (ROCm): slow",
        "vLLM: works",
    ]


def test_what_a_client_refuses_fails_if_it_is_asked_for(output):
    assert failures(output) == {}
    told = failures(output, scan=False, clients=["tensorrt-llm", "sglang", "vllm"])
    assert told.keys() == {"tensorrt-llm"}
    assert "with 6 experts a layer" in told["tensorrt-llm"][0]
    said = [each.message for each in verify(output, scan=False, clients=["llama.cpp"])]
    assert "none of the 3 known reasons for llama.cpp to refuse it" in said


def test_a_file_that_a_converter_does_not_read_fails_for_it_alone(output):
    shard = sorted(output.glob("model-*.safetensors"))[0]
    moved = shard.rename(output / "weights.safetensors")
    edit(
        output / INDEX,
        lambda index: index["weight_map"].update(
            {k: moved.name for k, v in index["weight_map"].items() if v == shard.name}
        ),
    )
    told = failures(output, scan=False, clients=["llama.cpp", "vllm"])
    assert told["llama.cpp"] == [
        "llama.cpp: fails to convert it, only files named model*.safetensors are read"
    ]
    assert "vllm" not in told


def test_transformers_is_asked_for_the_place_of_every_tensor(output):
    checks = {each.check for each in verify(output, scan=False, clients=["transformers"])}
    assert {"load", "transformers"} <= checks
    with pytest.raises(UsageError, match="'ollama' is none of vllm"):
        verify(output, clients=["ollama"])


def test_a_list_is_followed_in_a_wrapper_and_under_a_part_of_a_name():
    known = Modules(["model.language_model.layers.0.mlp.gate.weight"], 4)
    for name in ("lm_head", "mlp.gate", "layers.0.mlp", "language_model.layers.0.mlp.gate"):
        assert name in known
    for name in ("layers.1.mlp", "layers.0.mlp.up", "layers.0.ml", "ayers.0.mlp"):
        assert name not in known
    assert "layers.7.mlp.experts.3.up_proj" in known
    assert "layers.7.mlp.experts.4.up_proj" not in known


def test_a_flipped_bit_is_found_by_its_digest_alone(output):
    flip_last_byte(output)
    assert set(failures(output)) == {"digest"}


def test_a_pruned_output_has_no_group_of_several(outputs, tmp_path):
    folder = shutil.copytree(outputs("qwen3_moe", 6, grouping="none"), tmp_path / "output")
    kept = json.loads((folder / MANIFEST).read_bytes())["layers"][0]["groups"]
    dropped = min(set(range(8)) - {group[0] for group in kept})
    edit_groups(lambda groups: groups[0].append(dropped))(folder)
    (message,) = failures(folder)["groups"]
    assert "experts were pruned" in message


def test_routing_groups_must_stay_equal_and_hold_enough_experts(outputs, tmp_path):
    folder = shutil.copytree(outputs("deepseek_v3"), tmp_path / "output")
    set_config(n_group=4)(folder)
    assert "must be a multiple of 4 with" in failures(folder)["routing"][0]
    set_config(n_group=3, num_experts_per_tok=3)(folder)
    assert "of 1 in 3 groups, which would have 2" in failures(folder)["routing"][0]


def test_a_correction_bias_must_shrink_with_its_router(outputs, tmp_path):
    folder = shutil.copytree(outputs("deepseek_v3"), tmp_path / "output")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    drop_row(name)(folder)
    assert failures(folder)["routers"] == [
        f"{name} has shape (5,), none of its axes is the layer's 6 experts"
    ]


def test_without_a_scan_no_tensor_is_read(output):
    flip_last_byte(output)
    plant(math.nan)(output)
    found = failures(output, scan=False)
    assert found == {}
    findings = [finding for finding in verify(output, scan=False) if not finding.is_note]
    assert {finding.check for finding in findings} == {check.name for check in CHECKS}


def test_all_of_the_damage_is_told_and_not_only_the_first(output):
    plant(math.nan)(output)
    plant(math.inf, "model.layers.0.self_attn.k_proj.weight")(output)
    add_partial(output)
    found = failures(output)
    assert set(found) == {"strays", "digest", "finite"}
    assert len(found["finite"]) == len(found["digest"]) == 2


def test_a_check_that_builds_on_a_failed_one_is_left_out(output):
    (output / CONFIG).unlink()
    found = {finding.check: finding.ok for finding in verify(output)}
    assert found == {
        "manifest": True,
        "headers": False,
        "sizes": True,
        "complete": False,
        "documents": True,
    }


def test_an_original_checkpoint_lacks_only_the_manifest():
    assert set(failures(CHECKPOINT)) == {"manifest"}


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        verify(tmp_path / "nothing")


def test_an_empty_folder_is_found_wrong(tmp_path):
    assert set(failures(tmp_path)) == {"manifest", "headers"}


@pytest.mark.parametrize("name", [CONFIG, INDEX, MANIFEST])
@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "[" * 100_000, '{"a": 1e999}', "\ufffe", "3"]
)
def test_no_document_however_broken_crashes_the_verification(output, name, text):
    (output / name).write_text(text, encoding="utf-8")
    assert failures(output)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, 1000])
def test_no_shard_however_short_crashes_the_verification(output, cut):
    path = shard_of(output, "model.norm.weight")
    path.write_bytes(path.read_bytes()[:cut])
    found = failures(output)
    assert set(found) == {"headers", "sizes"}


def test_a_flipped_bit_anywhere_in_the_documents_never_crashes(output):
    generator = torch.Generator().manual_seed(0)
    for name in (CONFIG, INDEX, MANIFEST):
        good = (output / name).read_bytes()
        for position in torch.randint(len(good), (40,), generator=generator).tolist():
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            (output / name).write_bytes(bad)
            list(verify(output, scan=False))
        (output / name).write_bytes(good)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_seen_wherever_it_is(dtype, value):
    good = torch.linspace(-3, 3, 133).to(dtype)
    assert module.is_finite(good)
    for position in range(len(good)):
        bad = good.clone()
        bad[position] = value
        assert not module.is_finite(bad), position


def test_numbers_of_eight_bits_are_looked_at_too():
    good = torch.linspace(-3, 3, 40).to(torch.float8_e4m3fn)
    bad = good.clone()
    bad[7] = math.nan
    assert module.is_finite(good)
    assert not module.is_finite(bad)


@pytest.mark.parametrize("native", [module._NATIVE, frozenset()], ids=["native", "converted"])
def test_a_scan_holds_a_block_and_not_a_tensor(tmp_path, monkeypatch, native):
    monkeypatch.setattr(module, "_NATIVE", native)
    tensors = {"big": torch.zeros(1 << 25, dtype=torch.bfloat16), "bad": torch.tensor(math.nan)}
    save_file(tensors, tmp_path / "model.safetensors")  # 67 MB, 134 MB as float32
    tensors.clear()
    (tmp_path / CONFIG).write_text("{}", encoding="utf-8")
    subject = Subject(tmp_path)
    with gauge(0.001) as meter:
        before = meter.highest
        found = list(verification._finite(subject, "model.safetensors"))
        meter.sample()
        # how much of what was freed the heap holds on to depends on the tests before
        assert meter.highest - before < 4 * 4 * module.BLOCK_ELEMENTS
    assert found == ["bad in model.safetensors holds NaN or infinite numbers"]
