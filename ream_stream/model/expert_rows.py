"""Rows of a batch that each expert of a layer processes.

Letters in shapes: T tokens, K experts a token, R rows routed to one expert, S = T * K slots.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROW_MULTIPLE = 64
"""Rows of a bf16 product on the CPU are rounded up to a multiple of this.

oneDNN compiles and keeps a kernel for every number of rows: 6 ms and 0.9 MB
each, a gigabyte after a few layers. Rows do not change each other's bits.
"""


def round_up(token_R: Tensor) -> Tensor:
    """Repeat the first row until the number of rows is a multiple of `ROW_MULTIPLE`."""
    missing = -len(token_R) % ROW_MULTIPLE
    return torch.cat([token_R, token_R[:1].expand(missing)]) if missing else token_R


def slots_by_expert(index_TK: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that has tokens, with the slots t * K + k routed to it."""
    # the same call as transformers': the order of rows decides the last bits of a product
    sorted_S, slot_S = torch.sort(index_TK.reshape(-1))
    bounds = torch.searchsorted(sorted_S, torch.arange(num_experts + 1, device=sorted_S.device))
    for expert, (start, stop) in enumerate(
        zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ):
        if start < stop:
            yield expert, slot_S[start:stop]
