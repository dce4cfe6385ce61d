"""States of batches, stored in parts of their columns that are solved one after another.

Letters in shapes: T tokens of a batch, H hidden, X columns of a part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ream_stream.model.batch_store import BatchStore


class ColumnStore:
    """States (T, H) by batch; a part of their columns is read alone.

    Parameters
    ----------
    store
        A place for each part of each batch.
    parts
        The parts; the first is the largest.
    """

    def __init__(self, store: BatchStore, parts: Sequence[slice]) -> None:
        self._store, self._parts = store, parts

    def put(self, number: int, states_TH: Tensor) -> None:
        """Keep the states of a batch, in the place of those that were kept before."""
        states_TH = states_TH.flatten(0, -2)
        for part, columns in enumerate(self._parts):
            some_TX = states_TH if len(self._parts) == 1 else states_TH[:, columns].contiguous()
            self._store.put(number * len(self._parts) + part, some_TX)

    def get(self, number: int) -> Tensor:
        """Return the states of a batch, (T, H)."""
        count = len(self._parts)
        parts = [self._store.get(number * count + part) for part in range(count)]
        return parts[0] if count == 1 else torch.cat(parts, dim=1)

    def columns(self, number: int, columns: slice) -> Tensor:
        """Return a part of the columns of a batch's states, (T, X)."""
        return self._store.get(number * len(self._parts) + self._parts.index(columns))

    def drop(self, number: int) -> None:
        """Let go of the states of a batch."""
        for part in range(len(self._parts)):
            self._store.drop(number * len(self._parts) + part)
