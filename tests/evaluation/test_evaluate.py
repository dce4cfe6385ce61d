"""What the streamed model predicts is what transformers' whole model predicts."""

import math

import pytest
import torch
from reports import Events
from tiny_checkpoints import load_tensors, save_tensors, write_checkpoint
from tiny_families import VOCABULARY
from tiny_parameters import families
from tiny_runs import CPU, forward_in_transformers, run, settings, some_tokens
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from ream_stream.calibration.tokens import from_tensors, joined
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.compression.file_lock import MARK
from ream_stream.errors import (
    InterruptedRunError,
    OtherRunError,
    OverBudgetError,
    ReamStreamError,
    UnsupportedModelError,
    UsageError,
)
from ream_stream.evaluation import evaluate as module
from ream_stream.evaluation.evaluate import Result, evaluate, scored
from ream_stream.evaluation.layer_errors import layer_errors
from ream_stream.evaluation.memory import plan_evaluation
from ream_stream.evaluation.metrics import effective_rank
from ream_stream.events import Evaluating, Step
from ream_stream.host_memory import gauge
from ream_stream.model.streamed_model import StreamedModel


def demo_tokens(sequences=6, length=64, *, padded=False):
    generator = torch.Generator().manual_seed(3)
    ids_SL = torch.randint(2, 4096, (sequences, length), generator=generator)
    mask_SL = torch.ones_like(ids_SL)
    if padded:
        mask_SL[1, :20], mask_SL[2, 30:], mask_SL[4, 1:] = 0, 0, 0
    tensors = {"input_ids": ids_SL, "attention_mask": mask_SL}
    return from_tensors(tensors, description="drawn")


def streamed(folder, tokens, work, dtype=torch.float32):
    steps = Events()
    result = evaluate(
        open_checkpoint(folder), tokens, work, dtype=dtype, device=CPU, report=steps
    )
    begun, *steps = steps
    assert isinstance(begun, Evaluating)
    assert all(isinstance(step, Step) for step in steps)
    assert isinstance(result, Result)
    return result.evaluation


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
@pytest.mark.parametrize("name", families())
def test_the_mean_is_that_of_transformers(checkpoints, tmp_path, monkeypatch, name, padded):
    folder, tokens = checkpoints(name, torch.bfloat16), some_tokens(5, 12, padded=padded)
    # batches of 2, 2 and 1 sequences; logits of 3 positions at once
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", 24)
    monkeypatch.setattr(module, "LOGITS_BYTES", 3 * 4 * VOCABULARY)
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
        assert result.loss.total_S == pytest.approx(results[0].loss.total_S, rel=1e-6)
        assert result.loss.count_S == results[0].loss.count_S
        assert result.accuracy == results[0].accuracy


def test_no_more_logits_exist_at_once_than_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", 5 * 4 * 4096)
    seen, logits = [], StreamedModel.logits
    monkeypatch.setattr(
        StreamedModel, "logits", lambda *args: seen.append(logits(*args)) or seen[-1]
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


def test_the_work_folder_holds_two_boundaries_at_most_and_nothing_at_the_end(tmp_path):
    work, most = tmp_path / "deep" / "work", 0

    def look(event):
        nonlocal most
        if isinstance(event, Evaluating):
            return
        # at the first batch of a layer what leaves it has no name yet
        stores = list((work / "evaluate").glob("*/states-*"))
        most = max(most, len(stores))
        assert event.phase == "score" or len(stores) >= 1

    evaluate(
        open_checkpoint(CHECKPOINT),
        demo_tokens(),
        work,
        dtype=torch.float32,
        device=CPU,
        report=look,
    )
    assert most == 2
    assert list(work.iterdir()) == []


def test_progress_counts_batches_by_layer_then_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", 64 * 4)
    checkpoint = open_checkpoint(CHECKPOINT)
    events = Events()
    evaluate(
        checkpoint, demo_tokens(), tmp_path, dtype=torch.float32, device=CPU, report=events
    )
    begun, *steps = events
    assert begun == Evaluating(name=CHECKPOINT.name, layers=4)
    assert [(s.layer, s.phase, s.done, s.total) for s in steps] == [
        *((layer, "propagate", done, 2) for layer in range(4) for done in (1, 2)),
        *((3, "score", done, 6) for done in range(1, 7)),
    ]


def interrupted(tokens, work, *, after, **options):
    """Evaluate the demo checkpoint, and stop after some events."""
    with pytest.raises(InterruptedRunError) as stopped:
        evaluate(
            open_checkpoint(CHECKPOINT),
            tokens,
            work,
            dtype=torch.float32,
            device=CPU,
            report=Events(after),
            **options,
        )
    assert stopped.value.exit_status == 143


def test_a_stopped_evaluation_goes_on_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", 64 * 4)
    tokens, expected = demo_tokens(padded=True), None
    for after in (1, 4, 5, 8, 9, 12):
        interrupted(tokens, tmp_path, after=after)
        checkpoint = open_checkpoint(CHECKPOINT)
        events = Events()
        result = evaluate(
            checkpoint, tokens, tmp_path, dtype=torch.float32, device=CPU, report=events
        )
        begun, *steps = events
        # layers that were done are not run again
        assert begun.skipped == min(4, (after - 1) // 2)
        assert sum(step.phase == "propagate" for step in steps) == 8 - 2 * begun.skipped
        assert expected is None or result == expected
        expected = result
        assert list(tmp_path.iterdir()) == []


def test_other_tokens_or_weights_do_not_go_on_with_what_was_left(tmp_path):
    interrupted(demo_tokens(2, 8), tmp_path, after=5)
    other = evaluate(
        open_checkpoint(CHECKPOINT),
        demo_tokens(3, 8),
        tmp_path,
        dtype=torch.float32,
        device=CPU,
    )
    assert other.evaluation.predicted == 21
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_evaluation_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / "evaluate" / "3.partial"
    left.mkdir(parents=True)
    (left / "chunk").write_bytes(b"x")
    with pytest.raises(OtherRunError, match=r"not of ream-stream \(for example 3\.partial\)"):
        streamed(CHECKPOINT, demo_tokens(2, 8), tmp_path)
    (tmp_path / "evaluate" / MARK).touch()
    result = streamed(CHECKPOINT, demo_tokens(2, 8), tmp_path)
    assert result.predicted == 14
    assert list(tmp_path.iterdir()) == []


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    checkpoint, tokens = open_checkpoint(CHECKPOINT), demo_tokens(2, 8)
    tried = []

    def second(event):
        tried.append(event)
        with pytest.raises(OtherRunError, match="in use by process"):
            evaluate(checkpoint, tokens, tmp_path, dtype=torch.float32, device=CPU)

    result = evaluate(
        checkpoint, tokens, tmp_path, dtype=torch.float32, device=CPU, report=second
    )
    assert tried
    assert result.evaluation.predicted == 14


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
        evaluate(checkpoint, some_tokens(), tmp_path, dtype=torch.float32, device=CPU)


def test_a_model_that_gives_no_numbers_is_an_error_and_not_a_perplexity(
    checkpoints, tmp_path, monkeypatch
):
    tensors = load_tensors(checkpoints("mixtral", torch.bfloat16))
    folder = write_checkpoint(tmp_path / "broken", "mixtral", torch.bfloat16)
    tensors["model.norm.weight"][3] = math.nan
    save_tensors(folder, tensors)
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


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Give the demo checkpoint with half of its experts."""
    output = tmp_path_factory.mktemp("pruned") / "out"
    tokens = demo_tokens(8, 64)
    return run(CHECKPOINT, output, settings(16, grouping="none"), tokens).output


@torch.no_grad()
def whole_pair(folder, original, tokens):
    """Return divergence, agreement and accuracy in float64 of transformers' logits."""
    target_SL = scored(tokens)
    logits = [
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(
            **tokens_of(tokens), use_cache=False
        ).logits[:, :-1][target_SL[:, 1:]]
        for each in (folder, original)
    ]
    log_PV, original_log_PV = (each.double().log_softmax(dim=1) for each in logits)
    divergence = torch.nn.functional.kl_div(
        log_PV, original_log_PV, log_target=True, reduction="batchmean"
    )
    top_P, original_top_P = (each.argmax(dim=1) for each in logits)
    token_P = tokens.input_ids_SL[target_SL]
    return (
        divergence.item(),
        (top_P == original_top_P).double().mean().item(),
        (top_P == token_P).double().mean().item(),
    )


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_two_checkpoints_side_by_side_are_what_transformers_gives(pruned, tmp_path, padded):
    tokens = demo_tokens(padded=padded)
    result = evaluate(
        open_checkpoint(pruned),
        tokens,
        tmp_path,
        dtype=torch.float32,
        device=CPU,
        original=open_checkpoint(CHECKPOINT),
    )
    against = result.against
    divergence, agreement, accuracy = whole_pair(pruned, CHECKPOINT, tokens)
    assert against.divergence.value == pytest.approx(divergence, abs=1e-6)
    assert against.divergence.value > 0.1
    assert against.agreement.value == pytest.approx(agreement, abs=1e-9)
    assert result.evaluation.accuracy.value == pytest.approx(accuracy, abs=1e-9)
    assert result.evaluation.nats == pytest.approx(whole(pruned, tokens), abs=1e-6)
    assert against.original.nats == pytest.approx(whole(CHECKPOINT, tokens), abs=1e-6)
    gap = result.evaluation.nats - against.original.nats
    assert against.loss.value == pytest.approx(gap, abs=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_beside_itself_differs_in_nothing(tmp_path):
    original = open_checkpoint(CHECKPOINT)
    result = evaluate(
        original, demo_tokens(), tmp_path, dtype=torch.float32, device=CPU, original=original
    )
    assert result.against.divergence.value == 0
    assert result.against.agreement.value == 1
    assert result.against.loss.value == 0


def test_an_original_that_is_kept_is_not_run_again(pruned, tmp_path):
    results, layers = [], []
    for _ in range(2):
        events = Events()
        result = evaluate(
            open_checkpoint(pruned),
            demo_tokens(),
            tmp_path,
            dtype=torch.float32,
            device=CPU,
            original=open_checkpoint(CHECKPOINT),
            keep_original=True,
            report=events,
        )
        results.append(result)
        steps = [event for event in events if isinstance(event, Step)]
        layers.append(sum(step.phase == "propagate" for step in steps))
    assert results[0] == results[1]
    assert layers == [8, 4]
    (kept,) = [path for path in (tmp_path / "evaluate").iterdir() if path.is_dir()]
    assert sorted(path.name for path in kept.iterdir()) == ["journal.json", "states-00004"]


def test_the_parts_of_each_domain_add_up_to_the_whole(tmp_path):
    parts = {"code": demo_tokens(4, 32, padded=False), "math": demo_tokens(2, 32)}
    tokens = joined(parts, description="mix")
    result = evaluate(
        open_checkpoint(CHECKPOINT), tokens, tmp_path, dtype=torch.float32, device=CPU
    )
    domains = result.by_domain(tokens)
    total = sum(sum(each.evaluation.loss.total_S) for each in domains.values())
    assert total == pytest.approx(sum(result.evaluation.loss.total_S))
    for name, part in parts.items():
        alone = streamed(CHECKPOINT, part, tmp_path)
        assert domains[name].evaluation.nats == pytest.approx(alone.nats, rel=1e-6)
    assert {each.evaluation.rank for each in domains.values()} == {None}


@torch.no_grad()
def test_the_effective_rank_is_of_what_enters_the_output_matrix(tmp_path, monkeypatch):
    tokens = demo_tokens(padded=True)
    rank = streamed(CHECKPOINT, tokens, tmp_path).rank
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    states = model.model(**tokens_of(tokens), use_cache=False).last_hidden_state
    kept_nH = states[:, :-1][scored(tokens)[:, 1:]].double()
    value_n = torch.linalg.svdvals(kept_nH)
    share_n = value_n / value_n.sum()
    assert rank == pytest.approx(math.exp(-(share_n * share_n.log()).sum()), rel=1e-5)
    # every third of the scored positions, whatever sequence they are in
    monkeypatch.setattr(module, "RANK_TOKENS", len(kept_nH) // 3 + 1)
    thinned = streamed(CHECKPOINT, tokens, tmp_path).rank
    assert thinned == pytest.approx(effective_rank(kept_nH[::3]), rel=1e-5)


@torch.no_grad()
def test_the_errors_of_layers_are_those_of_transformers_layers(pruned, tmp_path):
    tokens = demo_tokens(padded=True)
    events = Events()
    errors = layer_errors(
        open_checkpoint(pruned),
        open_checkpoint(CHECKPOINT),
        tokens,
        tmp_path,
        dtype=torch.float32,
        device=CPU,
        batch_sequences=4,
        report=events,
    )
    begun, *steps = events
    assert begun.layers == 4
    assert (len(steps), len(errors)) == (8, 4)
    inputs = [(tokens.input_ids_SL, tokens.attention_mask_SL)]
    original, compressed = (
        forward_in_transformers(folder, torch.float32, inputs)[0].hidden
        for folder in (CHECKPOINT, pruned)
    )
    mask_SL = tokens.attention_mask_SL.bool()
    for error, one, other in zip(errors, original, compressed, strict=True):
        total = (other[mask_SL] - one[mask_SL]).norm() / one[mask_SL].norm()
        assert error.total == pytest.approx(total.item(), rel=1e-4)
    # both get the embeddings
    assert errors[0].own == errors[0].inside == errors[0].total
    assert 0 < errors[3].own < errors[3].total
    assert list(tmp_path.iterdir()) == []


def test_the_errors_of_layers_go_on_after_a_stop(pruned, tmp_path):
    def compared(report):
        return layer_errors(
            open_checkpoint(pruned),
            open_checkpoint(CHECKPOINT),
            demo_tokens(),
            tmp_path,
            dtype=torch.float32,
            device=CPU,
            batch_sequences=8,
            report=report,
        )

    expected = compared(Events())
    with pytest.raises(InterruptedRunError):
        compared(Events(3))
    events = Events()
    errors = compared(events)
    begun, *steps = events
    assert begun.skipped == 2
    assert [step.layer for step in steps] == [2, 3]
    assert errors == expected


def test_a_budget_gives_smaller_batches_or_says_what_is_needed():
    checkpoints, tokens = [open_checkpoint(CHECKPOINT)], demo_tokens(64, 64)
    plan = plan_evaluation(checkpoints, tokens, torch.float32, 10**12)
    assert plan.batch_sequences == 64
    smaller = sum(plan.parts.values()) - 1
    assert plan_evaluation(checkpoints, tokens, torch.float32, smaller).batch_sequences <= 64
    with pytest.raises(OverBudgetError, match=r"with one sequence at a time.* --ram \d+"):
        plan_evaluation(checkpoints, tokens, torch.float32, 10**6)


def test_memory_stays_within_the_plan(tmp_path):
    folder, tokens = write_wide(tmp_path / "wide", 4), some_tokens(16, 256)
    checkpoints = [open_checkpoint(folder)] * 2
    plan = plan_evaluation(checkpoints, tokens, torch.float32, 10**12)
    with gauge(0.002) as meter:
        result = evaluate(
            checkpoints[0],
            tokens,
            tmp_path / "work",
            dtype=torch.float32,
            device=CPU,
            original=checkpoints[1],
            batch_sequences=plan.batch_sequences,
        )
    assert result.against.divergence.value == 0
    assert meter.highest <= sum(plan.parts.values())


def write_wide(folder, layers):
    """Write a model whose layers can be seen in the process's memory."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCABULARY,
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
