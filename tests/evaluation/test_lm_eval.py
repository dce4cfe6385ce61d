"""Multiple choice against lm-evaluation-harness itself, on the built-in checkpoint."""

import json

import pytest
import torch

from ream_stream.calibration.builtin import documents
from ream_stream.calibration.packing import load_tokenizer
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.evaluation.evaluate import evaluate
from ream_stream.evaluation.multiple_choice import accuracies, make_quiz, read_questions

pytestmark = pytest.mark.slow
COUNT = 60
TASK = {
    "task": "choices",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "train",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}


def questions():
    """Cut a text: how a piece of it goes on is a choice, and so is how others do."""
    words = " ".join(documents("general", "test")).split()
    pieces = [words[start : start + 40] for start in range(0, 40 * (COUNT + 3), 40)]
    for number in range(COUNT):
        # of different lengths, or there is nothing to divide by
        ends = [" ".join(pieces[number + n][25 : 28 + 4 * n]) for n in range(4)]
        order = [(n + number) % 4 for n in range(4)]
        yield {
            "question": " ".join(pieces[number][:25]),
            "choices": [ends[n] for n in order],
            "answer": order.index(0),
        }


def test_choices_are_scored_as_lm_evaluation_harness_scores_them(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in questions()), encoding="utf-8")
    theirs = lm_eval.simple_evaluate(
        "hf",
        f"pretrained={CHECKPOINT},dtype=float32",
        tasks=[{**TASK, "dataset_kwargs": {"data_files": str(path)}}],
        device="cpu",
        batch_size=8,
        bootstrap_iters=100,
    )
    asked = read_questions(path)
    quiz = make_quiz(asked, load_tokenizer(CHECKPOINT), max_length=256, description="cut text")
    ours = evaluate(
        open_checkpoint(CHECKPOINT),
        quiz.tokens,
        tmp_path / "work",
        dtype=torch.float32,
        device=torch.device("cpu"),
        target_SL=quiz.target_SL,
    )
    nats_S = ours.evaluation.loss.total_S
    likelihoods = [
        -likelihood
        for sample in sorted(theirs["samples"]["choices"], key=lambda each: each["doc_id"])
        for likelihood, _ in sample["filtered_resps"]
    ]
    assert nats_S == pytest.approx(likelihoods, rel=1e-5)
    found = theirs["results"]["choices"]
    for name, share in accuracies(asked, nats_S).items():
        assert share.value == found[f"{name},none"]
        assert share.stderr == pytest.approx(found[f"{name}_stderr,none"], rel=1e-9)
    # neither all nor none, and dividing by length makes a difference
    assert 0.1 < found["acc,none"] != found["acc_norm,none"] < 0.95
