"""Perplexity of the streamed model is that of transformers' whole model."""

import math
import signal

import pytest
import tiny
import torch
from tiny import CPU, TINY, some_tokens
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from ream_stream import evaluate as module
from ream_stream.calibration.tokens import from_tensors
from ream_stream.checkpoint.source import open_checkpoint
from ream_stream.demo import CHECKPOINT
from ream_stream.errors import (
    InterruptedRunError,
    OtherRunError,
    ReamStreamError,
    UnsupportedModelError,
    UsageError,
)
from ream_stream.evaluate import Evaluation, difference, evaluate, scored, summarize
from ream_stream.events import Step
from ream_stream.memory import gauge


def demo_tokens(sequences=6, length=64, *, padded=False):
    generator = torch.Generator().manual_seed(3)
    ids_SL = torch.randint(2, 4096, (sequences, length), generator=generator)
    mask_SL = torch.ones_like(ids_SL)
    if padded:
        mask_SL[1, :20], mask_SL[2, 30:], mask_SL[4, 1:] = 0, 0, 0
    tensors = {"input_ids": ids_SL, "attention_mask": mask_SL}
    return from_tensors(tensors, description="drawn")


def streamed(folder, tokens, work, dtype=torch.float32):
    *steps, result = evaluate(open_checkpoint(folder), tokens, work, dtype=dtype, device=CPU)
    assert all(isinstance(step, Step) for step in steps)
    assert isinstance(result, Evaluation)
    return result


@torch.no_grad()
def whole(folder, tokens, dtype=torch.float32):
    """Return the mean, with transformers' model and torch's loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    logits_BLV = model(**tokens_of(tokens), use_cache=False).logits.float()
    target_BL = tokens.input_ids_SL.clone()
    mask_SL = tokens.attention_mask_SL
    if mask_SL is not None:
        target_BL[mask_SL == 0] = -100
        target_BL[:, 1:][mask_SL[:, :-1] == 0] = -100
    loss = cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1).double(), target_BL[:, 1:].flatten(), reduction="mean"
    )
    return loss.item()


def tokens_of(tokens):
    return {"input_ids": tokens.input_ids_SL, "attention_mask": tokens.attention_mask_SL}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_the_mean_is_that_of_transformers(checkpoints, tmp_path, monkeypatch, name, padded):
    folder, tokens = checkpoints(name, torch.bfloat16), some_tokens(5, 12, padded=padded)
    # batches of 2, 2 and 1 sequences; logits of 3 positions at once
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", 24)
    monkeypatch.setattr(module, "LOGITS_BYTES", 3 * 4 * tiny.VOCABULARY)
    result = streamed(folder, tokens, tmp_path)
    assert result.nats == pytest.approx(whole(folder, tokens), rel=1e-6)
    assert result.predicted == (55 if not padded else 55 - 4 - 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_demo_checkpoint_has_the_perplexity_that_transformers_gives(
    tmp_path, padded, dtype
):
    tokens = demo_tokens(padded=padded)
    result = streamed(CHECKPOINT, tokens, tmp_path, dtype)
    assert result.nats == pytest.approx(whole(CHECKPOINT, tokens, dtype), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.nats), rel=1e-12)


def test_the_result_does_not_depend_on_how_sequences_are_cut_into_batches(
    tmp_path, monkeypatch
):
    tokens, results = demo_tokens(padded=True), []
    for batch_tokens, logits_bytes in ((64, 120_000), (200, 500_000), (10_000, 10**9)):
        monkeypatch.setattr(module, "MAX_BATCH_TOKENS", batch_tokens)
        monkeypatch.setattr(module, "LOGITS_BYTES", logits_bytes)
        results.append(streamed(CHECKPOINT, tokens, tmp_path))
    for result in results[1:]:
        assert result.nats_S == pytest.approx(results[0].nats_S, rel=1e-6)
        assert result.predicted_S == results[0].predicted_S


def test_no_more_logits_exist_at_once_than_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", 5 * 4 * 4096)
    seen, logits = [], module.StreamedModel.logits
    monkeypatch.setattr(
        module.StreamedModel, "logits", lambda *args: seen.append(logits(*args)) or seen[-1]
    )
    streamed(CHECKPOINT, demo_tokens(), tmp_path)
    # 63 scored positions a sequence, 5 at once
    assert [tuple(block.shape) for block in seen[:13]] == [(1, 5, 4096)] * 12 + [(1, 3, 4096)]
    assert max(block.nbytes for block in seen) <= module.LOGITS_BYTES


def test_a_token_is_scored_if_it_and_the_one_before_are_not_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1]])
    tokens = from_tensors(
        {"input_ids": torch.ones_like(mask), "attention_mask": mask}, description="padded"
    )
    assert scored(tokens).int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]


def test_mean_and_error_by_hand():
    result = summarize(torch.tensor([6.0, 2.0, 4.0]).double(), torch.tensor([2, 2, 2]))
    # means of 3, 1 and 2: their deviation is 1, its error 1 / sqrt(3)
    assert (result.predicted, result.nats) == (6, 2.0)
    assert result.stderr == pytest.approx(1 / math.sqrt(3))
    unequal = summarize(torch.tensor([1.0, 9.0]).double(), torch.tensor([1, 4]))
    # mean 10 / 5 = 2, residuals 1 - 2 * 1 = -1 and 9 - 2 * 4 = 1: sqrt(2 / 1 * 2) / 5
    assert unequal.stderr == pytest.approx(2 / 5)
    assert math.isnan(summarize(torch.tensor([1.0]).double(), torch.tensor([1])).stderr)


def test_a_difference_is_taken_sequence_by_sequence():
    count = torch.tensor([2, 2, 2])
    base = summarize(torch.tensor([2.0, 20.0, 200.0]).double(), count)
    worse = summarize(torch.tensor([3.0, 21.0, 201.0]).double(), count)
    assert difference(worse, base).nats == pytest.approx(0.5)
    assert difference(worse, base).stderr == pytest.approx(0.0, abs=1e-12)
    assert worse.stderr > 10
    with pytest.raises(ValueError, match="different tokens"):
        difference(worse, summarize(torch.tensor([3.0]).double(), torch.tensor([6])))


def test_a_perplexity_beyond_floating_point_is_infinite():
    assert summarize(torch.tensor([5000.0]).double(), torch.tensor([1])).perplexity == math.inf


def test_the_work_folder_holds_two_boundaries_at_most_and_nothing_at_the_end(tmp_path):
    work, most = tmp_path / "deep" / "work", 0
    events = evaluate(
        open_checkpoint(CHECKPOINT), demo_tokens(), work, dtype=torch.float32, device=CPU
    )
    for event in events:
        if isinstance(event, Step):
            stores = [path for path in (work / "evaluate").iterdir() if path.is_dir()]
            most = max(most, len(stores))
            assert event.phase == "score" or len(stores) >= 1
    assert most == 2
    assert list(work.iterdir()) == []


def test_progress_counts_batches_by_layer_then_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", 64 * 4)
    checkpoint = open_checkpoint(CHECKPOINT)
    *steps, _ = evaluate(checkpoint, demo_tokens(), tmp_path, dtype=torch.float32, device=CPU)
    assert [(s.layer, s.phase, s.done, s.total) for s in steps] == [
        *((layer, "propagate", done, 2) for layer in range(4) for done in (1, 2)),
        *((3, "score", done, 6) for done in range(1, 7)),
    ]


def test_a_stop_leaves_nothing_behind(tmp_path):
    events = evaluate(
        open_checkpoint(CHECKPOINT),
        demo_tokens(),
        tmp_path,
        dtype=torch.float32,
        device=CPU,
        stop_requested=lambda: signal.SIGTERM,
    )
    assert next(events).done == 1
    with pytest.raises(InterruptedRunError) as stopped:
        next(events)
    assert stopped.value.exit_status == 143
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_evaluation_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / "evaluate" / "3.partial"
    left.mkdir(parents=True)
    (left / "chunk").write_bytes(b"x")
    result = streamed(CHECKPOINT, demo_tokens(2, 8), tmp_path)
    assert result.predicted == 14
    assert list(tmp_path.iterdir()) == []


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    checkpoint, tokens = open_checkpoint(CHECKPOINT), demo_tokens(2, 8)
    first = evaluate(checkpoint, tokens, tmp_path, dtype=torch.float32, device=CPU)
    next(first)
    with pytest.raises(OtherRunError, match="in use by process"):
        next(evaluate(checkpoint, tokens, tmp_path, dtype=torch.float32, device=CPU))
    *_, result = first
    assert result.predicted == 14


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    tokens = from_tensors({"input_ids": torch.tensor([[1, 4096]])}, description="some.txt")
    with pytest.raises(UsageError, match=r"some\.txt: it holds token 4096.* knows 0 to 4095"):
        streamed(CHECKPOINT, tokens, tmp_path)


def test_tokens_that_nothing_comes_before_are_refused(tmp_path):
    tokens = from_tensors({"input_ids": torch.ones(3, 1).long()}, description="some.txt")
    with pytest.raises(UsageError, match="no token has a token before it"):
        streamed(CHECKPOINT, tokens, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_was_never_tried_is_refused(checkpoints, tmp_path):
    checkpoint = open_checkpoint(checkpoints("mixtral", torch.bfloat16))
    checkpoint.config["model_type"] = "llama"
    with pytest.raises(UnsupportedModelError, match="llama"):
        next(evaluate(checkpoint, some_tokens(), tmp_path, dtype=torch.float32, device=CPU))


def test_a_model_that_gives_no_numbers_is_an_error_and_not_a_perplexity(
    checkpoints, tmp_path, monkeypatch
):
    tensors = tiny.load_tensors(checkpoints("mixtral", torch.bfloat16))
    folder = tiny.write_checkpoint(tmp_path / "broken", "mixtral", torch.bfloat16)
    tensors["model.norm.weight"][3] = math.nan
    tiny.save_tensors(folder, tensors)
    with pytest.raises(ReamStreamError, match="sequence 0 of drawn is not finite"):
        streamed(folder, some_tokens(), tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    peaks = []
    for layers in (2, 8):
        folder = write_wide(tmp_path / str(layers), layers)
        tokens = some_tokens(8, 64)
        with gauge(0.002) as meter:
            before = meter.highest
            streamed(folder, tokens, tmp_path / "work")
            meter.sample()
            peaks.append(meter.highest - before)
    # a layer is 13 MB in float32
    assert peaks[1] - peaks[0] < 13_000_000


def write_wide(folder, layers):
    """Write a model whose layers can be seen in the process's memory."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=tiny.VOCABULARY,
        hidden_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
