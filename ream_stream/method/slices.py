"""Cutting experts into slices, and choosing the slices of a layer that stay.

An expert of width I is g experts of width w = I / g with the same router row, g times the
top-k and, where the router's coefficients of a token have a fixed sum, g times the down
projection: the same function. Slices are then dropped in place of experts, so that each
expert keeps a width of its own and the layer stays an ordinary MoE layer.

With a_e(x) = g_e(x) act(gate_e x) (up_e x), A_e = sum over x of a_e^T a_e, and D_e the
transposed down projection, neurons are removed one at a time by the rule of the optimal
brain surgeon (Hassibi and Stork 1993) for the layer's output::

    V = (A_e + l)^-1,  l = DAMPING * mean diagonal of A_e
    q = argmin of eps_q,  eps_q = |d_q|^2 / V_qq
    D_e -= V_:q d_q / V_qq,  V -= V_:q V_q: / V_qq

eps_q is what the squared error of the outputs grows by. The reverse of that order is the
order of importance; slice c of an expert is its neurons c w to (c + 1) w of it, and its
score the sum of their eps. With k the neurons that an expert keeps, its down projection is
then (A_kk + l)^-1 (A_k: D_e + l D_k).

Only |d_q|^2 is needed of D_e, so that W = D_e D_e^T takes its place. Neurons are removed in
batches: within a batch the rule is exact among the candidates, which are the neurons of the
lowest eps, and V and W are updated once for all of them, 8 I^2 operations a neuron.

Letters in shapes: E experts, H hidden, I inner, C slices of an expert, S slices that stay,
W width of a slice, n candidates, b neurons of a batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .threads import in_order

DAMPING = 0.01
"""l in shares of the mean diagonal of A_e."""

BATCH = 32
"""Neurons that are removed between two updates of all that remain; as many again are
candidates beside them."""

STEP = 0.01
"""Share of its router row that a slice has less than the one before."""

BIAS_STEP = 1e-4
"""What a slice's bias of the router is below the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemovalPath:
    """The order in which an expert loses its neurons."""

    order_I: Tensor
    """Neurons by decreasing importance: the last one is removed first."""

    error_I: Tensor
    """Growth of the squared error with each removal, in the order of `order_I`, float64."""


def removal_path(gram_II: Tensor, down_HI: Tensor) -> RemovalPath:
    """Remove the neurons of an expert one at a time, the least important first.

    Parameters
    ----------
    gram_II
        A_e, symmetric, with router coefficients counted.
    down_HI
        The expert's down projection.

    Returns
    -------
    RemovalPath
        On the processor. An expert without tokens loses its last neuron first, at no error.

    Raises
    ------
    ValueError
        The sums are not finite.
    """
    inner = len(gram_II)
    damped_II = _damped(gram_II)
    if damped_II is None:
        return RemovalPath(
            order_I=torch.arange(inner), error_I=torch.zeros(inner, dtype=torch.float64)
        )
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    down_II = down_HI.double().T @ down_HI.double()
    alive_I = torch.arange(inner, device=gram_II.device)
    removed: list[Tensor] = []
    errors: list[float] = []
    while len(alive_I):
        score_I = down_II.diagonal() / inverse_II.diagonal()
        count = min(2 * BATCH, len(alive_I))
        candidate_n = score_I.argsort(stable=True)[:count].sort().values
        block = (candidate_n[:, None], candidate_n)
        chosen, grown = _remove(
            inverse_II[block].cpu().numpy(), down_II[block].cpu().numpy(), min(BATCH, count)
        )
        gone_b = candidate_n[torch.tensor(chosen, device=candidate_n.device)]
        removed.append(alive_I[gone_b].cpu())
        errors += grown
        stays_I = torch.ones(len(alive_I), dtype=torch.bool, device=alive_I.device)
        stays_I[gone_b] = False
        left_I = stays_I.nonzero().squeeze(1)
        inverse_II, down_II = _without(inverse_II, down_II, gone_b, left_I)
        alive_I = alive_I[left_I]
    return RemovalPath(
        order_I=torch.cat(removed).flip(0),
        error_I=torch.tensor(errors, dtype=torch.float64).flip(0),
    )


def removal_paths(
    experts: Iterable[tuple[Tensor, Tensor]], *, threads: int
) -> Iterator[RemovalPath]:
    """Yield `removal_path` of each expert's A_e and down projection, in order.

    At most ``threads + 1`` experts are loaded at a time.
    """
    yield from in_order(lambda each: removal_path(*each), experts, threads=threads)


def removal_bytes(inner: int, hidden: int) -> int:
    """Return the transient bytes of `removal_path`, or of `narrowed_down`, of one expert."""
    # A and its copy in float32; A, its factor, V, W, and both again while they are cut down;
    # the down projection, twice
    return 2 * 4 * inner**2 + 8 * 6 * inner**2 + (4 + 8 + 8) * inner * hidden


def removal_flop(inner: int, hidden: int) -> int:
    """Return the operations of `removal_path`: inverse, W, and 8 n^2 for each neuron of n."""
    return inner**3 + 2 * inner**2 * hidden + 8 * inner**3 // 3


def narrowing_flop(inner: int, hidden: int) -> int:
    """Return the operations of `narrowed_down`, if most neurons stay."""
    return inner**3 // 3 + 4 * inner**2 * hidden


def _damped(gram_II: Tensor) -> Tensor | None:
    """Return A + l in float64; None if no token came."""
    gram_II = gram_II.double()
    mean = gram_II.diagonal().mean()
    if not bool(gram_II.isfinite().all()):
        raise ValueError("activations of an expert are not finite numbers")
    if not bool(mean > 0):
        return None
    return gram_II + DAMPING * mean * torch.eye(len(gram_II)).to(gram_II)


def _remove(
    inverse_nn: np.ndarray, down_nn: np.ndarray, count: int
) -> tuple[list[int], list[float]]:
    """Remove `count` of the candidates; return them in order, and the growth of the error.

    Both matrices are overwritten.
    """
    chosen: list[int] = []
    errors: list[float] = []
    alive_n = np.ones(len(inverse_nn), dtype=bool)
    for _ in range(count):
        # what was removed is left with zeros
        inverse_n = np.where(alive_n, inverse_nn.diagonal(), 1.0)
        score_n = np.where(alive_n, down_nn.diagonal() / inverse_n, np.inf)
        neuron = int(score_n.argmin())
        share_n = inverse_nn[:, neuron] / inverse_nn[neuron, neuron]
        down_n, own = down_nn[:, neuron].copy(), down_nn[neuron, neuron]
        down_nn -= np.outer(share_n, down_n) + np.outer(down_n - own * share_n, share_n)
        inverse_nn -= np.outer(share_n, inverse_nn[neuron].copy())
        alive_n[neuron] = False
        chosen.append(neuron)
        errors.append(max(0.0, float(score_n[neuron])))
    return chosen, errors


def _without(
    inverse_II: Tensor, down_II: Tensor, gone_b: Tensor, left_I: Tensor
) -> tuple[Tensor, Tensor]:
    """Return V and W of the neurons that are left after some were removed."""
    gone_bb = inverse_II[gone_b][:, gone_b]
    cross_Ib = inverse_II[left_I][:, gone_b]
    share_Ib = torch.cholesky_solve(cross_Ib.T, torch.linalg.cholesky(gone_bb)).T
    down_Ib, own_bb = down_II[left_I][:, gone_b], down_II[gone_b][:, gone_b]
    mixed_Ib = down_Ib - share_Ib @ own_bb
    new_inverse_II = inverse_II[left_I][:, left_I] - share_Ib @ cross_Ib.T
    new_down_II = down_II[left_I][:, left_I] - share_Ib @ down_Ib.T - mixed_Ib @ share_Ib.T
    return new_inverse_II, new_down_II


def slice_scores(error_I: Tensor, slices: int, width: int) -> Tensor:
    """Return the score of each slice of an expert, (C,) float64, never increasing.

    Neurons beyond C W are in no slice.
    """
    score_C = error_I[: slices * width].view(slices, width).sum(dim=1)
    return torch.cummin(score_C, dim=0).values


def slices_kept(score_EC: Tensor, keep: int, *, routing_groups: int = 1) -> list[int]:
    """Return how many slices each expert keeps: its first ones, `keep` in all.

    The best of all slices stay; of equals that with the lower number within its expert, then
    that of the lower expert. With routing groups, each contiguous group of experts keeps
    ``keep / routing_groups``.

    Raises
    ------
    ValueError
        The counts do not fit, or a score is not finite.
    """
    experts, slices = score_EC.shape
    if keep % routing_groups or experts % routing_groups or not 1 <= keep <= experts * slices:
        raise ValueError(f"{keep} of {experts} x {slices} slices in {routing_groups} groups")
    if not score_EC.isfinite().all():
        raise ValueError("scores of slices are not finite numbers")
    kept: list[int] = []
    for own_EC in score_EC.chunk(routing_groups):
        # slice after slice, so that a stable order prefers lower slices, then lower experts
        flat = own_EC.T.reshape(-1)
        best = flat.argsort(descending=True, stable=True)[: keep // routing_groups]
        kept += torch.bincount(best % len(own_EC), minlength=len(own_EC)).tolist()
    return kept


def kept_neurons(path: RemovalPath, kept: int, width: int) -> Tensor:
    """Return the neurons of each slice that an expert keeps, (kept, W), each slice sorted.

    An expert of which nothing is dropped keeps its neurons in their own order.
    """
    if kept * width == len(path.order_I):
        return torch.arange(kept * width).view(kept, width)
    return path.order_I[: kept * width].view(kept, width).sort(dim=1).values


def narrowed_down(gram_II: Tensor, down_HI: Tensor, neuron_N: Tensor) -> Tensor:
    """Return the down projection of the neurons that stay, (H, N) in float32.

    Raises
    ------
    ValueError
        The sums are not finite.
    """
    kept_HN = down_HI[:, neuron_N]
    damped_II = _damped(gram_II)
    if damped_II is None or len(neuron_N) == len(gram_II):
        return kept_HN.float()
    # A_k: D + l D_k: the damping is on the diagonal alone, which k meets at its own columns
    target_NH = damped_II[neuron_N] @ down_HI.double().T
    factor_NN = torch.linalg.cholesky(damped_II[neuron_N][:, neuron_N])
    return torch.cholesky_solve(target_NH, factor_NN).T.float()


def distinct_rows(row_EX: Tensor, rank: Sequence[int], *, additive: bool) -> Tensor:
    """Return router rows of slices, each of an expert's a little less than the one before.

    Slices of an expert have equal rows. Where a token has room for some of them only, which
    ones a server takes would be chance; so later slices are made less likely.

    Parameters
    ----------
    row_EX
        Rows of the slices' experts, or numbers that are added to their scores.
    rank
        Number of each slice within its expert.
    additive
        Whether the numbers are added to scores or logits: then little is taken off them;
        otherwise rows are multiplied by 1 - STEP * rank.
    """
    rank_E = torch.tensor(rank, dtype=torch.float64)
    rank_E = rank_E.view(-1, *[1] * (row_EX.dim() - 1))
    value_EX = row_EX.double()
    if not additive:
        return (value_EX * (1 - STEP * rank_E)).to(row_EX.dtype)
    resolution = torch.finfo(row_EX.dtype).eps * value_EX.abs().amax()
    return (value_EX - rank_E * max(BIAS_STEP, 2 * resolution.item())).to(row_EX.dtype)
