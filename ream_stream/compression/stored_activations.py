"""Expert activations of a refitted layer in stores by batch, in memory or on disk.

A device that cannot keep a layer's experts, or a page cache that cannot, gets them block by
block, each once: a block's activations on all batches are stored before the next is read, and
no later pass needs gate and up projections.

Letters in shapes: R rows of one expert, I inner, T tokens of a set of rows.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ream_stream.method.normal_equations import RoutedActivations
from ream_stream.model.batch_store import BatchStore

Served = dict[int, RoutedActivations]
"""Activations of the tokens of each expert, by expert."""


class StoredActivations:
    """Activations by batch, set of rows and block of experts.

    Parameters
    ----------
    stores
        A store for each set of rows; tensors of a store may have different sizes.
    blocks
        Number of blocks of experts.
    """

    def __init__(self, stores: Sequence[BatchStore], blocks: int) -> None:
        self._stores, self._blocks = stores, blocks
        self._routed: dict[tuple[int, int, int], list[tuple[int, Tensor, int]]] = {}

    def put(self, number: int, block: int, sets: Sequence[Served]) -> None:
        """Store what the experts of a block made of a batch, for each set of rows."""
        for which, served in enumerate(sets):
            self._routed[number, which, block] = [
                (each.expert, each.token_R, len(each.inner_RI)) for each in served.values()
            ]
            if served:
                inner_RI = torch.cat([each.inner_RI for each in served.values()])
                self._stores[which].put(number * self._blocks + block, inner_RI)

    def get(self, number: int, which: int, device: torch.device) -> Served:
        """Return the activations of all experts on a batch's set of rows."""
        served: Served = {}
        for block in range(self._blocks):
            routed = self._routed[number, which, block]
            if not routed:
                continue
            inner_RI = self._stores[which].get(number * self._blocks + block)
            parts = torch.split(inner_RI.to(device), [rows for _, _, rows in routed])
            for (expert, token_R, _), own_RI in zip(routed, parts, strict=True):
                served[expert] = RoutedActivations(expert, token_R, own_RI)
        return served

    def keep_rows(self, number: int, which: int, kept_T: Tensor) -> None:
        """Forget the rows of a batch's set that are False in `kept_T`."""
        served = only_rows(self.get(number, which, kept_T.device), kept_T)
        for block in range(self._blocks):
            routed = self._routed[number, which, block]
            own = {each[0]: served[each[0]] for each in routed if each[0] in served}
            self._routed[number, which, block] = [
                (expert, each.token_R, len(each.inner_RI)) for expert, each in own.items()
            ]
            if own:
                inner_RI = torch.cat([each.inner_RI for each in own.values()])
                self._stores[which].put(number * self._blocks + block, inner_RI)


def only_rows(served: Mapping[int, RoutedActivations], kept_T: Tensor) -> Served:
    """Return the activations of some rows of a set, which are numbered anew.

    Parameters
    ----------
    served
        Activations of all rows.
    kept_T
        Whether each row stays, (T,) bool.
    """
    place_T = kept_T.cumsum(0) - 1
    found: Served = {}
    for expert, each in served.items():
        kept_R = kept_T[each.token_R]
        if kept_R.any():
            inner_RI = each.inner_RI[: len(kept_R)][kept_R]
            found[expert] = RoutedActivations(expert, place_T[each.token_R[kept_R]], inner_RI)
    return found


def changing_only(served: Served, changing: Sequence[int]) -> list[RoutedActivations]:
    """Return activations of experts that may change, numbered by position in `changing`."""
    return [
        served[expert]._replace(expert=place)
        for place, expert in enumerate(changing)
        if expert in served
    ]
