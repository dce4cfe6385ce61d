"""Vision-language checkpoints: the text decoder is compressed, all else is copied."""

from functools import cache

import pytest
import torch
from slicing import same_bits
from tiny_checkpoints import load_tensors, read_config
from tiny_runs import forward_streamed, groups_by_layer, run, same_in, settings, some_tokens
from tiny_wrappers import WRAPPERS, write_wrapper
from transformers import AutoModelForImageTextToText

from ream_stream.errors import UnsupportedModelError
from ream_stream.evaluation.source_diff import against
from ream_stream.evaluation.verify import verify
from ream_stream.model.meta_model import build_skeleton

NAMES = [
    name if name == "qwen3_vl_moe" else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(WRAPPERS)
]


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    return cache(lambda name: write_wrapper(tmp_path_factory.mktemp("wrappers") / name, name))


@torch.no_grad()
def logits_in_transformers(folder, dtype, ids_BL, mask_BL):
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.data = parameter.data.clone()
    return model.eval()(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_the_text_decoder_of_a_wrapper_has_the_bits_of_the_whole(wrapper, name):
    folder, tokens = wrapper(name), some_tokens(padded=True)
    for mask_BL in (None, tokens.attention_mask_SL):
        inputs = [(tokens.input_ids_SL, mask_BL)]
        for dtype in (torch.float32, torch.bfloat16):
            want = logits_in_transformers(folder, dtype, *inputs[0])
            same = same_in(name, dtype)
            assert same(forward_streamed(folder, dtype, inputs)[0].logits, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_is_compressed_and_all_but_its_decoder_copied(wrapper, tmp_path, name):
    source = wrapper(name)
    done = run(source, tmp_path / "out", settings(6))
    findings = [*verify(done.output, load=True, run=True), *against(done.output, source)]
    assert [finding.message for finding in findings if not finding.ok] == []
    assert groups_by_layer(done)
    want, have = load_tensors(source), load_tensors(done.output)
    decoder = "model.layers." if name == "step3p7" else "language_model"
    rest = [key for key in want if ".layers." not in key or decoder not in key]
    assert {"mtp.norm.weight"} <= set(rest)
    assert all(same_bits(have[key], want[key]) for key in rest)
    before, after = read_config(source), read_config(done.output)
    changed = {k for k in before if before[k] != after[k]}
    assert changed == {"text_config"}
    text = {k for k, v in before["text_config"].items() if v != after["text_config"][k]}
    assert len(text) == 1
    assert after["text_config"][text.pop()] == 6
    ids_BL = done.tokens.input_ids_SL
    want = logits_in_transformers(done.output, torch.float32, ids_BL, None)
    ours = forward_streamed(done.output, torch.float32, [(ids_BL, None)])[0].logits
    assert same_in(name, torch.float32)(ours, want)


def test_a_decoder_that_transformers_has_in_a_wrapper_alone_is_refused_without_it():
    with pytest.raises(UnsupportedModelError, match="of no model that gives logits"):
        build_skeleton({"model_type": "step3p5"}, torch.bfloat16, torch.device("cpu"))
