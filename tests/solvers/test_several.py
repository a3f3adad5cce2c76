"""Several resources, worst errors, pairwise terms and baselines: laws beyond those of the conformance suite."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Problem, ProblemError, Status, solve
from solvers.greedy import Uniform
from solvers.instances import brute_force, curves, lumpy, paired, several, surfaces, uncorrelated
from solvers.lagrangian import Rows
from solvers.milp import MILP, highs
from solvers.minimax import Minimax
from solvers.problem import Deadline
from solvers.relaxation import relax
from solvers.several import Bundle, dual_prices


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    groups, resources = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 4)) for _ in range(groups)]
    loss = [draw(st.lists(st.integers(0, 50).map(float), min_size=n, max_size=n)) for n in sizes]
    cost = [
        np.array(draw(st.lists(st.integers(0, 20), min_size=n * resources, max_size=n * resources))).reshape(n, -1)
        for n in sizes
    ]
    part = np.array([draw(st.floats(-0.05, 1.0)) for _ in range(resources)])
    least, most = sum(c.min(axis=0) for c in cost), sum(c.max(axis=0) for c in cost)
    names = [f"r{k}" for k in range(resources)]
    lower = draw(st.sampled_from([None, None, 0.2]))
    budget = (least + part * (most - least)).astype(np.int64)
    return Problem(loss, cost, budget, names, lower=None if lower is None else np.floor(lower * budget))


@given(problems())
@settings(max_examples=150)
def test_milp_against_trying_all(problem: Problem) -> None:
    optimum, _ = brute_force(problem)
    solution = solve(problem, "milp")
    assert solution.bound <= optimum <= solution.loss
    assert (solution.status is Status.INFEASIBLE) == (optimum == math.inf)
    if optimum < math.inf:
        assert solution.loss <= optimum + 1e-4 * abs(optimum) + 1e-9


@given(problems())
@settings(max_examples=120)
def test_partial_choices_prove_no_more_than_is_true(problem: Problem) -> None:
    """Whatever is cut (states, groups), the bound stays a bound, and a complete expansion meets the optimum."""
    optimum, _ = brute_force(problem)
    rows = Rows.of(problem.flat)
    prices = dual_prices(rows, Deadline(None))
    if prices.infeasible:
        assert optimum == math.inf
        return
    for cap, total, groups in ((2, 50, 9), (1000, 10, 9), (1000, 10_000, 2), (10_000, 100_000, 9)):
        state = Bundle(rows, prices)
        complete = state.expand(Deadline(None), cap, total, groups)
        assert state.bound == math.inf if optimum == math.inf and complete else rows.true(state.bound) <= optimum
        if complete and optimum < math.inf:
            assert state.rows is not None
            assert problem.total_loss(problem.flat.choice(state.rows)) == pytest.approx(optimum, abs=1e-9)


def test_losses_of_zero_leave_a_choice() -> None:
    """The cheapest choice is the dearest too: nothing may be reduced away because it improves nothing."""
    zeros = Problem(loss=[np.zeros(1), np.zeros(2)], cost=[np.array([0]), np.array([1, 0])], budget=0, resources=("r",))
    rows = Rows.of(zeros.flat)
    state = Bundle(rows, dual_prices(rows, Deadline(None)))
    assert state.expand(Deadline(None), 10, 100, 9)
    assert state.rows is not None
    assert state.bound <= 0.0


def test_milp_reaches_its_gap_and_names_what_was_reduced() -> None:
    problem = several(100, 40, 3, 2)
    solution = solve(problem, "milp")
    assert solution.gap <= 1e-4
    left = int(solution.message.split(" of 4000 options left")[0])
    assert left < 2000
    tighter = solve(problem, MILP(gap=1e-6))
    assert tighter.loss <= solution.loss
    whole = MILP(reduce=False)(problem)
    assert whole.loss <= solution.loss * (1 + 1e-4)


@given(problems())
@settings(max_examples=100)
def test_what_highs_proves_is_no_more_than_is_true(problem: Problem) -> None:
    optimum, _ = brute_force(problem)
    rows = Rows.of(problem.flat)
    prices = dual_prices(rows, Deadline(None))
    if optimum == math.inf or prices.infeasible:
        return
    said, _, bound = highs(rows, np.arange(len(rows.loss)), Bundle(rows, prices), Deadline(None), 1e-4)
    assert said == "optimal"
    assert rows.true(bound) <= optimum <= rows.true(bound) + 1e-3 * (1 + abs(optimum))


@pytest.mark.parametrize("seed", range(3))
def test_costs_that_few_options_change_are_proven_by_highs(seed: int) -> None:
    """Seven splits raise the Lagrangian bound by little here; the message says whose word the gap is."""
    problem = lumpy(20, 60, seed)
    solution = MILP(branches=7)(problem)
    assert solution.gap <= 1e-4
    assert "its bound" in solution.message
    alone = float(solution.message.split("the Lagrangian one is ")[1].rstrip(")"))
    assert (solution.loss - alone) / solution.loss > 1e-4


@pytest.mark.parametrize("make", [curves, surfaces, uncorrelated])
@pytest.mark.parametrize("seed", range(4))
def test_milp_proves_no_more_than_exact(make: Callable[..., Problem], seed: int) -> None:
    """The same budget said three times, in three units: three resources to milp, one to exact."""
    one = make(40, 20, seed)
    three = Problem(
        one.loss, [a * np.array([1, 3, 7]) for a in one.cost], one.budget * np.array([1, 3, 7]), ("a", "b", "c")
    )
    optimum = solve(one)
    assert optimum.status is Status.OPTIMAL
    for gap in (1e-2, 1e-4, 1e-6):
        solution = solve(three, MILP(gap=gap, branches=150))
        assert solution.bound <= optimum.loss
        assert solution.loss >= optimum.bound
        assert solution.loss <= optimum.loss * (1 + max(gap, 1e-3))


def test_dual_prices_match_the_linear_programme() -> None:
    problem = several(50, 30, 3, 4)
    rows = Rows.of(problem.flat)
    prices = dual_prices(rows, Deadline(None))
    relaxed = relax(problem)
    assert relaxed is not None
    assert rows.true(prices.bound) == pytest.approx(relaxed.bound, rel=1e-6)
    assert relaxed.share.sum() == pytest.approx(problem.groups)


@given(problems())
@settings(max_examples=60)
def test_minimax_against_trying_all(problem: Problem) -> None:
    asked = Problem(problem.loss, problem.cost, problem.budget, problem.resources, lower=problem.lower, objective="max")
    optimum, _ = brute_force(asked)
    solution = solve(asked, "minimax")
    assert solution.bound <= optimum <= solution.loss
    if asked.flat.cost.shape[1] == 1:
        assert solution.loss == optimum
        assert solution.status is (Status.INFEASIBLE if optimum == math.inf else Status.OPTIMAL)


def test_minimax_takes_the_smallest_sum_among_the_best() -> None:
    # A worst error of 3 is the least the budget allows; within it the second group can have 1 instead of 3.
    problem = Problem([[9, 3, 0], [9, 3, 1]], [[0, 2, 9], [0, 2, 4]], 6, objective="max")
    solution = solve(problem, "minimax")
    assert solution.choice.tolist() == [1, 2]
    assert solution.message == "smallest worst error 3"


def test_relative_minimax_divides_by_each_groups_largest() -> None:
    # Absolute: the large group decides. Relative: both lose the same part.
    problem = Problem([[1000, 600, 0], [10, 6, 0]], [[0, 2, 4], [0, 2, 4]], 4)
    assert solve(problem, "minimax").choice.tolist() == [2, 0]
    relative = solve(problem, Minimax(relative=True))
    assert relative.choice.tolist() == [1, 1]
    assert relative.message == "smallest worst relative error 0.6"
    with pytest.raises(ProblemError, match="relative=True minimises another maximum"):
        solve(Problem(problem.loss, problem.cost, 4, objective="max"), Minimax(relative=True))


@pytest.mark.parametrize("seed", range(6))
def test_relaxation_with_pairs_is_close_to_trying_all(seed: int) -> None:
    problem = paired(5, 5, seed)
    optimum, _ = brute_force(problem)
    solution = solve(problem, "relaxation")
    assert solution.bound <= optimum <= solution.loss
    assert solution.loss == pytest.approx(optimum, rel=1e-9)


def test_pairwise_terms_change_the_answer() -> None:
    matrix = np.zeros((2, 2))
    matrix[1, 1] = 10.0
    alone = Problem([[1.0, 0.0]] * 2, [[0, 1]] * 2, 2)
    joined = Problem([[1.0, 0.0]] * 2, [[0, 1]] * 2, 2, pairwise=[(0, 1, matrix)])
    assert solve(alone).choice.tolist() == [1, 1]
    assert sorted(solve(joined, "relaxation").choice.tolist()) == [0, 1]


def test_uniform_goes_by_label_not_by_index() -> None:
    problem = Problem(
        [[3.0, 1.0, 0.0], [0.0, 5.0], [7.0]],
        [[1, 2, 3], [3, 1], [1]],
        100,
        options=[["w2", "w4", "dense"], ["dense", "w2"], ["dense"]],
    )
    assert [label for label, _ in Uniform().candidates(problem)] == ["w2", "dense"]
    assert solve(problem, "uniform").choice.tolist() == [2, 0, 0]
    assert solve(problem.with_budget(3), "uniform").choice.tolist() == [0, 1, 0]
    nothing = solve(Problem([[1.0, 0.0]] * 2, [[0, 3], [3, 0]], 1), "uniform")
    assert nothing.status is Status.UNKNOWN
    assert "none of the 2 options" in nothing.message


def test_greedy_takes_the_steepest_steps_that_fit() -> None:
    # Steps: group 0 saves 8 for 2, then 1 for 1; group 1 saves 6 for 3. A budget of 4 takes 8/2 and 1/1.
    problem = Problem([[9.0, 1.0, 0.0], [6.0, 0.0]], [[0, 2, 3], [0, 3]], 4)
    solution = solve(problem, "greedy")
    assert solution.choice.tolist() == [2, 0]
    assert solution.bound == -math.inf
    assert solve(problem.with_budget(5), "greedy").choice.tolist() == [1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_that_tables_expect(seed: int) -> None:
    problem = curves(60, 40, seed)
    loss = {s: solve(problem, s).loss for s in ("exact", "dp", "lagrangian", "greedy", "uniform")}
    assert loss["exact"] <= min(loss.values())
    assert loss["greedy"] < loss["uniform"]
