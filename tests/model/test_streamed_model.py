"""The streamed model gives the bits of transformers' whole model, in every family."""

import inspect
import re
from importlib import import_module

import pytest
import torch
import transformers
from tiny_checkpoints import load_tensors, save_tensors, write_checkpoint
from tiny_families import TINY
from tiny_parameters import families, families_in
from tiny_runs import (
    CPU,
    forward_in_transformers,
    forward_streamed,
    run,
    same_in,
    settings,
    some_tokens,
)
from transformers.core_model_loading import rename_source_key

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.errors import DamagedError
from ream_stream.evaluation.source_diff import against
from ream_stream.evaluation.verify import verify
from ream_stream.model import embeddings, meta_model
from ream_stream.model.experts import StreamedExperts
from ream_stream.model.streamed_model import Batch, StreamedModel

FAMILIES = families()
STORED_AND_RUN = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-run-in-fp32": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}


def batches():
    """Yield a name, ids and a mask: one sequence, several, padded on both sides, all padded."""
    draw = torch.Generator().manual_seed(1)
    for name, rows, length in (("one token", 1, 1), ("one", 1, 9), ("several", 5, 13)):
        yield name, torch.randint(2, 62, (rows, length), generator=draw), None
    ids_BL = torch.randint(2, 62, (4, 12), generator=draw)
    both_BL, left_BL, right_BL = torch.ones(3, 4, 12, dtype=torch.int64)
    both_BL[0, :4], both_BL[1, -5:] = 0, 0
    left_BL[:, :2], left_BL[2, :9] = 0, 0
    right_BL[:, -1:], right_BL[3, 2:] = 0, 0
    yield "padded on both sides", ids_BL, both_BL
    yield "padded on the left", ids_BL, left_BL
    yield "padded on the right", ids_BL, right_BL
    yield "one padded on the left", ids_BL[:1], left_BL[2:3]


@pytest.mark.parametrize(("name", "stored", "run_in"), families_in(STORED_AND_RUN))
def test_every_boundary_and_the_logits_have_the_bits_of_transformers(
    checkpoints, name, stored, run_in
):
    folder = checkpoints(name, stored)
    names, *inputs = zip(*batches(), strict=True)
    inputs = list(zip(*inputs, strict=True))
    full = forward_in_transformers(folder, run_in, inputs)
    streamed = forward_streamed(folder, run_in, inputs)
    same = same_in(name, run_in)
    for what, ours, theirs in zip(names, streamed, full, strict=True):
        assert theirs.logits.isfinite().all(), what
        for layer, (our, their) in enumerate(zip(ours.hidden, theirs.hidden, strict=True)):
            assert same(our, their), f"{what}: layer {layer}"
        assert same(ours.logits, theirs.logits), what


@pytest.mark.parametrize("name", FAMILIES)
def test_one_changed_column_of_one_expert_is_seen(checkpoints, tmp_path, name):
    folder = write_checkpoint(tmp_path / "changed", name, torch.float32)
    tensors = load_tensors(folder)
    last = max(set(range(4 if name == "qwen3_next" else 3)) - set(TINY[name].dense))
    ends = (
        "s.5.down_proj.weight",
        "s.5.w2.weight",
        "experts.down_proj",
        "moe.output_linear.weight",
    )
    (down,) = (key for key in tensors if f"layers.{last}." in key and key.endswith(ends))
    matrix = tensors[down][5] if tensors[down].dim() == 3 else tensors[down]
    (matrix.T if name == "gpt_oss" else matrix)[:, 3] *= 1.01
    save_tensors(folder, tensors)
    ids_BL = some_tokens().input_ids_SL
    [full] = forward_in_transformers(
        checkpoints(name, torch.float32), torch.float32, [(ids_BL, None)]
    )
    [streamed] = forward_streamed(folder, torch.float32, [(ids_BL, None)])
    same = same_in(name, torch.float32)
    assert same(streamed.hidden[0], full.hidden[0])
    assert not same(streamed.hidden[-1], full.hidden[-1])
    assert not same(streamed.logits, full.logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dropped_mask_is_seen(checkpoints, name):
    folder, tokens = checkpoints(name, torch.float32), some_tokens(padded=True)
    ids_BL, mask_BL = tokens.input_ids_SL, tokens.attention_mask_SL
    [full] = forward_in_transformers(folder, torch.float32, [(ids_BL, mask_BL)])
    [streamed] = forward_streamed(folder, torch.float32, [(ids_BL, None)])
    assert not torch.equal(streamed.logits[mask_BL.bool()], full.logits[mask_BL.bool()])


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_open_layer_has_data_and_its_experts_never_do(checkpoints, name):
    model = StreamedModel(open_checkpoint(checkpoints(name)), torch.float32, CPU)

    def loaded():
        return {key for key, value in model.model.named_parameters() if not value.is_meta}

    assert loaded() == set()
    with model.open_outside():
        outside = loaded()
        assert not any(
            "layers." in key or "embed_tokens" in key or "lm_head" in key for key in outside
        )
        for index in range(model.num_layers):
            with model.open_layer(index) as experts:
                assert (experts is None) == (index in TINY[name].dense)
                inside = loaded() - outside
                assert inside
                assert all(key.startswith(f"model.layers.{index}.") for key in inside)
                assert not any(".experts." in key for key in inside)
            assert loaded() == outside
            assert not any(isinstance(m, StreamedExperts) for m in model.model.modules())
    assert loaded() == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_have_the_dtypes_transformers_runs_them_in(checkpoints, name):
    """A correction bias stays float32 in a bf16 model, which a few tokens need not show."""
    folder = checkpoints(name)
    full = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    want = {key: tensor.dtype for key, tensor in full.state_dict().items()}
    if name in {"deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe"}:
        assert torch.float32 in want.values()
    model = StreamedModel(open_checkpoint(folder), torch.bfloat16, CPU)
    for layer in model.layers:
        with model.open_layer(layer.index):
            have = {
                key: tensor.dtype
                for key, tensor in model.model.state_dict().items()
                if key in layer.dense
            }
        assert have == {key: want[key] for key in layer.dense}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_run_twice_gives_the_same_and_leaves_its_input_alone(checkpoints, name):
    model = StreamedModel(open_checkpoint(checkpoints(name)), torch.float32, CPU)
    tokens = some_tokens(padded=True)
    batch = Batch(input_ids_BL=tokens.input_ids_SL, attention_mask_BL=tokens.attention_mask_SL)
    with model.open_outside():
        hidden_BLH = None
        for index in range(model.num_layers):
            before = None if hidden_BLH is None else hidden_BLH.clone()
            with model.open_layer(index):
                once = model.run_layer(index, batch, hidden_BLH)
                twice = model.run_layer(index, batch, hidden_BLH)
            assert torch.equal(once, twice), index
            assert before is None or torch.equal(before, hidden_BLH), index
            hidden_BLH = once


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_played_back_does_not_depend_on_the_experts(checkpoints, name):
    """The mixers are attention, and dense blocks beside the experts: no experts in them."""
    model = StreamedModel(open_checkpoint(checkpoints(name)), torch.float32, CPU)
    for layer in model.layers:
        if layer.stack is None:
            continue
        mixers = model.mixers(layer.index)
        kinds = " ".join(type(mixer).__name__ for mixer in mixers)
        assert re.search("Attention|DeltaNet|Mamba|Conv", kinds) or name == "nemotron_h"
        assert len(mixers) <= 3
        modules = [m for mixer in mixers for m in mixer.modules()]
        assert model.router(layer.index) not in modules
        assert not any(
            getattr(m, "down_proj", None) is not None and "Experts" in type(m).__name__
            for m in modules
        )


def test_the_output_matrix_can_be_used_in_pieces(checkpoints, monkeypatch):
    folder, ids_BL = checkpoints("qwen3_moe"), some_tokens().input_ids_SL
    [full] = forward_in_transformers(folder, torch.float32, [(ids_BL, None)])
    # 64 rows of 32 numbers of 4 bytes: 7 rows a piece, the last of 1
    monkeypatch.setattr(embeddings, "HEAD_BYTES", 7 * 32 * 4)
    [streamed] = forward_streamed(folder, torch.float32, [(ids_BL, None)])
    torch.testing.assert_close(streamed.logits, full.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("hidden", "inner"), [(64, 32), (32, 64)])
def test_stacks_with_inputs_as_rows_may_be_of_any_width(tmp_path, hidden, inner):
    widths = {"hidden_size": hidden, "intermediate_size": inner}
    folder = write_checkpoint(tmp_path / "source", "gpt_oss", torch.bfloat16, **widths)
    ids_BL = some_tokens().input_ids_SL
    [full] = forward_in_transformers(folder, torch.bfloat16, [(ids_BL, None)])
    [streamed] = forward_streamed(folder, torch.bfloat16, [(ids_BL, None)])
    assert torch.equal(streamed.logits, full.logits)
    done = run(folder, tmp_path / "out", settings(4, refit="down"))
    findings = [*verify(done.output, load=True, run=True), *against(done.output, folder)]
    assert [finding.message for finding in findings if not finding.ok] == []


def test_a_model_that_lacks_a_tensor_is_refused_by_its_name(tmp_path):
    folder = write_checkpoint(tmp_path / "lacking", "mixtral", torch.bfloat16)
    tensors = load_tensors(folder)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_tensors(folder, tensors)
    with pytest.raises(DamagedError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        StreamedModel(open_checkpoint(folder), torch.float32, CPU)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_model_that_lacks_a_tensor_outside_the_layers_is_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / "lacking", "mixtral", torch.bfloat16)
    tensors = load_tensors(folder)
    del tensors[name]
    save_tensors(folder, tensors)
    with pytest.raises(DamagedError, match=name):
        StreamedModel(open_checkpoint(folder), torch.float32, CPU)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ],
)
def test_a_tensor_of_another_shape_than_the_model_has_is_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / "other", "mixtral", torch.bfloat16)
    tensors = load_tensors(folder)
    tensors[name] = tensors[name][:-2].clone()
    save_tensors(folder, tensors)
    with pytest.raises(DamagedError, match=name):
        StreamedModel(open_checkpoint(folder), torch.float32, CPU)


def test_tied_embeddings_that_differ_are_both_used(checkpoints, tmp_path):
    """A config may say tied where the file has two tensors; transformers then keeps both."""
    folder = write_checkpoint(tmp_path / "both", "ernie4_5_moe", torch.float32)
    tensors = load_tensors(folder)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_tensors(folder, tensors)
    ids_BL = some_tokens().input_ids_SL
    [full] = forward_in_transformers(folder, torch.float32, [(ids_BL, None)])
    [streamed] = forward_streamed(folder, torch.float32, [(ids_BL, None)])
    assert torch.equal(streamed.logits, full.logits)


PRIVATE_NAMES = [
    # where                      what                            what it is needed for
    ("AutoModelForCausalLM", "_model_mapping", "config class to model class"),
    ("PreTrainedModel", "get_init_context", "builds the skeleton on meta"),
    ("PreTrainedModel", "initialize_weights", "fills the computed buffers"),
    ("PreTrainedModel", "_get_dtype_plan", "tensors kept in float32"),
    ("PreTrainedModel", "_no_split_modules", "class names of decoder layers"),
    ("PreTrainedModel", "_can_record_outputs", "class of the router"),
    ("conversion_mapping", "get_model_conversion_mapping", "hub to module names"),
    ("core_model_loading", "WeightRenaming", "a tensor with another name"),
    ("core_model_loading", "WeightConverter", "tensors that are fused"),
    ("core_model_loading", "rename_source_key", "name of one tensor's parameter"),
    ("models.auto.configuration_auto", "CONFIG_MAPPING", "model_type to config"),
    ("monkey_patching", "patch_output_recorders", "fills _can_record_outputs"),
]


@pytest.mark.parametrize(
    ("owner", "name", "reason"), PRIVATE_NAMES, ids=[name for _, name, _ in PRIVATE_NAMES]
)
def test_transformers_still_has_the_private_name(owner, name, reason):
    found = (
        getattr(transformers, owner)
        if owner[0].isupper()
        else import_module(f"transformers.{owner}")
    )
    assert hasattr(found, name), f"{owner}.{name} is gone; used as: {reason}"


def test_transformers_private_functions_still_take_what_they_are_given():
    context = inspect.signature(transformers.PreTrainedModel.get_init_context)
    assert list(context.parameters)[:3] == ["dtype", "is_quantized", "_is_ds_init_called"]
    assert len(context.parameters) == 4
    rename = inspect.signature(rename_source_key)
    assert list(rename.parameters)[:5] == [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_familys_modules_are_what_the_streamed_experts_stand_in_for(checkpoints, name):
    """A fused experts module with its own activation, and a router that says its top k."""
    model = StreamedModel(open_checkpoint(checkpoints(name)), torch.float32, CPU)
    for layer in model.layers:
        if layer.stack is None:
            continue
        router = model.router(layer.index)
        assert model.top_k == TINY[name].top_k
        assert router is not None
        _, experts = meta_model.find_fused_experts(model._decoder[layer.index])
        scales = name == "llama4_text"
        assert callable(experts.act_fn if scales else experts._apply_gate)
        assert len(inspect.signature(type(experts).forward).parameters) == 4 - 2 * scales
        first = experts.up_proj if name == "nemotron_h" else experts.gate_up_proj
        rows = layer.stack.inner * (1 if name == "nemotron_h" else 2)
        shape = (rows, layer.stack.hidden)
        turned = name in {"gpt_oss", "llama4_text"}
        assert tuple(first.shape) == (8, *(shape[::-1] if turned else shape))


def test_experts_of_another_width_than_the_model_has_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "other", "mixtral", torch.bfloat16)
    tensors = load_tensors(folder)
    for name in [name for name in tensors if ".experts." in name]:
        narrow = slice(None, -2)
        cut = tensors[name][:, narrow] if ".w2." in name else tensors[name][narrow]
        tensors[name] = cut.clone()
    save_tensors(folder, tensors)
    with pytest.raises(DamagedError, match=r"w1\.weight has shape \(22, 32\)"):
        StreamedModel(open_checkpoint(folder), torch.float32, CPU)
