"""Multiple-choice questions, scored by how likely each choice is after its question.

As lm-evaluation-harness does it for `multiple_choice` tasks:

- a choice's score is the log-likelihood of its tokens after the context's; its tokens are
  those of context + choice that come after as many as the context alone has, blanks at
  the end of the context belonging to the choice;
- `acc`: the choice of the highest score is the answer;
- `acc_norm`: the same with scores divided by the characters of the choice, the blank
  between context and choice not counted.

Ties go to the first choice; the standard error is s / sqrt(n) with n - 1 in s.

A file is JSON lines: ``{"question": "...", "choices": ["...", ...], "answer": 0}``.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ream_stream.calibration.packing import encoded
from ream_stream.calibration.tokens import Tokens, from_tensors
from ream_stream.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question."""

    context: str
    """Text before the choice."""

    choices: tuple[str, ...]
    """Two or more possible continuations; scoring puts a blank before each."""

    answer: int
    """Index of the right choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultipleChoiceSet:
    """Questions made into sequences, one a choice, padded at the end."""

    questions: tuple[Question, ...]
    """Questions in the order of the file."""

    tokens: Tokens
    """Sequences of all choices: those of the first question, then those of the second, ..."""

    target_SL: Tensor
    """Mask of the tokens of the choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A share of questions."""

    value: float
    """Share between 0 and 1."""

    stderr: float
    """Standard error of the share; NaN for a single question."""


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a file of questions.

    Raises
    ------
    UsageError
        It cannot be read, or a line of it is not a question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    questions = tuple(
        _question(line, f"{path}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not questions:
        raise UsageError(f"{path}: there are no questions in it")
    return questions


def make_quiz(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    description: str,
) -> MultipleChoiceSet:
    """Make the sequences of questions.

    Parameters
    ----------
    questions
        One or more.
    tokenizer
        Of the checkpoint.
    max_length
        Tokens of a sequence at most: longer ones lose tokens at their beginning.
    description
        Where the questions are from.

    Raises
    ------
    UsageError
        A choice is longer than a sequence, or has no tokens of its own.
    """
    pairs = []
    for number, question in enumerate(questions, start=1):
        for choice in question.choices:
            context, own = _encode(tokenizer, question.context, " " + choice)
            if not own or len(own) >= max_length:
                raise UsageError(
                    f"{description}: question {number} has a choice of {len(own)} tokens, "
                    f"sequences have {max_length}"
                )
            pairs.append((context[-(max_length - len(own)) :], own))
    length = max(len(context) + len(own) for context, own in pairs)
    ids_SL = torch.zeros(len(pairs), length, dtype=torch.int64)
    mask_SL, target_SL = torch.zeros_like(ids_SL), torch.zeros(ids_SL.shape, dtype=torch.bool)
    for row, (context, own) in enumerate(pairs):
        stop = len(context) + len(own)
        ids_SL[row, :stop] = torch.tensor([*context, *own])
        mask_SL[row, :stop] = 1
        target_SL[row, len(context) : stop] = True
    tensors = {"input_ids": ids_SL, "attention_mask": mask_SL}
    return MultipleChoiceSet(
        questions=tuple(questions),
        tokens=from_tensors(tensors, description=description),
        target_SL=target_SL,
    )


def accuracies(questions: Sequence[Question], nats_S: Sequence[float]) -> dict[str, Share]:
    """Return `acc` and `acc_norm` from the negative log-likelihood of each choice."""
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    start = 0
    for question in questions:
        count = len(question.choices)
        scores = [-nats for nats in nats_S[start : start + count]]
        # a choice of no characters has no tokens either, and was refused
        normed = [s / len(c) for s, c in zip(scores, question.choices, strict=True)]
        for name, each in (("acc", scores), ("acc_norm", normed)):
            right[name].append(float(each.index(max(each)) == question.answer))
        start += count
    return {name: _share(values) for name, values in right.items()}


def _share(values: Sequence[float]) -> Share:
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return Share(value=mean, stderr=math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Share(value=mean, stderr=math.sqrt(variance / count))


def _encode(
    tokenizer: PreTrainedTokenizerBase, context: str, choice: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and those of a choice after it."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, choice = context[:-blanks], context[-blanks:] + choice
    whole = encoded(tokenizer, context + choice)
    before = len(encoded(tokenizer, context))
    if not before:  # nothing comes before the choice but where a text begins
        start = tokenizer.bos_token_id
        return [tokenizer.eos_token_id if start is None else start], whole
    return whole[:before], whole[before:]


def _question(line: str, where: str) -> Question:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict) or not {"question", "choices", "answer"} <= set(value):
        raise UsageError(f"{where} has not the fields question, choices and answer")
    context, choices, answer = value["question"], value["choices"], value["answer"]
    if not isinstance(context, str) or not isinstance(choices, list) or len(choices) < 2:
        raise UsageError(f"{where}: question is text, choices a list of two or more")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise UsageError(f"{where}: a choice is not text")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UsageError(f"{where}: answer {answer!r} is not one of 0 to {len(choices) - 1}")
    return Question(context=context, choices=tuple(choices), answer=answer)
