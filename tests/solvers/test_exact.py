"""One resource: exact solvers against trying all choices, thousands of times; hulls, duals and the frontier."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Problem, Status, frontier, solve
from solvers.dp import DP
from solvers.exact import Exact
from solvers.hulls import _chain, hulls, pareto
from solvers.instances import (
    brute_force,
    correlated,
    curves,
    planted,
    subset_sum,
    surfaces,
    uncorrelated,
    wide,
)
from solvers.lagrangian import Rows, bound_at, dual, whole
from solvers.relaxation import marginal, relax
from solvers.solution import magnitude

LOSSES = st.one_of(
    st.integers(0, 4).map(float),
    st.floats(-10, 10, allow_nan=False).map(lambda x: x if abs(x) > 1e-200 else 0.0),
    st.floats(-30, 30).map(lambda x: 10.0**x),
)


@st.composite
def problems(draw: st.DrawFn, kind: str = "int") -> Problem:
    groups = draw(st.integers(1, 5))
    sizes = [draw(st.integers(1, 4)) for _ in range(groups)]
    top = draw(st.sampled_from([3, 20, 10**12]))
    costs = st.integers(-2, top) if kind == "int" else st.integers(0, 3000).map(lambda k: k / 1000)
    loss = [draw(st.lists(LOSSES, min_size=n, max_size=n)) for n in sizes]
    cost = [np.array(draw(st.lists(costs, min_size=n, max_size=n))) for n in sizes]
    least, most = sum(c.min() for c in cost), sum(c.max() for c in cost)
    part = draw(st.floats(-0.1, 1.0))
    budget = least + part * (most - least)
    return Problem(loss, cost, int(budget) if kind == "int" else float(budget))


def agree(problem: Problem, solver: str) -> None:
    optimum, _ = brute_force(problem)
    solution = solve(problem, solver)
    if optimum == math.inf:
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.status is Status.OPTIMAL, solution
    assert solution.bound <= optimum <= solution.loss
    # The rounding of a float64 sum, measured against what is added; losses of one sign leave nothing else.
    assert solution.loss - optimum <= 1e-12 * magnitude(problem, solution.choice)
    if all((a >= 0).all() for a in problem.loss):
        assert solution.loss == pytest.approx(optimum, rel=1e-12, abs=0)


@given(problems())
@settings(max_examples=2500)
def test_exact_equals_trying_all(problem: Problem) -> None:
    agree(problem, "exact")


@given(problems())
@settings(max_examples=500)
def test_dp_with_unit_buckets_equals_trying_all(problem: Problem) -> None:
    if int(problem.budget[0]) - int(problem.smallest()[0]) > 5000:
        problem = Problem(problem.loss, [c % 97 for c in problem.cost], 97)
    agree(problem, "dp")


@given(problems("float"))
@settings(max_examples=600)
def test_exact_with_float_costs_equals_trying_all(problem: Problem) -> None:
    agree(problem, "exact")


@given(problems(), st.integers(1, 12))
@settings(max_examples=400)
def test_dp_with_few_buckets_keeps_the_budget_and_proves(problem: Problem, buckets: int) -> None:
    """The published DP rounds to the nearest bucket and breaks its budget; `solve` would raise here if this one did."""
    optimum, _ = brute_force(problem)
    solution = solve(problem, DP(buckets=buckets))
    assert solution.bound <= optimum <= solution.loss
    assert (solution.status is Status.INFEASIBLE) == (optimum == math.inf)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [curves, surfaces, uncorrelated, correlated, subset_sum, wide])
def test_exact_and_dp_agree_at_sizes_nobody_can_try(make: object, seed: int) -> None:
    problem = make(30, 20, seed)  # type: ignore[operator]
    exact = solve(problem)
    assert exact.status is Status.OPTIMAL
    assert exact.gap < 1e-12
    buckets = solve(problem, DP(buckets=3000))
    assert buckets.bound <= exact.loss * (1 + 1e-12)
    assert exact.bound <= buckets.loss


def test_exact_knows_planted_optima() -> None:
    for size in ((20, 100), (224, 64), (500, 100)):
        instance = planted(*size, seed=4)
        assert solve(instance.problem).loss == instance.optimum


def test_few_states_still_give_a_checked_answer_with_its_gap() -> None:
    problem = correlated(60, 100, 3)
    poor, rich = solve(problem, Exact(max_states=50)), solve(problem)
    assert poor.status is Status.FEASIBLE
    assert poor.bound <= rich.loss <= poor.loss
    assert poor.gap < 1e-2


def test_a_loss_far_above_the_best_does_not_drown_it() -> None:
    """Found by hypothesis: the cheapest choice holds a loss of 1e17, and the proof of 1 was lost in its rounding."""
    problem = Problem([[0.0, 1e17, -1.0], [0.0, 0.0, 1.0]], [[0, -1, 0], [0, 0, -1]], -1)
    solution = solve(problem)
    assert solution.status is Status.OPTIMAL
    assert solution.loss == 0.0
    assert solution.bound > -1e-12


def test_price_is_what_a_byte_saves() -> None:
    problem = curves(60, 40, 1)
    solution = solve(problem)
    assert solution.price is not None
    more = solve(problem.with_budget(int(problem.budget[0]) + 20_000))
    saved = (solution.loss - more.loss) / 20_000
    assert saved == pytest.approx(float(solution.price[0]), rel=0.25)


@pytest.mark.parametrize("solver", ["exact", "lagrangian", "milp", "relaxation"])
def test_price_is_per_unit_whatever_the_unit(solver: str) -> None:
    problem = uncorrelated(40, 20, 1)
    loss, cost, budget = problem.loss, problem.cost, int(problem.budget[0])
    prices = [solve(Problem(loss, [k * c for c in cost], k * budget), solver).price for k in (1, 6, 0.5, 0.001)]
    for price, k in zip(prices, (1, 6, 0.5, 0.001), strict=True):
        assert price is not None
        assert price.shape == (1,)
        assert float(price[0]) * k == pytest.approx(float(prices[0][0]), rel=1e-4)  # type: ignore[index]


@given(problems(), st.floats(0, 1e3))
@settings(max_examples=300)
def test_every_price_gives_a_bound(problem: Problem, price: float) -> None:
    optimum, _ = brute_force(problem)
    cost, limit, _ = whole(problem.flat, up=True)
    rows = Rows.of(problem.flat, cost, limit)
    assert rows.true(bound_at(rows, np.array([price]))[0]) <= optimum


@given(problems())
@settings(max_examples=300)
def test_the_dual_is_the_linear_relaxation(problem: Problem) -> None:
    """Its bound is the largest over prices: none of a grid of prices around it does better."""
    cost, limit, _ = whole(problem.flat, up=True)
    rows = Rows.of(problem.flat, cost, limit)
    at = dual(rows)
    if at is None or at.over is None:
        return
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert bound_at(rows, np.array([factor * at.price]))[0] <= at.bound + 1e-9 * (1 + at.bound)


@given(problems())
@settings(max_examples=300)
def test_hulls_are_those_of_the_monotone_chain(problem: Problem) -> None:
    flat = problem.flat
    hull = hulls(flat.loss, flat.cost[:, 0], flat.start)
    front = pareto(flat.loss, flat.cost[:, 0], flat.start)
    for g in range(problem.groups):
        own = front[flat.group[front] == g]
        assert hull.rows[hull.start[g] : hull.start[g + 1]].tolist() == _chain(own, flat.loss, flat.cost[:, 0]).tolist()


def test_hulls_of_a_curve_that_ends_in_a_cliff() -> None:
    """Convex but for a last point far below: vertices go one per pass, so the scalar chain takes over."""
    cost = np.arange(300)
    loss: np.ndarray = np.reciprocal(np.arange(1.0, 301.0))
    loss[-1] = -1000.0
    hull = hulls(loss, cost, np.array([0, 300]))
    assert hull.rows.tolist() == [0, 299]


@given(problems())
@settings(max_examples=300)
def test_frontier_points_are_optimal_for_what_they_cost(problem: Problem) -> None:
    front = frontier(problem)
    assert (np.diff(front.cost) > 0).all()
    assert (np.diff(front.loss) <= 0).all()
    assert front.cost[0] == problem.smallest()[0]
    for k in range(len(front)):
        choice = front.choice(k)
        assert problem.total_cost(choice)[0] == front.cost[k]
        assert front.loss[k] == pytest.approx(
            problem.total_loss(choice), rel=1e-12, abs=1e-12 * sum(np.abs(a).max() for a in problem.loss)
        )
        optimum, _ = brute_force(problem.with_budget(front.cost[k]))
        assert front.bound[k] <= optimum + 1e-15 * abs(optimum)
        assert optimum == pytest.approx(
            front.loss[k], rel=1e-12, abs=1e-12 * sum(np.abs(a).max() for a in problem.loss)
        )


def test_frontier_solves_between_its_breakpoints() -> None:
    problem = curves(40, 20, 2)
    front = frontier(problem)
    middle = [int((a + b) // 2) for a, b in zip(front.cost[10:14], front.cost[11:15], strict=True)]
    asked = frontier(problem, middle)
    for k, solution in enumerate(asked.solutions):
        assert solution.status is Status.OPTIMAL
        assert front.loss[11 + k] <= solution.loss <= front.loss[10 + k]
    assert asked.gap.max() < 1e-12


def test_marginal_prices_bracket_the_price() -> None:
    problem = curves(30, 50, 5, noise=0.0)
    relaxed = relax(problem)
    solution = solve(problem)
    assert relaxed is not None
    up, down = marginal(problem, solution.choice)
    price = float(relaxed.price[0])
    # Smooth convex curves: groups that fill the budget up stand off the price by part of a step, the others do not.
    assert ((up <= price * 1.001) & (price * 0.999 <= down)).sum() >= 24
    assert ((up <= price * 1.1) & (price * 0.9 <= down)).all()
    assert relaxed.value.shape == (30,)
    # Strong duality: Σ value - price · budget is the bound.
    assert relaxed.value.sum() - price * problem.budget[0] == pytest.approx(relaxed.bound, rel=1e-6)
