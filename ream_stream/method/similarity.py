"""How alike experts are: by their mean outputs, and by when the router wants them.

Neither term needs outputs of all experts on all tokens at once. The down
projection is linear, so an expert's mean output is its down projection of
the mean of its inner activations, one vector of I numbers. Distances between
router columns follow from the columns' inner products, E x E numbers.

Letters in shapes: T tokens of a batch, E experts, H hidden, I inner width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**22
"""Activations that are converted to float32 at once: 16 MiB."""


def by_score(score_T: Tensor) -> Tensor:
    """Weight each token by the router's score of the expert."""
    return score_T


def equally(score_T: Tensor) -> Tensor:
    """Weight all tokens the same."""
    return torch.ones_like(score_T)


RANDOM = "random"

SIMILARITIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gated": by_score,
    "plain": equally,
    RANDOM: equally,
}
"""Weights of tokens in an expert's mean output, computed from the scores p_e(x).

`RANDOM` is a control: distances are drawn, whatever experts do (`random_distance`).
"""


class MeanActivations:
    """Mean over all tokens, routed or not, of each expert's weighted activations.

    With a = act(gate x) * up x and w the weight of a token (`SIMILARITIES`)::

        mean_e = 1/T * sum over x of w_e(x) a_e(x)

    and the expert's mean output is ``down @ mean_e``, plus its bias, if it has
    one, times ``mean_weight_E[e]``.
    """

    WIDENED_BYTES = 4 * _BLOCK_ELEMENTS
    """Bytes of the temporary float32 copy while activations are added."""

    def __init__(
        self, num_experts: int, inner: int, *, similarity: str, device: torch.device
    ) -> None:
        self._weigh = SIMILARITIES[similarity]
        self._sum_EI = torch.zeros(num_experts, inner, dtype=torch.float64, device=device)
        self._weight_E = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self._tokens_E = [0] * num_experts

    def add(self, expert: int, activation_TI: Tensor, score_T: Tensor) -> None:
        """Add a batch of one expert, from which padding has been removed.

        Products are taken in float32, or wider if the activations are, and
        added up in float64: a product in bfloat16 would be rounded to three
        digits. Rows are widened in blocks of 16 MiB, to bound the memory.
        """
        wide = torch.promote_types(activation_TI.dtype, torch.float32)
        weight_T = self._weigh(score_T).to(wide)
        rows = max(1, _BLOCK_ELEMENTS // activation_TI.shape[1])
        for start in range(0, len(activation_TI), rows):
            block_TI = activation_TI[start : start + rows].to(wide)
            self._sum_EI[expert] += weight_T[start : start + rows] @ block_TI
        self._weight_E[expert] += weight_T.sum(dtype=torch.float64)
        self._tokens_E[expert] += len(score_T)

    def mean_EI(self) -> Tensor:
        """Return the means in float64; an expert that was never added has zeros."""
        return self._sum_EI / self._divisor_E()[:, None]

    def mean_weight_E(self) -> Tensor:
        """Return the mean weight of a token: what a bias on the output is multiplied by."""
        return self._weight_E / self._divisor_E()

    def _divisor_E(self) -> Tensor:
        count = [max(1, tokens) for tokens in self._tokens_E]
        return torch.tensor(count, dtype=torch.float64, device=self._sum_EI.device)


class LogitGram:
    """Inner products of the router's logit columns over all tokens, in float64.

    Give it raw logits; of a router that only yields probabilities, their log.
    """

    def __init__(self, num_experts: int, *, device: torch.device) -> None:
        self.gram_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)

    def update(self, logits_TE: Tensor) -> None:
        """Add a batch, from which padding has been removed."""
        logits_TE = logits_TE.double()
        self.gram_EE.addmm_(logits_TE.T, logits_TE)


def distances_of_directions(gram_EE: Tensor) -> Tensor:
    """Return Euclidean distances between L2-normalized vectors, from their inner products.

    A zero vector stays zero when normalized: at distance 1 from every other
    and 0 from other zero vectors.
    """
    norm_E = gram_EE.diagonal().sqrt()
    # exact for zero vectors, whose row and column of the Gram matrix are zero
    unit_E = (norm_E > 0).to(gram_EE.dtype)
    scale_E = torch.where(norm_E > 0, norm_E, 1)
    cosine_EE = gram_EE / scale_E[:, None] / scale_E
    square_EE = unit_E[:, None] + unit_E - 2 * cosine_EE
    return square_EE.clamp(min=0).sqrt().fill_diagonal_(0)


def gate_similarity(gram_EE: Tensor) -> Tensor:
    """Return 1 - d/max(d), with d the distances between normalized logit columns."""
    distance_EE = distances_of_directions(gram_EE)
    largest = distance_EE.max()
    return 1 - distance_EE / torch.where(largest > 0, largest, 1)


def expert_similarity(mean_EH: Tensor) -> Tensor:
    """Return (cos + 1) / 2 of mean outputs, float64; zero outputs have cosine 0."""
    mean_EH = mean_EH.double()
    norm_E1 = mean_EH.norm(dim=1, keepdim=True)
    direction_EH = mean_EH / torch.where(norm_E1 > 0, norm_E1, 1)
    cosine_EE = (direction_EH @ direction_EH.T).clamp(-1, 1)
    return ((cosine_EE + 1) / 2).fill_diagonal_(1)


def distance(expert_EE: Tensor, gate_EE: Tensor | None) -> Tensor:
    """Return 1 - similarity, the mean of both terms or, without a gate term, the first.

    Parameters
    ----------
    expert_EE
        From `expert_similarity`.
    gate_EE
        From `gate_similarity`, or None to compare experts by their outputs alone.

    Returns
    -------
    Tensor
        Symmetric distances (E, E) in [0, 1], float64, zero diagonal.
    """
    if gate_EE is None:
        return 1 - expert_EE
    return 1 - (expert_EE + gate_EE.to(expert_EE.device)) / 2


def random_distance(num_experts: int, generator: torch.Generator) -> Tensor:
    """Return drawn distances in the form of `distance`: groups by them mean nothing."""
    drawn_EE = torch.rand(num_experts, num_experts, generator=generator, dtype=torch.float64)
    return ((drawn_EE + drawn_EE.T) / 2).fill_diagonal_(0)
