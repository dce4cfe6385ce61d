"""What a checkpoint that does not fit in memory predicts, alone or beside its original.

The model runs as it does in a compression: one layer at a time on all batches,
hidden states on disk between two layers. What leaves the last layer is scored
sequence by sequence, a bounded number of tokens at once, because the logits of
a batch are larger than any layer where the vocabulary is large.

Letters in shapes: S sequences, L tokens of a sequence, P scored positions,
H hidden, V vocabulary, n sampled positions.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ream_stream import files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.compression.file_lock import LOCK, MARK, claimed
from ream_stream.errors import InterruptedRunError, ReamStreamError, UsageError
from ream_stream.events import Report, Step, no_report
from ream_stream.model.batches import Batches
from ream_stream.model.families import family_of
from ream_stream.model.hidden_states import HiddenStates
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.model.streamed_model import Batch
from ream_stream.planning.allocation import MAX_BATCH_TOKENS

from .forward import ForwardRun
from .metrics import Against, Evaluation, Mean, divergence, effective_rank, score

LOGITS_BYTES = 64_000_000
"""Most bytes of one model's float32 logits at once."""

RANK_TOKENS = 4096
"""Most positions that the effective rank is computed from, evenly spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Result of an evaluation."""

    evaluation: Evaluation
    """Evaluation of the checkpoint."""

    against: Against | None
    """Comparison with the original; None if no original was given."""

    def only(self, rows: Sequence[int]) -> "Result":
        """Return the result of some of the sequences, such as those of one domain."""
        return Result(
            evaluation=self.evaluation.only(rows),
            against=self.against.only(rows) if self.against else None,
        )

    def by_domain(self, tokens: Tokens) -> dict[str, "Result"]:
        """Return the result of each domain of the tokens; empty if there is one."""
        if len(tokens.domains) < 2:
            return {}
        return {
            name: self.only((tokens.domain_S == number).nonzero().squeeze(1).tolist())
            for number, name in enumerate(tokens.domains)
        }

    def facts(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them."""
        return self.evaluation.facts() | (self.against.facts() if self.against else {})


def evaluate(
    checkpoint: Checkpoint,
    tokens: Tokens,
    work: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    original: Checkpoint | None = None,
    target_SL: Tensor | None = None,
    batch_sequences: int | None = None,
    keep_original: bool = False,
    report: Report = no_report,
    ranks: Ranks = ALONE,
) -> Result:
    """Score a checkpoint on tokens; stopped or killed, the same call goes on.

    Parameters
    ----------
    checkpoint
        A source or an output.
    tokens, work
        What it is to predict; folder for hidden states, two boundaries of each checkpoint, in a
        folder that goes.
    dtype, device
        What the model is run in and where, as ``from_pretrained(..., dtype=dtype)``.
    original
        The checkpoint it is compared with, on the same tokens.
    target_SL
        Which tokens are scored; by default those that `scored` gives.
    batch_sequences
        Sequences run together; by default as many as give `MAX_BATCH_TOKENS`.
    keep_original
        Leave what the original's last layer gave, or the checkpoint's if it is alone, in the
        work folder for the next evaluation; the caller removes it.
    report, ranks
        Told each checkpoint, its phase ``propagate`` by batch, and ``score`` by sequence;
        processes that divide the batches, and see the same folder.

    Raises
    ------
    ReamStreamError
        The model cannot be run or gives numbers that are not finite; the tokens are not of its
        vocabulary; the folder is in use; `report` asked to stop.
    """
    checkpoints = [checkpoint] if original is None else [checkpoint, original]
    for each in checkpoints:
        family_of(each.config)
    target_SL = scored(tokens) if target_SL is None else target_SL
    if not bool(target_SL.any()):
        raise UsageError(f"{tokens.description}: no token has a token before it to predict it")
    rows = batch_sequences or max(1, MAX_BATCH_TOKENS // tokens.sequence_length)
    batch = min(tokens.num_sequences, rows)
    folder = work / "evaluate"
    passages = [
        ForwardRun(each, tokens, folder, batch=batch, dtype=dtype, device=device, ranks=ranks)
        for each in checkpoints
    ]
    kept = passages[-1:] if keep_original else []
    with _scratch(folder, passages, keep=kept, ranks=ranks):
        return _Job(passages, tokens, target_SL, ranks).run(report)


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


class _Job:
    """The passages of one evaluation, and the scores of what leaves them."""

    def __init__(
        self, passages: Sequence[ForwardRun], tokens: Tokens, target_SL: Tensor, ranks: Ranks
    ) -> None:
        self.passages, self.tokens, self.target_SL = passages, tokens, target_SL
        self.ranks = ranks
        vocabulary = max(passage.vocabulary for passage in passages)
        self.block = max(1, LOGITS_BYTES // (4 * vocabulary))
        self.stride = -(-int(target_SL.sum()) // RANK_TOKENS)
        count_S = target_SL.sum(dim=1)
        self.before = (count_S.cumsum(0) - count_S).tolist()
        self.seen = self.row = 0
        self.sampled: list[tuple[int, Tensor]] = []

    def run(self, report: Report) -> Result:
        """Run all layers, then score what leaves the last."""
        leaving = []
        for passage in self.passages:
            with passage.model.open_outside():
                leaving.append(passage.run(report))
        sequences, last = self.tokens.num_sequences, self.passages[0].model.num_layers - 1
        # nats and correct of each checkpoint; divergence and agreement of both
        own: list[tuple[int, list[float]]] = []
        with ExitStack() as stack:
            for passage in self.passages:
                stack.enter_context(passage.model.open_outside())
            stack.enter_context(self._capturing())
            for row, sequence, hidden in _sequences(self.passages[0].batches, leaving):
                self.row, self.seen = row, self.before[row]
                own.append((row, self._sums(sequence, hidden, self.target_SL[row], row)))
                report(Step(layer=last, phase="score", done=row + 1, total=sequences))
        found = sorted(each for part in self.ranks.gather(own) for each in part)
        return self._result([sums for _, sums in found], self._all_sampled())

    def _all_sampled(self) -> Tensor:
        """Return what all ranks sampled, in the order of sequences."""
        told = [torch.tensor([row for row, _ in self.sampled]), *(t for _, t in self.sampled)]
        found: list[tuple[int, int, Tensor]] = []
        for row_n, *parts in self.ranks.gather_tensors(told):
            found += zip(row_n.tolist(), range(len(parts)), parts, strict=True)
        return torch.cat([part for *_, part in sorted(found, key=lambda each: each[:2])])

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """Sample what enters the first checkpoint's output matrix, for the block."""
        model: Any = self.passages[0].model.model
        head = model.get_output_embeddings()

        def take(_module: Any, args: Any) -> None:  # noqa: ANN401
            hidden_PH = args[0][0]
            first = -self.seen % self.stride
            some_PH = hidden_PH[first :: self.stride].to("cpu", torch.float32)
            self.sampled.append((self.row, some_PH))
            self.seen += len(hidden_PH)

        handle = head.register_forward_pre_hook(take)
        try:
            yield
        finally:
            handle.remove()

    def _sums(
        self, sequence: Batch, hidden: Sequence[Tensor], target_L: Tensor, row: int
    ) -> list[float]:
        sums = [0.0] * (2 if len(self.passages) == 1 else 6)
        for target_P in torch.split(target_L.nonzero().squeeze(1), self.block):
            logits = [
                passage.model.logits(sequence, state_LH[None], target_P - 1)[0].float()
                for passage, state_LH in zip(self.passages, hidden, strict=True)
            ]
            found: list[float] = []
            for logits_PV in logits:
                token_P = sequence.input_ids_BL[0, target_P].to(logits_PV.device)
                found += score(logits_PV, token_P)
            if len(logits) > 1:
                found += divergence(logits[1], logits[0])
            sums = [total + each for total, each in zip(sums, found, strict=True)]
        if not all(map(math.isfinite, sums)):
            raise ReamStreamError(
                f"what the model predicts for sequence {row} of {self.tokens.description} "
                f"is not finite in {self.passages[0].model.dtype}; verify the checkpoint, or "
                "use float32"
            )
        return sums

    def _result(self, sums: Sequence[Sequence[float]], sampled_nH: Tensor) -> Result:
        count_S = tuple(self.target_SL.sum(dim=1).tolist())
        means = [
            Mean(total_S=tuple(total_S), count_S=count_S) for total_S in zip(*sums, strict=True)
        ]
        evaluation = Evaluation(
            loss=means[0], accuracy=means[1], rank=effective_rank(sampled_nH)
        )
        if len(means) == 2:
            return Result(evaluation=evaluation, against=None)
        against = Against(
            original=Evaluation(loss=means[2], accuracy=means[3]),
            loss=means[0].minus(means[2]),
            divergence=means[4],
            agreement=means[5],
        )
        return Result(evaluation=evaluation, against=against)


def _sequences(
    batches: Batches, states: Sequence[HiddenStates]
) -> Iterator[tuple[int, Batch, list[Tensor]]]:
    """Yield own sequences by number, each a batch, with what leaves the last layers (L, H)."""
    for number, batch in zip(batches.own, batches, strict=True):
        mask_BL = batch.attention_mask_BL
        read = [each.read(number) for each in states]
        for row in range(len(batch.input_ids_BL)):
            one = slice(row, row + 1)
            sequence = Batch(
                input_ids_BL=batch.input_ids_BL[one],
                attention_mask_BL=None if mask_BL is None else mask_BL[one],
            )
            yield number * batches.size + row, sequence, [each_BLH[row] for each_BLH in read]


@contextmanager
def _scratch(
    folder: Path, passages: Sequence[ForwardRun], *, keep: Sequence[ForwardRun], ranks: Ranks
) -> Iterator[None]:
    """Lock the folder for the block, which may go on with what an earlier one left there.

    At the end all is removed but what is to be kept, or, if the block was interrupted,
    what it may go on with. What belongs to other evaluations goes at once. Rank 0 does it.
    """
    if not ranks.is_first:
        ranks.gather(None)
        yield
        ranks.gather(None)
        return
    with claimed(folder):
        stays = {passage.folder for passage in passages}
        try:
            _remove_others(folder, stays)
            ranks.gather(None)
            yield
            ranks.gather(None)
        except InterruptedRunError:
            raise
        except BaseException:
            stays = set()
            raise
        else:
            stays = {passage.folder for passage in keep}
        finally:
            _remove_others(folder, stays)
            if not stays:
                files.remove(folder)


def _remove_others(folder: Path, stays: set[Path]) -> None:
    for path in folder.iterdir():
        if path.name not in {LOCK, MARK} and path not in stays:
            files.remove(path)
