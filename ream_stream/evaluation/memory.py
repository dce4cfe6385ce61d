"""What an evaluation holds in memory, from headers, and the batch that fits a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.errors import OverBudgetError
from ream_stream.host_memory import anonymous_bytes
from ream_stream.model.meta_model import get_tensor
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.planning.activation_memory import Footprints
from ream_stream.planning.allocation import MAX_BATCH_TOKENS
from ream_stream.planning.memory import HEAP_SHARE, LIBRARY_BYTES
from ream_stream.units import format_size, size_option

from .evaluate import LOGITS_BYTES, RANK_TOKENS

_LOGITS_COPIES = {1: 3, 2: 10}
"""Multiples of `LOGITS_BYTES` for scoring, by number of checkpoints; float64 copies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPlan:
    """A batch and the memory that an evaluation with it takes."""

    batch_sequences: int
    """Sequences of a batch."""

    parts: Mapping[str, int]
    """Bytes of anonymous host memory by part; the sum is the planned peak."""

    hidden_bytes: int
    """Peak disk usage of hidden states in bytes."""


def plan_evaluation(
    checkpoints: Sequence[Checkpoint], tokens: Tokens, dtype: torch.dtype, ram: int
) -> EvaluationPlan:
    """Choose the largest batch that the budget allows.

    Parameters
    ----------
    checkpoints
        One, or two that are scored side by side.
    tokens
        What they predict.
    dtype
        What layers are run in.
    ram
        Budget of anonymous host memory, bytes.

    Raises
    ------
    OverBudgetError
        Not even one sequence at a time fits; the budget that works is told.
    """
    cpu = torch.device("cpu")
    footprints = [Footprints(StreamedModel(each, dtype, cpu)) for each in checkpoints]
    length = tokens.sequence_length
    batch = max(1, min(tokens.num_sequences, MAX_BATCH_TOKENS // length))
    parts = _parts(footprints, tokens, batch)
    while sum(parts.values()) > ram:
        if batch == 1:
            needed = sum(parts.values())
            raise OverBudgetError(
                f"the evaluation needs {format_size(needed)} of memory with one sequence at a "
                f"time, the budget is {format_size(ram)}; give --ram {size_option(needed)} or "
                "more, or shorter sequences (--sequence-length)"
            )
        batch = -(-batch // 2)
        parts = _parts(footprints, tokens, batch)
    width = footprints[0].model.hidden_size
    boundary = tokens.input_ids_SL.numel() * width * dtype.itemsize
    return EvaluationPlan(
        batch_sequences=batch, parts=parts, hidden_bytes=(len(checkpoints) + 1) * boundary
    )


def _parts(footprints: Sequence[Footprints], tokens: Tokens, batch: int) -> dict[str, int]:
    """Return the parts of the phase that takes most: a layer's run, or the scores."""
    length, ids = tokens.sequence_length, tokens.input_ids_SL.numel()
    runs, scores, dense = [], [], []
    for each in footprints:
        model = each.model
        row = length * model.hidden_size * model.dtype.itemsize
        # the states that enter, those of the next batch, and the last output
        runs.append(max(each.of(i, batch, length).run for i in each.kinds()) + 3 * batch * row)
        scores.append(2 * batch * row)
        dense.append(_layer_bytes(each))
    rank = min(RANK_TOKENS, ids) * _width(footprints[0]) * (4 + 3 * 8)
    scoring = sum(scores) + _LOGITS_COPIES[len(footprints)] * LOGITS_BYTES + rank
    running = max(run + held for run, held in zip(runs, dense, strict=True))
    phase = "score" if scoring > running else "propagate"
    working = max(scoring, running)
    return {
        "interpreter and libraries": anonymous_bytes() + LIBRARY_BYTES,
        "token ids": 3 * 8 * ids,
        f"work: {phase}": working,
        "kept by the heap": int(HEAP_SHARE * min(working, 8 * LOGITS_BYTES)),
    }


def _layer_bytes(footprints: Footprints) -> int:
    """Return the weights of a layer that are copied: all but its experts, and one of these."""
    model = footprints.model
    entries, itemsize = model.checkpoint.entries, model.dtype.itemsize
    sizes = []
    for layer in model.layers:
        held = sum(math.prod(layer.shape(name, entries)) for name in layer.dense_names())
        stack = layer.stack
        sizes.append(held + (3 * stack.hidden * stack.inner if stack else 0))
    return max(sizes) * itemsize


def _width(footprints: Footprints) -> int:
    embedding = footprints.model.model.get_input_embeddings()
    return int(get_tensor(embedding, "weight").shape[1])
