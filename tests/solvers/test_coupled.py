"""Groups that must agree: against trying every set of levels and every choice, and on chains like networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Problem, ProblemError, SolutionError, Status, solve
from solvers.coupled import Coupling, _Search, solve_coupled
from solvers.problem import Deadline


@st.composite
def coupled(draw: st.DrawFn) -> tuple[Problem, Coupling]:
    groups, resources = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    levels = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    loss, cost, scope, state = [], [], [], []
    for _ in range(groups):
        own = draw(st.lists(st.integers(0, len(levels) - 1), max_size=2, unique=True))
        n = draw(st.integers(1, 5))
        loss.append(draw(st.lists(st.integers(-10, 50).map(float), min_size=n, max_size=n)))
        cost.append(
            np.array(draw(st.lists(st.integers(0, 20), min_size=n * resources, max_size=n * resources))).reshape(n, -1)
        )
        scope.append(own)
        state.append(np.array([[draw(st.integers(0, levels[v] - 1)) for v in own] for _ in range(n)]).reshape(n, -1))
    most = sum(c.max(axis=0) for c in cost)
    budget = np.array([math.floor(draw(st.floats(0.1, 1.0)) * m) for m in most])
    return Problem(loss, cost, budget, [f"r{k}" for k in range(resources)]), Coupling(levels, scope, state)


def trying_all(problem: Problem, coupling: Coupling) -> float:
    best = math.inf
    for choice in itertools.product(*(range(len(a)) for a in problem.loss)):
        try:
            coupling.assignment(np.array(choice))
        except SolutionError:
            continue
        if problem.feasible(np.array(choice)):
            best = min(best, problem.total_loss(np.array(choice)))
    return best


@given(coupled())
@settings(max_examples=150, deadline=None)
def test_against_trying_all(case: tuple[Problem, Coupling]) -> None:
    problem, coupling = case
    optimum = trying_all(problem, coupling)
    found = solve_coupled(problem, coupling)
    assert (found.status is Status.INFEASIBLE) == (optimum == math.inf)
    assert found.bound <= optimum + 1e-9 or optimum == math.inf
    if optimum < math.inf:
        coupling.assignment(found.choice)
        assert problem.feasible(found.choice)
        assert found.loss == problem.total_loss(found.choice)
        assert found.bound <= found.loss
        assert found.loss <= optimum + 2e-4 * abs(optimum) + 1e-4


def network(blocks: int, options: int, resources: int, seed: int, levels: int = 4) -> tuple[Problem, Coupling]:
    """A residual chain: one stage variable, and one inner variable for the two layers of each block."""
    rng = np.random.default_rng(seed)
    loss, cost, scope, state = [], [], [], []
    kept = np.linspace(1.0, 0.25, levels)
    for layer in range(2 * blocks):
        inner = 1 + layer // 2
        own = (0, inner) if layer % 2 == 0 else (inner, 0)
        size, weight = float(np.exp(rng.uniform(6, 12))), float(np.exp(rng.normal()))
        sharp = rng.uniform(2, 4)
        a, b, c, d = [], [], [], []
        for x, y in itertools.product(range(levels), repeat=2):
            bits = np.sort(rng.uniform(0.02, 1.0, options))
            a.append(weight * (np.exp(-6 * bits) * kept[y] + sharp * (1 - kept[x]) ** 2))
            b.append((size * kept[x] * kept[y] * bits).astype(np.int64))
            c.append(np.full(options, int(size * 64 * kept[x] * kept[y])))
            d.append(np.tile([x, y], (options, 1)))
        loss.append(np.concatenate(a))
        cost.append(np.stack([np.concatenate(b), np.concatenate(c)], axis=1)[:, :resources])
        scope.append(own)
        state.append(np.concatenate(d))
    most = sum(c.max(axis=0) for c in cost)
    budget = (most * np.array([0.25, 0.6])[:resources]).astype(np.int64)
    names = ("bytes", "macs")[:resources]
    return Problem(loss, cost, budget, names), Coupling([levels] * (1 + blocks), scope, state)


@pytest.mark.parametrize("resources", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_a_network_is_solved_to_its_gap(resources: int, seed: int) -> None:
    problem, coupling = network(9, 12, resources, seed)
    found = solve_coupled(problem, coupling)
    assert found.gap <= 1e-4
    levels = coupling.assignment(found.choice)
    # What these levels leave is an ordinary problem, whose optimum this is; and full width alone is no better.
    for wanted in (levels, np.zeros_like(levels)):
        part = at_levels(problem, coupling, wanted.tolist())
        alone = solve(part, "exact" if resources == 1 else "milp")
        if alone.found:
            assert alone.loss >= found.bound - 1e-12
    assert solve(at_levels(problem, coupling, levels.tolist()), "milp").loss <= found.loss * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_levels_are_better(seed: int) -> None:
    """Every set of levels of a small network, each solved by itself: what the bound took out held nothing better."""
    problem, coupling = network(3, 5, 2, seed, levels=3)
    found = solve_coupled(problem, coupling)
    each = [solve(at_levels(problem, coupling, levels), "milp") for levels in itertools.product(range(3), repeat=4)]
    best = min(solution.loss for solution in each)
    assert found.loss <= best * (1 + 1e-4)
    assert found.bound <= best


def at_levels(problem: Problem, coupling: Coupling, levels: Sequence[int]) -> Problem:
    keep = [
        (s == [levels[v] for v in scope]).all(axis=1) for s, scope in zip(coupling.state, coupling.scope, strict=True)
    ]
    return Problem(
        [a[k] for a, k in zip(problem.loss, keep, strict=True)],
        [c[k] for c, k in zip(problem.cost, keep, strict=True)],
        problem.budget,
        problem.resources,
    )


def test_without_couplings_it_is_the_plain_problem() -> None:
    problem, coupling = network(4, 10, 1, 5)
    free = Coupling([], [()] * problem.groups, [np.zeros((len(a), 0), int) for a in problem.loss])
    plain, loose = solve(problem), solve_coupled(problem, free)
    assert loose.loss == pytest.approx(plain.loss, rel=1e-4)
    assert loose.loss <= solve_coupled(problem, coupling).loss * (1 + 1e-4)


def test_the_smallest_budget_of_agreeing_choices_is_named() -> None:
    """Each group alone could be cheaper than what they can be together."""
    problem = Problem([[0.0, 1.0]] * 2, [[[5], [1]], [[1], [9]]], 5)
    coupling = Coupling([2], [(0,), (0,)], [np.array([[0], [1]])] * 2)
    found = solve_coupled(problem, coupling)
    assert found.status is Status.INFEASIBLE
    assert found.smallest_budget is not None
    assert found.smallest_budget.tolist() == [6]
    assert solve_coupled(problem.with_budget(6), coupling).choice.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("coupling", "says"),
    [
        (lambda: Coupling([2], [(0,)], [np.array([[2]])]), "its variables do not have"),
        (lambda: Coupling([2], [(0, 0)], [np.array([[0, 1]])]), "each once at most"),
        (lambda: Coupling([2], [(0,)], [np.array([0])]), "states of shape"),
        (lambda: Coupling([2], [(0,), (0,)], [np.array([[0]])]), "1 have states"),
    ],
)
def test_couplings_that_are_none(coupling: Callable[[], Coupling], says: str) -> None:
    with pytest.raises(ProblemError, match=says):
        coupling()


def test_variables_that_hang_together_too_much_are_refused_with_what_to_do() -> None:
    levels = [40] * 5
    scope = list(itertools.combinations(range(5), 2))
    state = [np.zeros((1, 2), int)] * len(scope)
    problem = Problem([[0.0]] * len(scope), [[1]] * len(scope), 100)
    with pytest.raises(ProblemError, match="fewer levels"):
        solve_coupled(problem, Coupling(levels, scope, state))


def test_what_highs_finds_is_kept_when_no_time_is_left_to_solve_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, coupling = network(9, 12, 2, 1)
    search = _Search(problem, coupling, 1e-6, Deadline(None))
    price, _ = search._prices()

    def out_of_time(self: _Search, levels: tuple[int, ...]) -> None:
        del self, levels

    monkeypatch.setattr(_Search, "_try", out_of_time)
    search._highs([search._left(g, price) for g in range(problem.groups)])
    assert search.choice is not None
    assert problem.feasible(search.choice)
    coupling.assignment(search.choice)
