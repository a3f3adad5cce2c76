"""Widths of channel groups: brute force over small networks, bounds, the closed form against the conic solver."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from solvers import ProblemError, Status
from solvers.widths import (
    WidthProblem,
    _conic,
    bound_at,
    fitted_logs,
    improved,
    largest_widths,
    relaxed_widths,
    solve_widths,
)


def chain(widths: list[int], limit: Any, *, macs: float | None = None, step: int = 1, widest: float = 1.0) -> Any:
    """Layers 3 -> widths -> 10 with 3x3 kernels, on images half as large after each layer; norms beside them."""
    G = len(widths)
    ends = [3, *widths, 10]
    pairs, params, work, degree = [], [], [], np.zeros(G)
    for i in range(G + 1):
        a, b = i - 1 if i > 0 else G, i if i < G else G
        fixed = (ends[i] if a == G else 1) * (ends[i + 1] if b == G else 1)
        pairs.append((a, b))
        params.append(9 * fixed)
        work.append(9 * fixed * max(1, 64 >> (2 * i)))
        for g in {a, b} - {G}:
            degree[g] += 1
            pairs.append((g, G))
            params.append(2)
            work.append(0)
    limits = [limit] if macs is None else [limit, macs]
    allowed = [np.arange(step, int(w * widest) + 1, step) for w in widths]
    return WidthProblem(
        degree,
        np.array(widths),
        allowed,
        np.array([params] if macs is None else [params, work]),
        np.array(pairs),
        np.array(limits),
        ["params", "macs"],
    )


def inner(rng: np.random.Generator, limits: int = 1) -> WidthProblem:
    """Groups that never meet in a product: the widths inside residual blocks."""
    G = 4
    cost = rng.integers(5, 60, (limits, G))
    given = rng.integers(4, 9, G)
    limit = (cost @ given) * rng.uniform(0.3, 0.7, limits) + 30
    pair = np.array([(g, G) for g in range(G)] + [(G, G)])
    coefficient = np.concatenate([cost, np.full((limits, 1), 30)], axis=1)
    return WidthProblem(
        rng.integers(1, 4, G).astype(float), given, [np.arange(1, n + 1) for n in given], coefficient, pair, limit
    )


def best_by_force(problem: WidthProblem) -> float:
    every = np.array(list(itertools.product(*(a.tolist() for a in problem.allowed))))
    fitting = every[(problem.cost(every) <= problem.limit).all(axis=1)]
    return max(problem.value(w) for w in fitting)


SMALL = [
    chain([6, 8, 7], 700),
    chain([6, 8, 7], 400, macs=9000),
    chain([6, 8, 7], 1e9, macs=6000),
    chain([8, 8, 8], 900, step=2),
    chain([5, 4, 6], 900, widest=2.0),
    chain([12, 12], 800, macs=20000, widest=1.5),
    *(inner(np.random.default_rng(seed)) for seed in range(6)),
    *(inner(np.random.default_rng(seed), 2) for seed in range(4)),
]


@pytest.mark.parametrize("problem", SMALL, ids=[str(i) for i in range(len(SMALL))])
def test_brute_force_lies_between_the_answer_and_its_bound(problem: WidthProblem) -> None:
    found = solve_widths(problem)
    best = best_by_force(problem)
    assert problem.fits(found.widths)
    assert found.value <= best + 1e-12
    assert best <= found.bound + 1e-12
    assert found.relaxed_value >= best - 1e-6
    assert found.bound <= found.relaxed_value + 1e-4
    again = solve_widths(problem)
    assert np.array_equal(again.widths, found.widths)


def test_most_small_cases_are_solved_to_the_optimum() -> None:
    """Not a law: steps down of one group at a time can be stuck."""
    hits = sum(solve_widths(p).value >= best_by_force(p) - 1e-12 for p in SMALL)
    assert hits >= len(SMALL) - 1


@pytest.mark.parametrize("seed", range(8))
def test_the_closed_form_is_what_the_conic_solver_finds(seed: int) -> None:
    problem = inner(np.random.default_rng(seed))
    closed, method = relaxed_widths(problem)
    assert method == "closed form"
    np.testing.assert_allclose(closed, _conic(problem), rtol=2e-3)
    # Water-filling: the budget is used up, and what is between its ends has one price.
    assert float(problem.cost(closed)[0]) == pytest.approx(problem.limit[0], rel=1e-9)
    between = (closed > problem.low) & (closed < problem.high)
    price = problem.degree / closed / problem.coefficient[0, :-1]
    assert np.ptp(price[between]) <= 1e-9 * price[between].max(initial=1.0)
    assert bound_at(problem, closed) == pytest.approx(problem.value(closed), abs=1e-8)


def test_a_chain_gives_free_layers_equal_parameters_at_both_ends() -> None:
    """KKT of a chain of two groups without norms: 27 n1 = 90 n2, what the ends pay beside the layer in the middle."""
    pair, coefficient = np.array([(2, 0), (0, 1), (1, 2)]), np.array([[27, 9, 90]])
    given = np.array([1000, 1000])
    problem = WidthProblem(
        np.array([2.0, 2.0]), given, [np.arange(1, 1001)] * 2, coefficient, pair, np.array([20_000.0])
    )
    n1, n2 = relaxed_widths(problem)[0]
    assert 27 * n1 == pytest.approx(90 * n2, rel=1e-3)  # flat there: the value is right to the square of that
    assert problem.cost(np.array([n1, n2]))[0] == pytest.approx(20_000, rel=1e-6)


def test_a_bound_holds_from_any_widths() -> None:
    problem = chain([6, 8, 7], 700)
    best = best_by_force(problem)
    for widths in np.random.default_rng(0).uniform(1, 6, (20, 3)):
        assert bound_at(problem, widths) >= best - 1e-9


def test_two_limits_hold_at_once_and_each_alone_allows_more() -> None:
    both = chain([16, 16, 16], 2500, macs=36_000)
    found = solve_widths(both)
    assert (found.cost <= [2500, 36_000]).all()
    for one in (chain([16, 16, 16], 2500, macs=1e12), chain([16, 16, 16], 1e12, macs=36_000)):
        assert solve_widths(one).value > found.value


def test_no_single_step_improves_an_answer() -> None:
    problem = chain([6, 8, 7], 700)
    found = improved(problem, problem.low)
    for g in range(problem.groups):
        up = found.copy()
        up[g] += 1
        assert up[g] > problem.high[g] or not problem.fits(up)


def test_everything_stays_where_it_fits() -> None:
    found = solve_widths(chain([6, 8, 7], 1e9))
    assert found.widths.tolist() == [6, 8, 7]
    assert (found.value, found.status, found.method) == (0.0, Status.OPTIMAL, "all")


def test_what_cannot_fit_says_what_the_smallest_widths_take() -> None:
    found = solve_widths(chain([6, 8, 7], 100, macs=2000))
    assert found.status is Status.INFEASIBLE
    # 27 + 9 + 9 + 90 of the layers, 2 for each norm of each side: 6 sides.
    assert found.message == "the smallest widths take 147 params, the limit is 100"


def test_uniform_ratios_are_the_largest_that_fit() -> None:
    problem = chain([60, 80, 70], 40_000)
    found = largest_widths(problem, lambda t: np.full(3, t), "uniform")
    ratio = found.widths / problem.given
    assert np.ptp(ratio) < 0.02
    assert problem.fits(found.widths)
    assert not problem.fits(np.round(problem.given * (ratio.mean() + 0.02)).astype(int))
    assert found.bound == -math.inf
    assert found.value < solve_widths(problem).value


def test_densities_that_widths_have_are_fitted_exactly() -> None:
    problem = chain([60, 80, 70], 40_000)
    ratios = np.array([0.5, 0.25, 0.8])
    shares = np.array([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]])
    logs = fitted_logs(problem, shares, np.exp(shares @ np.log(ratios)))
    np.testing.assert_allclose(np.exp(logs), ratios, rtol=1e-9)
    # Nothing gets wider than it was.
    assert (fitted_logs(problem, shares, np.full(4, 4.0)) == 0.0).all()


def test_what_does_not_fit_together_is_refused() -> None:
    def problem(given: list[int], allowed: list[int], pair: list[int], **names: Any) -> Any:
        return WidthProblem(
            np.ones(1), np.array(given), [np.array(allowed)], np.array([[1]]), np.array([pair]), np.ones(1), **names
        )

    with pytest.raises(ProblemError, match="2 entries in given, but 1 in degree"):
        problem([2, 3], [1], [0, 1])
    with pytest.raises(ProblemError, match=r"group 'stem' may have widths \[3, 2\]; needed positive, rising ones"):
        problem([2], [3, 2], [0, 1], names=["stem"])
    with pytest.raises(ProblemError, match="pairs name groups 0 to 5"):
        problem([2], [1], [0, 5])
