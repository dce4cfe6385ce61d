"""Calibration sequences that no refit is fitted to, and that judge it.

Letter in shapes: S sequences.
"""

import torch
from torch import Tensor

from ream_stream.calibration.tokens import Tokens
from ream_stream.errors import UsageError
from ream_stream.method.rng import generator
from ream_stream.planning.refit_memory import HELD_BACK_SHARE


def held_back(tokens: Tokens, seed: int) -> Tensor:
    """Draw the held-back sequences of a refit, (S,) bool; they are the same in every layer.

    Each domain gives the same share, so that the judgement does not depend on the draw.

    Raises
    ------
    UsageError
        Each domain has only one sequence.
    """
    stream = generator(seed, 0, "held back")
    held_S = torch.zeros(tokens.num_sequences, dtype=torch.bool)
    for domain in range(len(tokens.domains)):
        own_S = torch.nonzero(tokens.domain_S == domain).squeeze(1)
        drawn_S = own_S[torch.randperm(len(own_S), generator=stream)]
        # at least one sequence of a domain, but not its only one, which the fit needs
        held_S[drawn_S[: max(len(own_S) > 1, round(HELD_BACK_SHARE * len(own_S)))]] = True
    if not held_S.any():
        raise UsageError(
            "--refit holds back a tenth of the calibration sequences to judge by, and there is "
            "but one of each domain; give more"
        )
    return held_S
