"""Slices of experts held against the experts they were cut from.

Letters in shapes: W width of a slice, I inner, H hidden.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ream_stream.checkpoint.expert_stack import ExpertStack, Slot, Tensors


class SliceRows:
    """Finds the neurons of slices among those of their source experts, by their bytes.

    A slice has whole rows of its expert's gate and up projection, in increasing order, and no
    neuron is in two slices.

    Parameters
    ----------
    new, old
        Experts of the output, and of the source.
    owners
        Source expert of each slice, in increasing order.
    """

    def __init__(self, new: ExpertStack, old: ExpertStack, owners: Sequence[int]) -> None:
        self._new, self._old, self._owners = new, old, owners
        self._up = next(n for n, m in enumerate(new.matrices) if "up" in m.parts)
        self._found: dict[int, Tensor] = {}

    def pieces(
        self, slot: Slot, ours: Tensors, theirs: Tensors
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each part of a tensor of slices, and the rows that it should have."""
        numbers = range(slot.count) if slot.expert is None else (slot.expert,)
        for number in numbers:
            neuron_W = self._neurons(number, ours, theirs)
            have = self._new.matrices[slot.matrix].read(ours, number, torch.float32)
            want = self._old.matrices[slot.matrix].read(
                theirs, self._owners[number], torch.float32
            )
            for part, rows in have.items():
                yield rows, want[part][neuron_W]

    def _neurons(self, number: int, ours: Tensors, theirs: Tensors) -> Tensor:
        """Return the neurons of a slice, (W,); none where they are not found in order."""
        if number not in self._found:
            owner = self._owners[number]
            up_IH = self._old.matrices[self._up].read(theirs, owner, torch.float32)["up"]
            places = {row: n for n, row in reversed(list(enumerate(_rows(up_IH))))}
            up_WH = self._new.matrices[self._up].read(ours, number, torch.float32)["up"]
            found = [places.get(row, -1) for row in _rows(up_WH)]
            first = self._owners.index(owner)
            taken = {n for other in range(first, number) for n in self._taken(other)}
            good = found == sorted(found) and found[0] >= 0 and taken.isdisjoint(found)
            self._found[number] = torch.tensor(found if good else [], dtype=torch.int64)
        return self._found[number]

    def _taken(self, number: int) -> list[int]:
        return self._found[number].tolist() if number in self._found else []


def _rows(matrix: Tensor) -> list[bytes]:
    """Return the bytes of each row."""
    bits = matrix.contiguous().view(torch.uint8)
    return [row.tobytes() for row in bits.numpy()]
