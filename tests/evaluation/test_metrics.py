"""Means, errors, divergences, ranks and multiple choice, by hand."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ream_stream.calibration.packing import load_tokenizer
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.errors import UsageError
from ream_stream.evaluation.metrics import (
    Evaluation,
    Mean,
    divergence,
    effective_rank,
    finite,
    score,
)
from ream_stream.evaluation.multiple_choice import (
    Question,
    accuracies,
    make_quiz,
    read_questions,
)


def mean(total, count):
    return Mean(total_S=tuple(total), count_S=tuple(count))


def test_mean_and_error_by_hand():
    equal = mean([6.0, 2.0, 4.0], [2, 2, 2])
    # means of 3, 1 and 2: their deviation is 1, its error 1 / sqrt(3)
    assert (equal.count, equal.value) == (6, 2.0)
    assert equal.stderr == pytest.approx(1 / math.sqrt(3))
    # mean 10 / 5 = 2, residuals 1 - 2 * 1 = -1 and 9 - 2 * 4 = 1: sqrt(2 / 1 * 2) / 5
    assert mean([1.0, 9.0], [1, 4]).stderr == pytest.approx(2 / 5)
    assert math.isnan(mean([1.0], [1]).stderr)
    assert math.isnan(mean([0.0], [0]).value)


def test_a_difference_is_taken_sequence_by_sequence():
    count = [2, 2, 2]
    base, worse = mean([2.0, 20.0, 200.0], count), mean([3.0, 21.0, 201.0], count)
    assert worse.minus(base).value == pytest.approx(0.5)
    assert worse.minus(base).stderr == pytest.approx(0.0, abs=1e-12)
    assert worse.stderr > 10
    with pytest.raises(ValueError, match="different tokens"):
        worse.minus(mean([3.0], [6]))


def test_a_perplexity_beyond_floating_point_is_infinite_and_no_number_in_json():
    huge = Evaluation(loss=mean([5000.0], [1]), accuracy=mean([0.0], [1]))
    assert huge.perplexity == math.inf
    assert huge.facts()["perplexity"] is None
    assert (finite(math.nan), finite(1.5)) == (None, 1.5)


def test_nats_and_tops_by_hand():
    logits_PV = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]])
    nats, correct = score(logits_PV, torch.tensor([1, 1]))
    # 1 - 1/4 of the first, a half of the second, whose top is token 0
    assert nats == pytest.approx(math.log(4 / 3) + math.log(2))
    assert correct == 1


def test_a_divergence_by_hand():
    original_PV = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    logits_PV = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log() + 3  # a shift changes nothing
    nats, same = divergence(original_PV, logits_PV)
    assert nats == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    assert same == 1


def test_the_effective_rank_by_hand():
    # singular values 3 and 1: shares 3/4 and 1/4
    hidden_nH = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(hidden_nH) == pytest.approx(math.exp(entropy))
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.zeros(2, 2)) == 0


@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.01, 100))
def test_the_effective_rank_ignores_scale_rotation_and_order(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    hidden_nH = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    turn_HH, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    turned = factor * hidden_nH[torch.randperm(7, generator=generator)] @ turn_HH
    rank = effective_rank(hidden_nH)
    assert 1 <= rank <= 4
    assert effective_rank(turned) == pytest.approx(rank)


QUESTIONS = (
    Question(context="Q: 1 + 1?\nA:", choices=("2", "eleven"), answer=0),
    Question(context="Q: Sky?\nA:", choices=("blue", "no"), answer=1),
)


def test_accuracies_by_hand():
    # first: 3 < 4 nats; by character 3/1 > 4/6. Second: 8 > 5; by character 8/4 < 5/2.
    found = accuracies(QUESTIONS, [3.0, 4.0, 8.0, 5.0])
    assert found["acc"].value == 1
    assert found["acc_norm"].value == 0
    assert found["acc"].stderr == 0
    # the first choice wins a tie
    tie = accuracies(QUESTIONS, [4.0, 4.0, 5.0, 5.0])["acc"]
    assert tie.value == 0.5
    # deviations of 1/2: variance 1/2, over 2 questions
    assert tie.stderr == pytest.approx(math.sqrt(0.5 / 2))
    assert math.isnan(accuracies(QUESTIONS[:1], [3.0, 4.0])["acc"].stderr)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


def test_a_choice_is_the_tokens_after_those_of_its_context(tokenizer):
    asked = (*QUESTIONS, Question(context="Blank at the end ", choices=("a", "b"), answer=0))
    quiz = make_quiz(asked, tokenizer, max_length=64, description="quiz")
    texts = [f"{q.context} {choice}" for q in asked for choice in q.choices]
    mask_SL = quiz.tokens.attention_mask_SL
    for row, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        context = asked[row // 2].context.rstrip()
        before = len(tokenizer(context)["input_ids"])
        assert quiz.tokens.input_ids_SL[row, : len(ids)].tolist() == ids
        assert int(mask_SL[row].sum()) == len(ids)
        expected = [before <= n < len(ids) for n in range(mask_SL.shape[1])]
        assert quiz.target_SL[row].tolist() == expected


def test_a_long_context_loses_its_beginning(tokenizer):
    long = Question(context="word " * 100 + "end", choices=("one", "two"), answer=0)
    quiz = make_quiz([long], tokenizer, max_length=16, description="quiz")
    assert quiz.tokens.sequence_length == 16
    ids = tokenizer(long.context + " one")["input_ids"]
    assert quiz.tokens.input_ids_SL[0].tolist() == ids[-16:]
    with pytest.raises(UsageError, match="question 1 has a choice of"):
        make_quiz([long], tokenizer, max_length=1, description="quiz")


BAD_QUESTIONS = {
    "{": "line 1 is not JSON",
    '{"question": "a", "choices": ["b", "c"]}': "has not the fields",
    '{"question": "a", "choices": ["b"], "answer": 0}': "a list of two or more",
    '{"question": "a", "choices": ["b", ""], "answer": 0}': "a choice is not text",
    '{"question": "a", "choices": ["b", "c"], "answer": 2}': "not one of 0 to 1",
    '{"question": "a", "choices": ["b", "c"], "answer": true}': "not one of 0 to 1",
    "\n": "there are no questions",
}


@pytest.mark.parametrize("line", BAD_QUESTIONS)
def test_what_is_no_question_is_refused_with_the_reason(tmp_path, line):
    path = tmp_path / "quiz.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(UsageError, match=BAD_QUESTIONS[line]):
        read_questions(path)


def test_questions_come_back_from_a_file(tmp_path):
    path = tmp_path / "quiz.jsonl"
    lines = [
        json.dumps({"question": q.context, "choices": q.choices, "answer": q.answer, "id": 3})
        for q in QUESTIONS
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_questions(path) == QUESTIONS
