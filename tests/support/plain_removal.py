"""The order in which an expert loses its neurons, by the rule as it is written.

Letters in shapes: H hidden, I inner.
"""

import torch
from torch import Tensor

DAMPING = 0.01


def damped(gram_II: Tensor) -> Tensor:
    """Return A + l in float64."""
    gram_II = gram_II.double()
    return gram_II + DAMPING * gram_II.diagonal().mean() * torch.eye(len(gram_II))


def one_by_one(gram_II: Tensor, down_HI: Tensor) -> tuple[list[int], list[float]]:
    """Return neurons by decreasing importance, and what the error grows by without each."""
    inverse_II, down_IH = torch.linalg.inv(damped(gram_II)), down_HI.double().T.clone()
    left, order, errors = list(range(len(gram_II))), [], []
    while left:
        score = {q: float(down_IH[q].square().sum() / inverse_II[q, q]) for q in left}
        gone = min(left, key=lambda q: score[q])
        share_I = inverse_II[:, gone] / inverse_II[gone, gone]
        down_IH = down_IH - share_I[:, None] * down_IH[gone]
        inverse_II = inverse_II - share_I[:, None] * inverse_II[gone]
        left.remove(gone)
        order.append(gone)
        errors.append(score[gone])
    return order[::-1], errors[::-1]
