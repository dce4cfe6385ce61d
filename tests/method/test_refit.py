import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import FLOAT32, bound
from torch.nn import functional

from ream_stream.method import refit
from ream_stream.method.normal_equations import (
    NormalMatrix,
    NormalSums,
    RoutedActivations,
    predict,
    project,
)
from ream_stream.method.preconditioning import PRECONDITIONERS
from ream_stream.method.refit import ConjugateGradients, Misfit, select


class Passing:
    """An operator from a plain function."""

    def __init__(self, apply):
        self.apply = apply
        self.called = []

    def product(self, change_EIH):
        self.called.append("product")
        return self.apply(change_EIH)

    def power(self, change_EIH):
        self.called.append("power")
        return (change_EIH * self.apply(change_EIH)).sum(dim=(0, 1), dtype=torch.float64)


def solve(sums, apply, **options):
    """Solve with passes that are plain functions."""
    return refit.solve(sums, Passing(apply), **options)


CPU = torch.device("cpu")
TOKENS, EXPERTS, TOP_K, INNER, HIDDEN = 160, 5, 2, 6, 7


class Problem:
    """Random tokens of a small layer: routed activations, and what the output lacks."""

    def __init__(self, seed, *, tokens=TOKENS, experts=EXPERTS, spread=1.0, idle=()):
        generator = torch.Generator().manual_seed(seed)
        score_TE = torch.rand(tokens, experts, generator=generator)
        score_TE[:, list(idle)] = -1
        self.index_TK = score_TE.topk(TOP_K).indices
        self.experts = experts
        # neurons of very different size make the problem ill-conditioned
        scale_I = torch.logspace(0, -spread, INNER)
        mix_II = torch.linalg.qr(torch.randn(INNER, INNER, generator=generator)).Q
        inner = torch.randn(tokens, TOP_K, INNER, generator=generator)
        self.inner_TKI = (inner + inner[:, :1]) * scale_I @ mix_II
        self.residual_TH = torch.randn(tokens, HIDDEN, generator=generator)

    def batch(self, rows=slice(None)):
        index_TK, inner_TKI = self.index_TK[rows], self.inner_TKI[rows]
        served = []
        for expert in range(self.experts):
            token_R, slot_R = torch.where(index_TK == expert)
            if len(token_R):
                served.append(RoutedActivations(expert, token_R, inner_TKI[token_R, slot_R]))
        return served

    def sums(self, cuts=(), *, blocks=True):
        device = torch.device("cpu")
        sums = NormalSums(self.experts, INNER, HIDDEN, blocks=blocks, device=device)
        for rows in self.rows(cuts):
            sums.add(self.batch(rows), self.residual_TH[rows])
        return sums

    def rows(self, cuts=()):
        bounds = itertools.pairwise([0, *sorted(cuts), len(self.residual_TH)])
        return [slice(*pair) for pair in bounds]

    def apply(self, cuts=()):
        def product(change_EIH):
            total_EIH = torch.zeros_like(change_EIH)
            for rows in self.rows(cuts):
                batch, tokens = self.batch(rows), rows.stop - rows.start
                project(batch, predict(batch, change_EIH, tokens), total_EIH)
            return total_EIH

        return product

    def design(self):
        """Return the matrix (T, E * I) that D, stacked, is multiplied by."""
        matrix_TEI = torch.zeros(len(self.index_TK), self.experts, INNER).double()
        for expert, token_R, inner_RI in self.batch():
            matrix_TEI[token_R, expert] = inner_RI.double()
        return matrix_TEI.flatten(1)

    def penalties(self, penalty):
        square_E = self.design().square().sum(dim=0).view(self.experts, INNER).mean(dim=1)
        return penalty * square_E

    def objective(self, change_EIH, penalty):
        change_EIH = change_EIH.double()
        left_TH = self.residual_TH.double() - self.design() @ change_EIH.flatten(0, 1)
        weight_E = self.penalties(penalty)
        return (
            left_TH.square().sum() + (weight_E * change_EIH.square().sum(dim=(1, 2))).sum()
        ).item()

    def rounding(self, change_EIH, penalty):
        """Bound what rounding does to the objective that is told of a solution.

        It is a sum over tokens less sums over the rows of D, so its terms are those of the
        objective with nothing cancelled: what is lacking plus the sizes of all products.
        """
        size_EIH = change_EIH.double().abs()
        made_TH = self.design().abs() @ size_EIH.flatten(0, 1)
        weight_E = self.penalties(penalty)
        absolute = (self.residual_TH.double().abs() + made_TH).square().sum()
        absolute += (weight_E * size_EIH.square().sum(dim=(1, 2))).sum()
        return bound(len(self.residual_TH) + self.experts * INNER, absolute.item())

    def dense(self, penalty):
        """Return D by least squares in float64, the penalty as further rows."""
        matrix, target = self.design(), self.residual_TH.double()
        root = self.penalties(penalty).sqrt().repeat_interleave(INNER)
        matrix = torch.cat([matrix, torch.diag(root)])
        target = torch.cat([target, torch.zeros(len(root), HIDDEN).double()])
        solution = torch.linalg.lstsq(matrix, target, driver="gelsd").solution
        return solution.view(self.experts, INNER, HIDDEN)


def distance(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("seed", range(3))
def test_the_solution_is_that_of_dense_least_squares_in_float64(seed, penalty, preconditioner):
    problem = Problem(seed)
    found = solve(
        problem.sums(),
        problem.apply(),
        penalty=penalty,
        iterations=60,
        preconditioner=preconditioner,
    )
    assert distance(found.change_EIH, problem.dense(penalty)) < 1e-5
    objective = problem.objective(found.change_EIH, penalty)
    assert found.objectives[-1] == pytest.approx(objective, rel=1e-5)


def test_without_a_penalty_it_is_plain_least_squares_where_tokens_suffice():
    problem = Problem(0)
    found = solve(problem.sums(), problem.apply(), penalty=0, iterations=60)
    assert distance(found.change_EIH, problem.dense(0)) < 1e-5


def test_one_expert_that_serves_every_token_is_solved_in_one_iteration():
    problem = Problem(0, experts=TOP_K, tokens=40)
    problem.index_TK = torch.tensor([[0, 1]]).expand(40, 2)
    problem.inner_TKI[:, 1] = 0  # so that expert 1 has tokens, but says nothing
    found = solve(problem.sums(), problem.apply(), penalty=0.1, iterations=1)
    assert distance(found.change_EIH, problem.dense(0.1)) < 1e-5
    assert not found.change_EIH[1].any()


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(10, 80),
    st.integers(TOP_K, 6),
    st.sampled_from([1e-3, 1e-1, 10.0]),
    st.sampled_from(sorted(PRECONDITIONERS)),
)
def test_the_true_objective_falls_with_every_iteration_and_is_the_one_told(
    seed, tokens, experts, penalty, preconditioner
):
    problem = Problem(seed, tokens=tokens, experts=experts)
    sums, apply = problem.sums(), problem.apply()
    penalty_E = sums.penalties(penalty)
    helper = PRECONDITIONERS[preconditioner](sums, penalty_E)
    energy = sums.energy.item()
    solver = ConjugateGradients(sums.target_EIH, penalty_E, helper, energy)
    true = [problem.objective(solver.change_EIH, penalty)]
    assert energy == pytest.approx(true[0], rel=FLOAT32)
    for _ in range(5):
        solver.advance(apply(solver.direction_EIH))
        true.append(problem.objective(solver.change_EIH, penalty))
        near = problem.rounding(solver.change_EIH, penalty)
        assert solver.objectives[-1] == pytest.approx(true[-1], rel=0, abs=near)
        assert true[-1] <= true[-2] + near
    assert true[1] < true[0]


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, TOKENS - 1), max_size=5, unique=True),
)
def test_the_solution_does_not_depend_on_how_tokens_are_cut_into_batches(seed, cuts):
    problem = Problem(seed)
    whole, parts = (
        solve(problem.sums(cut), problem.apply(cut), penalty=1e-2).change_EIH
        for cut in ((), cuts)
    )
    # rounded otherwise, the sums of the equations are those of a problem next to it, whose
    # solution is as far away as the condition of the equations takes it
    value_N = torch.linalg.eigvalsh(problem.design().T @ problem.design())
    condition = (value_N[-1] / (value_N[0] + problem.penalties(1e-2).min())).item()
    near = bound(TOKENS, condition * whole.norm().item())
    assert near < 0.1 * whole.norm()
    assert (parts - whole).norm() < near


def test_columns_solved_alone_come_out_as_they_do_together():
    problem = Problem(3)
    together = solve(problem.sums(), problem.apply(), penalty=1e-2).change_EIH
    for columns in (slice(0, 3), slice(3, HIDDEN)):
        part = Problem(3)
        part.residual_TH = part.residual_TH[:, columns]
        sums = NormalSums(
            EXPERTS, INNER, part.residual_TH.shape[1], blocks=True, device=torch.device("cpu")
        )
        sums.add(part.batch(), part.residual_TH)
        alone = solve(sums, part.apply(), penalty=1e-2).change_EIH
        torch.testing.assert_close(alone, together[:, :, columns], rtol=1e-4, atol=1e-6)


def test_where_nothing_is_lacking_nothing_changes_and_no_pass_is_made():
    problem = Problem(0)
    problem.residual_TH.zero_()

    def no_pass(_):
        raise AssertionError("a pass over the tokens")

    found = solve(problem.sums(), no_pass, penalty=1e-2)
    assert not found.change_EIH.any()
    assert found.objectives == (0.0,)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_an_expert_without_tokens_is_left_alone(preconditioner):
    problem = Problem(0, idle=[1])
    sums = problem.sums()
    assert sums.count_E[1] == 0
    found = solve(
        sums, problem.apply(), penalty=1e-2, iterations=60, preconditioner=preconditioner
    )
    assert not found.change_EIH[1].any()
    assert distance(found.change_EIH, problem.dense(1e-2)) < 1e-5


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_last_iteration_asks_for_a_power_alone(iterations):
    problem, operator = Problem(0), Passing(Problem(0).apply())
    found = refit.solve(problem.sums(), operator, penalty=1e-2, iterations=iterations)
    assert operator.called == ["product"] * (iterations - 1) + ["power"]
    whole = Problem(0).sums()
    penalty_E = whole.penalties(1e-2)
    helper, energy = PRECONDITIONERS["blocks"](whole, penalty_E), whole.energy.item()
    solver = ConjugateGradients(whole.target_EIH, penalty_E, helper, energy)
    for _ in range(iterations):
        solver.advance(problem.apply()(solver.direction_EIH))
    assert found.objectives == pytest.approx(solver.objectives, rel=1e-6)
    torch.testing.assert_close(found.change_EIH, solver.change_EIH, rtol=1e-4, atol=1e-6)


def test_fewer_tokens_than_neurons_need_a_penalty():
    problem = Problem(0, tokens=8)
    with pytest.raises(ValueError, match="kept expert 0 do not determine"):
        solve(problem.sums(), problem.apply(), penalty=0)
    found = solve(problem.sums(), problem.apply(), penalty=1e-2, iterations=60)
    assert distance(found.change_EIH, problem.dense(1e-2)) < 1e-4


def test_a_penalty_below_rounding_still_gives_a_factor():
    problem = Problem(0, tokens=8)
    found = solve(problem.sums(), problem.apply(), penalty=1e-12, iterations=20)
    assert found.change_EIH.isfinite().all()
    assert found.objectives[-1] < 1e-2 * found.objectives[0]  # 30 unknowns, 8 tokens


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf")])
def test_a_penalty_is_a_number_and_not_negative(penalty):
    problem = Problem(0)
    with pytest.raises(ValueError, match="the penalty of a refit is"):
        solve(problem.sums(), problem.apply(), penalty=penalty)


def test_outputs_that_are_not_finite_are_refused():
    problem = Problem(0)
    problem.residual_TH[3, 2] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        solve(problem.sums(), problem.apply(), penalty=1e-2)
    sums = Problem(0).sums()
    sums.energy.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        solve(sums, problem.apply(), penalty=1e-2)


def test_blocks_that_were_not_gathered_cannot_be_factorised():
    problem = Problem(0)
    with pytest.raises(ValueError, match="no blocks"):
        solve(problem.sums(blocks=False), problem.apply(), penalty=1e-2)
    solve(problem.sums(blocks=False), problem.apply(), penalty=1e-2, preconditioner="diagonal")


class Plain:
    """No preconditioner."""

    def solve(self, _expert, residual_IH):
        return residual_IH


def gained(problem, preconditioner, penalty, iterations):
    """Return the share of what can be gained that some iterations gain."""
    sums, apply = problem.sums(), problem.apply()
    penalty_E = sums.penalties(penalty)
    helper = preconditioner(sums, penalty_E)
    energy = sums.energy.item()
    solver = ConjugateGradients(sums.target_EIH, penalty_E, helper, energy)
    for _ in range(iterations):
        solver.advance(apply(solver.direction_EIH))
    best = problem.objective(problem.dense(penalty), penalty)
    return (energy - solver.objectives[-1]) / (energy - best)


@pytest.mark.parametrize("seed", range(3))
def test_preconditioning_by_blocks_helps_where_neurons_differ_in_size(seed):
    problem = Problem(seed, spread=2.5, tokens=400)
    share = {
        name: gained(problem, make, 1e-6, 4)
        for name, make in {**PRECONDITIONERS, "plain": lambda *_: Plain()}.items()
    }
    assert share["blocks"] > 0.97
    assert share["plain"] < 0.8
    assert share["diagonal"] < 0.9


def test_a_factor_for_another_penalty_leads_to_the_same_solution():
    problem = Problem(1)
    sums, apply = problem.sums(), problem.apply()
    helper = PRECONDITIONERS["blocks"](sums, sums.penalties(1.0))
    solver = ConjugateGradients(
        sums.target_EIH.clone(), sums.penalties(1e-3), helper, sums.energy.item()
    )
    for _ in range(60):
        solver.advance(apply(solver.direction_EIH))
    assert distance(solver.change_EIH, problem.dense(1e-3)) < 1e-5
    # and the blocks can be factorised again
    again = solve(sums, apply, penalty=1e-2, iterations=60)
    assert distance(again.change_EIH, problem.dense(1e-2)) < 1e-5


def test_bfloat16_activations_give_a_solution_as_good_as_their_digits():
    problem = Problem(0)
    problem.inner_TKI = problem.inner_TKI.bfloat16()
    found = solve(problem.sums(), problem.apply(), penalty=0.3, iterations=10)
    assert found.change_EIH.dtype == torch.float32
    assert 1e-5 < distance(found.change_EIH, problem.dense(0.3)) < 1e-2
    true = problem.objective(found.change_EIH, 0.3)
    assert true == pytest.approx(problem.objective(problem.dense(0.3), 0.3), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_beyond_the_tokens_change_nothing(dtype):
    problem = Problem(0)
    problem.inner_TKI = problem.inner_TKI.to(dtype)
    padded = [
        RoutedActivations(expert, token_R, functional.pad(inner_RI, (0, 0, 0, 5)))
        for expert, token_R, inner_RI in problem.batch()
    ]
    change_EIH = torch.randn(EXPERTS, INNER, HIDDEN)
    found, wanted = NormalMatrix(EXPERTS, INNER, device=CPU), problem.apply()(change_EIH)
    found.add(padded, TOKENS)
    total_EIH = torch.zeros_like(change_EIH)
    project(padded, predict(padded, change_EIH, TOKENS), total_EIH)
    torch.testing.assert_close(total_EIH, wanted)
    torch.testing.assert_close(found(change_EIH), wanted, rtol=2e-2, atol=1)


def test_it_stops_when_an_iteration_gains_too_little():
    problem = Problem(0)
    passes = []

    def apply(change_EIH):
        passes.append(None)
        return problem.apply()(change_EIH)

    found = solve(problem.sums(), apply, penalty=1e-2, iterations=50, tolerance=1e-3)
    assert len(passes) == len(found.objectives) - 1 < 10
    gains = [a - b for a, b in itertools.pairwise(found.objectives)]
    assert all(gain >= 1e-3 * found.objectives[0] for gain in gains[:-1])
    assert gains[-1] < 1e-3 * found.objectives[0]


def test_predicting_by_hand():
    batch = [
        RoutedActivations(0, torch.tensor([0, 2]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])),
        RoutedActivations(1, torch.tensor([0]), torch.tensor([[1.0, 1.0]])),
    ]
    change_EIH = torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]])
    output_TH = predict(batch, change_EIH, 3)
    assert output_TH.tolist() == [[1.0 + 1100.0], [0.0], [20.0]]
    total_EIH = torch.zeros(2, 2, 1)
    project(batch, torch.tensor([[1.0], [5.0], [3.0]]), total_EIH)
    assert total_EIH.tolist() == [[[1.0], [6.0]], [[1.0], [1.0]]]


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(TOP_K, 6),
    st.lists(st.integers(1, TOKENS - 1), max_size=3, unique=True),
)
def test_the_gathered_matrix_gives_what_a_pass_over_the_tokens_gives(seed, experts, cuts):
    problem = Problem(seed, experts=experts, idle=[0] if experts > TOP_K else [])
    matrix = NormalMatrix(experts, INNER, device=torch.device("cpu"))
    for rows in problem.rows(cuts):
        matrix.add(problem.batch(rows)[::-1], rows.stop - rows.start)
    change_EIH = torch.randn(experts, INNER, 3, generator=torch.Generator().manual_seed(seed))
    found_EIH, wanted_EIH = matrix(change_EIH), problem.apply()(change_EIH)
    problem.inner_TKI = problem.inner_TKI.abs()
    absolute_EIH = problem.apply()(change_EIH.abs())
    # both add up products of three numbers: over tokens, then over rows of D, and the reverse
    near_EIH = 2 * bound(TOKENS + TOP_K * INNER, absolute_EIH)
    assert ((found_EIH - wanted_EIH).abs() <= near_EIH).all()
    assert near_EIH.max() < 0.01 * wanted_EIH.abs().max()


def learnable(seed, tokens, noise):
    """Return a problem whose residual is partly the work of some change D."""
    problem = Problem(seed, tokens=tokens)
    generator = torch.Generator().manual_seed(99)  # the same D for every seed
    change_EIH = torch.randn(EXPERTS, INNER, HIDDEN, generator=generator)
    made_TH = predict(problem.batch(), change_EIH, tokens)
    problem.residual_TH = made_TH + noise * problem.residual_TH
    return problem


def held_back_errors(seen, held_back, penalties):
    errors = {}
    for penalty in penalties:
        change_EIH = solve(seen.sums(), seen.apply(), penalty=penalty, iterations=9).change_EIH
        found = Misfit()
        for rows in held_back.rows([20]):
            residual_TH = held_back.residual_TH[rows]
            batch = held_back.batch(rows)
            found.add(residual_TH, predict(batch, change_EIH, len(residual_TH)))
        errors[penalty] = found.share
    return errors


def test_the_penalty_is_chosen_by_tokens_that_were_held_back():
    seen, held_back = learnable(0, 160, 1.0), learnable(1, 60, 1.0)
    errors = held_back_errors(seen, held_back, [1e-3, 1e-1, 100.0])
    left = {
        penalty: ((held_back.residual_TH - held_back.design().float() @ d).square().sum())
        for penalty in errors
        for d in [seen.dense(penalty).float().flatten(0, 1)]
    }
    energy = held_back.residual_TH.square().sum()
    for penalty, error in errors.items():
        assert error == pytest.approx((left[penalty] / energy).item(), rel=1e-3)
    assert select(errors) == min(errors, key=errors.get) != 100.0


def test_a_layer_where_nothing_carries_over_is_left_as_it_is():
    # the residual is noise: what fits the seen tokens makes others worse
    seen, held_back = Problem(0), Problem(1)
    errors = held_back_errors(seen, held_back, [1e-3, 1e-1])
    assert select(errors) is None
    assert all(error > 1 for error in errors.values())


def test_selecting_by_hand():
    assert select({0.1: 0.9, 1.0: 0.8}) == 1.0
    assert select({0.1: 0.8, 1.0: 0.8}) == 1.0
    assert select({0.1: 1.0, 1.0: 1.2}) is None
    assert select({0.1: float("nan")}) is None
    assert select({}) is None
    assert Misfit().share == 1.0
