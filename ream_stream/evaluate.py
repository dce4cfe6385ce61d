"""Perplexity of a checkpoint that does not fit in memory.

The model runs as it does in a compression: one layer at a time on all batches,
hidden states on disk between two layers. What leaves the last layer is scored
sequence by sequence, a bounded number of tokens at once, because the logits of
a batch are larger than any layer where the vocabulary is large.

Letters in shapes: S sequences, L tokens of a sequence, P scored positions,
H hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import durable
from .budget import MAX_BATCH_TOKENS
from .calibration.hidden import HiddenStates, HiddenWriter
from .calibration.tokens import Tokens
from .checkpoint.source import Checkpoint
from .errors import InterruptedRunError, ReamStreamError, UsageError
from .events import Phase, Step
from .families import family_of
from .model import Batch, StreamedModel
from .skeleton import get_tensor
from .stream import Batches, advance

LOGITS_BYTES = 64_000_000
"""Logits that exist at once, as float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How well a checkpoint predicts a token set."""

    predicted: int
    """Tokens scored."""

    nats: float
    """Mean negative log-likelihood of a token."""

    stderr: float
    """Standard error of `nats`, sequences being independent; NaN for a single sequence."""

    nats_S: tuple[float, ...]
    """Summed negative log-likelihood, by sequence."""

    predicted_S: tuple[int, ...]
    """Tokens scored, by sequence."""

    @property
    def perplexity(self) -> float:
        """Return exp(nats)."""
        return math.exp(self.nats) if self.nats < 709 else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much worse one checkpoint predicts a token set than another."""

    nats: float
    """Difference of the means; positive is worse."""

    stderr: float
    """Its standard error; NaN for a single sequence."""


def evaluate(
    checkpoint: Checkpoint,
    tokens: Tokens,
    work: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    stop_requested: Callable[[], int | None] = lambda: None,
) -> Iterator[Step | Evaluation]:
    """Score a checkpoint on tokens.

    Parameters
    ----------
    checkpoint
        A source or an output.
    tokens
        What it is to predict. A token is scored if neither it nor the one
        before it is padding.
    work
        Folder for hidden states: two boundaries at most, in a folder of their own
        that is removed at the end.
    dtype
        What the model is run in: the result is then that of
        ``from_pretrained(..., dtype=dtype)``.
    device
        Where it is run.
    stop_requested
        Asked after every batch; the number of a signal ends the evaluation.

    Yields
    ------
    Step or Evaluation
        Progress (phase ``propagate`` by batch, then ``score`` by sequence), and the
        result as the last one.

    Raises
    ------
    UnsupportedModelError
        The model cannot be driven layer by layer.
    UsageError
        The tokens are not of this model's vocabulary, or none can be scored.
    ReamStreamError
        The model gives numbers that are not finite.
    OtherRunError
        Another evaluation uses the work folder.
    InterruptedRunError
        A stop was requested.
    """
    family_of(checkpoint.config)
    target_SL = scored(tokens)
    if not bool(target_SL.any()):
        raise UsageError(f"{tokens.description}: no token has a token before it to predict it")
    model = StreamedModel(checkpoint, dtype, device)
    vocabulary, width = get_tensor(model.model.get_input_embeddings(), "weight").shape
    if int(tokens.input_ids_SL.max()) >= vocabulary:
        raise UsageError(
            f"{tokens.description}: it holds token {int(tokens.input_ids_SL.max())}, the "
            f"checkpoint knows 0 to {vocabulary - 1}; it is from another tokenizer"
        )
    job = _Job(model, tokens, target_SL, block=max(1, LOGITS_BYTES // (4 * vocabulary)))
    with _scratch(work) as folder, model.open_outside():
        for event in job.events(folder, width):
            yield event
            _check_stop(stop_requested)


def scored(tokens: Tokens) -> Tensor:
    """Return which tokens are scored, (S, L): those that follow a token and are no padding."""
    mask_SL = tokens.attention_mask_SL
    real_SL = (
        torch.ones_like(tokens.input_ids_SL, dtype=torch.bool)
        if mask_SL is None
        else mask_SL.bool()
    )
    target_SL = torch.zeros_like(real_SL)
    target_SL[:, 1:] = real_SL[:, 1:] & real_SL[:, :-1]
    return target_SL


def summarize(nats_S: Tensor, predicted_S: Tensor) -> Evaluation:
    """Return mean and standard error over sequences of unequal lengths.

    The mean is a ratio of sums, so its error is that of a ratio estimator; with
    sequences of equal length it is their standard deviation over sqrt(S).
    """
    total = int(predicted_S.sum())
    mean = float(nats_S.sum()) / total
    return Evaluation(
        predicted=total,
        nats=mean,
        stderr=_stderr(nats_S - mean * predicted_S, total),
        nats_S=tuple(nats_S.tolist()),
        predicted_S=tuple(predicted_S.tolist()),
    )


def difference(evaluation: Evaluation, baseline: Evaluation) -> Difference:
    """Compare two checkpoints on the same tokens, sequence by sequence.

    Most of the spread between sequences is common to both, so this error is far
    smaller than the errors of the two means.

    Raises
    ------
    ValueError
        They were not scored on the same tokens.
    """
    if evaluation.predicted_S != baseline.predicted_S:
        raise ValueError("the two evaluations scored different tokens")
    nats_S = torch.tensor(evaluation.nats_S, dtype=torch.float64)
    paired = summarize(
        nats_S - torch.tensor(baseline.nats_S, dtype=torch.float64),
        torch.tensor(evaluation.predicted_S),
    )
    return Difference(nats=paired.nats, stderr=paired.stderr)


def _stderr(residual_S: Tensor, total: int) -> float:
    count = len(residual_S)
    if count < 2:
        return math.nan
    return math.sqrt(count / (count - 1) * float(residual_S.square().sum())) / total


class _Job:
    """One evaluation; `block` positions are scored at once."""

    def __init__(
        self, model: StreamedModel, tokens: Tokens, target_SL: Tensor, *, block: int
    ) -> None:
        self.model, self.tokens, self.target_SL, self.block = model, tokens, target_SL, block
        rows = max(1, MAX_BATCH_TOKENS // tokens.sequence_length)
        self.batches = Batches(tokens, min(tokens.num_sequences, rows))

    def events(self, folder: Path, width: int) -> Iterator[Step | Evaluation]:
        """Run all layers, then score what leaves the last."""
        model, size = self.model, self.batches.size
        shape = (self.tokens.num_sequences, self.tokens.sequence_length, width)
        hidden: HiddenStates | None = None
        for index in range(model.num_layers):
            path = folder / str(index + 1)
            leaving = HiddenWriter(path, shape, model.dtype, size)
            with model.open_layer(index):
                for done in advance(model, index, self.batches, hidden, leaving):
                    yield self._step(index, "propagate", done, len(self.batches))
            hidden = HiddenStates(path, shape, model.dtype, size)
            durable.remove(folder / str(index))
        assert hidden is not None
        nats_S = torch.zeros(self.tokens.num_sequences, dtype=torch.float64)
        for row, (sequence, state_LH) in enumerate(_sequences(self.batches, hidden)):
            nats_S[row] = self._nats(sequence, state_LH[None], self.target_SL[row])
            if not bool(nats_S[row].isfinite()):
                raise ReamStreamError(
                    f"what the model predicts for sequence {row} of {self.tokens.description} "
                    f"is not finite in {model.dtype}; verify the checkpoint, or use float32"
                )
            yield self._step(model.num_layers - 1, "score", row + 1, len(nats_S))
        yield summarize(nats_S, self.target_SL.sum(dim=1))

    def _nats(self, sequence: Batch, hidden_1LH: Tensor, target_L: Tensor) -> float:
        """Return the summed negative log-likelihood of one sequence's scored tokens."""
        nats = 0.0
        for target_P in torch.split(target_L.nonzero().squeeze(1), self.block):
            logits_PV = self.model.logits(sequence, hidden_1LH, target_P - 1)[0].float()
            token_P = sequence.input_ids_BL[0, target_P].to(logits_PV.device)
            chosen_P = logits_PV.gather(1, token_P[:, None]).squeeze(1)
            nats += float((logits_PV.logsumexp(dim=1).double() - chosen_P.double()).sum())
        return nats

    def _step(self, index: int, phase: Phase, done: int, total: int) -> Step:
        return Step(layer=index, phase=phase, done=done, total=total)


def _sequences(batches: Batches, hidden: HiddenStates) -> Iterator[tuple[Batch, Tensor]]:
    """Yield every sequence as a batch of its own, with the states that leave the last layer."""
    for number, batch in enumerate(batches):
        mask_BL = batch.attention_mask_BL
        for row, state_LH in enumerate(hidden.read(number)):
            one = slice(row, row + 1)
            sequence = Batch(
                input_ids_BL=batch.input_ids_BL[one],
                attention_mask_BL=None if mask_BL is None else mask_BL[one],
            )
            yield sequence, state_LH


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    """Give an empty folder for the block, and remove it whatever happens.

    What a killed evaluation left in it goes with the next one.
    """
    folder = work / "evaluate"
    durable.make_directory(folder)
    with durable.lock(folder / "lock"):
        try:
            for path in folder.iterdir():
                if path.name != "lock":
                    durable.remove(path)
            yield folder
        finally:
            durable.remove(folder)


def _check_stop(stop_requested: Callable[[], int | None]) -> None:
    number = stop_requested()
    if number is not None:
        raise InterruptedRunError(
            "stopped; an evaluation keeps nothing, run it again from the start",
            signal_number=number,
        )
