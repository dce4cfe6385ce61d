"""Tables of experts by token id, for the experts that stay.

Some layers choose a token's experts by its id alone: a table has K of them for each id of
the vocabulary, all different, and the router only weighs these. docs/concepts/method.md
has the rule and its reason.

Letters in shapes: V vocabulary, K experts a token, E experts, N kept experts, H hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def renumbered(table_VK: Tensor, row_EH: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Return a table with the kept experts' new numbers in the place of the old ones.

    Kept experts stay where they are. Then, rank by rank and in the order of the table, each
    other entry gets what it likes best of what no other entry of its token has: the expert
    it was merged into, if there is one, then kept experts by the distance of their router
    rows to its own, ties to the lower number.

    Parameters
    ----------
    table_VK
        Experts of each token id, of any type of integers.
    row_EH
        The router's weight before any expert went.
    groups
        Source experts of each new expert, centroid first; there are K of them at least.

    Returns
    -------
    Tensor
        (V, K), in the table's dtype. Entries that differed in a token still do.
    """
    old_VK, top_k = table_VK.long(), table_VK.shape[1]
    number_E = torch.full((len(row_EH),), -1)
    liked_EK = _liked(row_EH, groups)[:, :top_k]
    number_E[[group[0] for group in groups]] = torch.arange(len(groups))
    new_VK = number_E[old_VK]
    for rank in range(top_k):
        for column in range(top_k):
            choice_V = liked_EK[old_VK[:, column], rank]
            free_V = (new_VK[:, column] < 0) & (new_VK != choice_V[:, None]).all(dim=1)
            new_VK[free_V, column] = choice_V[free_V]
    return new_VK.to(table_VK.dtype)


def _liked(row_EH: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Return the new experts in the order in which each old one would be replaced, (E, N)."""
    row_EH = row_EH.double()
    kept_NH = row_EH[[group[0] for group in groups]]
    # the exact way: rows that are equal are at a distance of 0
    distance_EN = torch.cdist(row_EH, kept_NH, compute_mode="donot_use_mm_for_euclid_dist")
    for number, group in enumerate(groups):
        distance_EN[list(group), number] = -1.0
    return distance_EN.argsort(dim=1, stable=True)
