"""Numbers that are not finite: found where they appear, and kept out of the statistics.

NaN or infinite weights end a run: no calibration could tell what they are. A calibration
sequence whose states overflow is left out from the layer on in which that happens: its
tokens count no more, and its states go on as zeros, so that nothing of it reaches another
sequence. The journal keeps which ones, so that a resumed run leaves out the same.

Letters in shapes: B sequences of a batch, L tokens of a sequence, T tokens of a batch.
"""

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import MappedTensors
from ream_stream.errors import NumbersError

from .hidden_states import HiddenWriter
from .ranks.group import Ranks

BLOCK_ELEMENTS = 1 << 22
"""Numbers that are checked at once; types that are not native floats are copied."""

MOST_EXCLUDED = 0.1
"""Largest share of excluded calibration sequences; a larger one is no accident of a text."""

_NATIVE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_FIRST_NOT_FINITE = {
    torch.float8_e4m3fn: (0x7F, 0xFF),
    torch.float8_e5m2: (0x7C, 0xFC),
    torch.float8_e8m0fnu: (0x80, 0xFF),
}
"""Smallest byte that is not finite among those of positive and of negative numbers.

All that are larger, up to the sign, are not finite either; 0x80 is above all positive ones.
"""

_ALWAYS_FINITE = frozenset({torch.float4_e2m1fn_x2})


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds finite numbers only; those of other types always do."""
    if not tensor.dtype.is_floating_point or tensor.dtype in _ALWAYS_FINITE:
        return True
    return all(map(_is_finite, torch.split(tensor.reshape(-1), BLOCK_ELEMENTS)))


def not_finite(
    tensors: MappedTensors, names: Iterable[str], heard: Callable[[str, Tensor], None]
) -> Iterator[tuple[str, bool]]:
    """Yield each tensor's name, and whether it holds NaN or infinite numbers.

    `heard` is given all its values before, block by block.
    """
    for name in names:
        bad = False
        for block in torch.split(tensors[name].reshape(-1), BLOCK_ELEMENTS):
            heard(name, block)
            bad = not is_finite(block) or bad
        yield name, bad


class ExcludedSequences:
    """Calibration sequences that are left out, in a run so far.

    Parameters
    ----------
    tokens
        The calibration set.
    found
        Sequences that the journal has as excluded.
    """

    def __init__(self, tokens: Tokens, found: Iterable[int] = ()) -> None:
        self._tokens, self._found = tokens, set(found)

    def __iter__(self) -> Iterator[int]:
        """Yield them in order."""
        yield from sorted(self._found)

    def __len__(self) -> int:
        """Return the number of excluded sequences."""
        return len(self._found)

    def kept(self, first: int, count: int) -> Tensor | None:
        """Return which of `count` sequences from `first` on are kept, (B,); None for all."""
        if not self._found:
            return None
        return torch.tensor([first + row not in self._found for row in range(count)])

    def note(self, layer: int, first: int, bad_B: Tensor) -> None:
        """Leave out the marked sequences of a batch that begins with sequence `first`.

        Raises
        ------
        NumbersError
            More than `MOST_EXCLUDED` of all are left out then.
        """
        self._found |= {first + row for row in bad_B.nonzero().flatten().tolist()}
        self._check(layer)

    def join(self, layer: int, ranks: Ranks) -> None:
        """Leave out what any rank leaves out.

        Raises
        ------
        NumbersError
            As `note` does.
        """
        if ranks.size > 1:
            self._found = set().union(*ranks.gather(sorted(self._found)))
            self._check(layer)

    def _check(self, layer: int) -> None:
        total = self._tokens.num_sequences
        if len(self._found) > MOST_EXCLUDED * total:
            raise NumbersError(
                f"layer {layer}: the states of {len(self._found)} of {total} calibration "
                f"sequences are not finite, the first is number {min(self._found)}; up to "
                f"{MOST_EXCLUDED:.0%} are left out; --compute-dtype float32 has more range"
            )

    def bad_rows(self, first: int, state_BLX: Tensor) -> Tensor | None:
        """Return which sequences of a batch have tokens with such numbers, (B,); None for none.

        Padding is not looked at.
        """
        if is_finite(state_BLX):
            return None
        bad_BL = ~state_BLX.isfinite().all(dim=-1).cpu()
        mask_SL = self._tokens.attention_mask_SL
        if mask_SL is not None:
            bad_BL &= mask_SL[first : first + len(bad_BL)].bool()
        bad_B = bad_BL.any(dim=1)
        return bad_B if bool(bad_B.any()) else None


class CheckedWriter:
    """Writes states as a `HiddenWriter` does, those of excluded sequences as zeros."""

    def __init__(
        self, writer: HiddenWriter, excluded: ExcludedSequences, layer: int, batch: int
    ) -> None:
        self._writer, self._excluded = writer, excluded
        self._layer, self._batch = layer, batch

    def __enter__(self) -> Self:
        """Enter the block at whose end the thread that writes ends."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread."""
        self._writer.__exit__(kind, error, traceback)

    def write(self, index: int, hidden_BLH: Tensor) -> None:
        """Store the states of batch `index`, as `HiddenWriter.write` does."""
        first = index * self._batch
        bad_B = self._excluded.bad_rows(first, hidden_BLH)
        if bad_B is not None:
            self._excluded.note(self._layer, first, bad_B)
            hidden_BLH = hidden_BLH.masked_fill(bad_B.to(hidden_BLH.device)[:, None, None], 0)
        self._writer.write(index, hidden_BLH)

    def publish(self) -> None:
        """Make the store durable and give it its name."""
        self._writer.publish()


def _is_finite(block: Tensor) -> bool:
    if not len(block):
        return True
    if block.dtype in _FIRST_NOT_FINITE:
        # as signed bytes the largest are the positive numbers, without a sign the negative ones
        positive, negative = _FIRST_NOT_FINITE[block.dtype]
        signed, unsigned = block.view(torch.int8).max(), block.view(torch.uint8).max()
        return int(signed) < positive and int(unsigned) < negative
    # a NaN is both the smallest and the largest number; thirty times as fast as isfinite
    lowest, highest = torch.aminmax(block if block.dtype in _NATIVE else block.float())
    return bool(lowest.isfinite() & highest.isfinite())
