"""Every solver on every instance of the suite; one added to the registry is covered without a new test."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from solvers import SOLVERS, Problem, ProblemError, Solution, Status, solve
from solvers.instances import Instance, brute_force, correlated, curves, paired, planted, several, suite, uncorrelated

INSTANCES = suite()
PAIRS = [(solver, instance) for solver in sorted(SOLVERS) for instance in INSTANCES]
TAKEN = [(s, i) for s, i in PAIRS if not SOLVERS[s].why_not(i.problem)]
IDS = [f"{s}-{i.name}" for s, i in TAKEN]
EXACT = {"exact"}  # proven optimal on whatever it takes


def solved(solver: str, problem: Problem) -> Solution:
    return solve(problem, solver)


@pytest.mark.parametrize(("solver", "instance"), TAKEN, ids=IDS)
def test_certificate(solver: str, instance: Instance) -> None:
    """Feasible in exact integers, bound ≤ optimum ≤ loss, infeasible said where it is and only there."""
    problem, optimum = instance.problem, instance.optimum
    assert optimum is not None
    solution = solve(problem, solver)
    assert solution.bound <= optimum <= solution.loss
    if optimum == math.inf:
        assert solution.status in (Status.INFEASIBLE, Status.UNKNOWN)
        assert not solution.found
        if problem.integer and solution.status is Status.INFEASIBLE and problem.lower is None:
            assert solution.smallest_budget is not None
            assert (solution.smallest_budget > problem.budget).any()
        return
    assert solution.status is not Status.INFEASIBLE
    if not solution.found:
        assert solver in ("greedy", "uniform", "lagrangian", "relaxation")
        return
    # Python integers: no overflow and no tolerance.
    for r, budget in enumerate(problem.budget.tolist()):
        column = [a[j, r].item() for a, j in zip(problem.cost, solution.choice, strict=True)]
        assert (sum(column) if problem.integer else math.fsum(column)) <= budget
    if solution.status is Status.OPTIMAL:
        assert solution.loss == pytest.approx(optimum, rel=1e-12, abs=1e-12 * abs(optimum))
    if solver in EXACT:
        assert solution.status is Status.OPTIMAL


@pytest.mark.parametrize(("solver", "instance"), TAKEN, ids=IDS)
def test_deterministic(solver: str, instance: Instance) -> None:
    a, b = solve(instance.problem, solver, seed=3), solve(instance.problem, solver, seed=3)
    assert a.choice.tolist() == b.choice.tolist()
    assert (a.loss, a.bound, a.status, a.iterations) == (b.loss, b.bound, b.status, b.iterations)


@pytest.mark.parametrize(
    ("solver", "instance"),
    [(s, i) for s, i in PAIRS if SOLVERS[s].why_not(i.problem)],
    ids=lambda v: getattr(v, "name", v),
)
def test_refusal_names_the_solver(solver: str, instance: Instance) -> None:
    with pytest.raises(ProblemError, match=f"solver '{solver}'"):
        solve(instance.problem, solver)


def unambiguous() -> list[Problem]:
    """Problems without ties, of the kinds that one solver or another takes."""
    return [
        uncorrelated(12, 9, 3),
        curves(12, 9, 4),
        several(8, 6, 3, 5),
        paired(6, 5, 6),
        Problem(list(np.random.default_rng(7).random((6, 5))), uncorrelated(6, 5, 8).cost, 200_000, objective="max"),
    ]


CASES = [(s, k) for s in sorted(SOLVERS) for k, p in enumerate(unambiguous()) if not SOLVERS[s].why_not(p)]


@pytest.mark.parametrize(("solver", "k"), CASES)
@pytest.mark.parametrize("power", [-100, 100])
def test_scale_of_losses_changes_nothing(solver: str, k: int, power: int) -> None:
    """A power of two (about 1e±30) is exact in floats, so the choice stays, and loss and bound scale."""
    problem = unambiguous()[k]
    pairs = [(p.first, p.second, np.ldexp(p.loss, power)) for p in problem.pairwise]
    scaled = Problem(
        [np.ldexp(a, power) for a in problem.loss],
        problem.cost,
        problem.budget,
        problem.resources,
        pairwise=pairs,
        objective=problem.objective,
    )
    a, b = solve(problem, solver), solve(scaled, solver)
    assert a.choice.tolist() == b.choice.tolist()
    assert a.status == b.status
    assert math.ldexp(a.loss, power) == b.loss
    if math.isfinite(a.bound):
        assert math.ldexp(a.bound, power) == pytest.approx(b.bound, rel=1e-9)


@pytest.mark.parametrize(("solver", "k"), [(s, k) for s, k in CASES if not unambiguous()[k].pairwise])
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_decimal_scale_of_losses_changes_no_loss(solver: str, k: int, factor: float) -> None:
    problem = unambiguous()[k]
    a, b = solve(problem, solver), solve(problem.with_loss([factor * loss for loss in problem.loss]), solver)
    assert b.loss == pytest.approx(factor * a.loss, rel=1e-9)
    assert a.status == b.status


@pytest.mark.parametrize(("solver", "k"), CASES)
def test_permutation_of_groups_and_options(solver: str, k: int) -> None:
    problem = unambiguous()[k]
    rng = np.random.default_rng(11)
    groups = rng.permutation(problem.groups)
    # Uniform means one index everywhere, so there one permutation of options serves all groups.
    common = rng.permutation(len(problem.loss[0]))
    options = [common if solver == "uniform" else rng.permutation(len(problem.loss[g])) for g in groups]
    at = {int(g): k for k, g in enumerate(groups)}
    pairs = [
        (at[p.first], at[p.second], p.loss[np.ix_(options[at[p.first]], options[at[p.second]])])
        for p in problem.pairwise
    ]
    moved = Problem(
        [problem.loss[g][o] for g, o in zip(groups, options, strict=True)],
        [problem.cost[g][o] for g, o in zip(groups, options, strict=True)],
        problem.budget,
        problem.resources,
        pairwise=pairs,
        objective=problem.objective,
    )
    a, b = solve(problem, solver), solve(moved, solver)
    assert a.status == b.status
    assert b.loss == pytest.approx(a.loss, rel=1e-12 if solver not in ("milp", "relaxation") else 0.05)
    if a.status is Status.OPTIMAL and problem.objective == "sum":
        back = {int(g): int(o[j]) for g, o, j in zip(groups, options, b.choice, strict=True)}
        assert [back[g] for g in range(problem.groups)] == a.choice.tolist()


@pytest.mark.parametrize("solver", ["exact", "dp", "minimax"])
def test_loss_never_rises_with_the_budget(solver: str) -> None:
    """For solvers that are exact on these: 60 budgets of a problem with small integer costs."""
    rng = np.random.default_rng(5)
    loss, cost = list(rng.random((6, 7))), list(rng.integers(0, 30, (6, 7)))
    least = sum(int(c.min()) for c in cost)
    objective = "max" if solver == "minimax" else "sum"
    previous = math.inf
    for budget in range(least, least + 60):
        solution = solve(Problem(loss, cost, budget, objective=objective), solver)
        assert solution.status is Status.OPTIMAL
        assert solution.loss <= previous
        previous = solution.loss


LARGE = [correlated(1000, 256, 1), several(400, 100, 3, 1), paired(40, 30, 1)]
LIMITED = [(s, k) for s in sorted(SOLVERS) for k, p in enumerate(LARGE) if not SOLVERS[s].why_not(p)]


@pytest.mark.parametrize(("solver", "k"), LIMITED)
def test_time_limit(solver: str, k: int) -> None:
    """Within 20% of the limit, on problems that several solvers cannot finish by then; what they have is checked."""
    limit = 0.7
    solve(unambiguous()[0 if k == 0 else k + 1], solver)  # heavy libraries load on first use
    assert len(LARGE[k].flat.loss)  # flattened once, and kept
    for _ in range(4):
        begun = time.process_time()
        solution = solve(LARGE[k], solver, time_limit=limit)
        # Another process may have had the processor: more tries, and processor time, tell that from a blind solver.
        taken = min(solution.seconds, time.process_time() - begun)
        if taken <= 1.2 * limit:
            break
    assert taken <= 1.2 * limit
    assert solution.status is not Status.INFEASIBLE
    if solver == "exact":
        assert solution.status is Status.TIME_LIMIT
        assert solution.gap < 1e-3


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_planted_optimum_bounds_everybody(solver: str) -> None:
    """At a size nobody can try all choices of: the budget lies exactly on a breakpoint, and the optimum is known."""
    instance = planted(120, 40, 2)
    solution = solve(instance.problem, solver)
    assert instance.optimum is not None
    assert solution.bound <= instance.optimum <= solution.loss
    if solver in ("exact", "lagrangian", "milp", "relaxation"):
        assert solution.status is Status.OPTIMAL


def test_brute_force_is_itself_right() -> None:
    problem = Problem([[3.0, 1.0, 0.0], [5.0, 2.0, 1.0]], [[0, 2, 5], [1, 3, 4]], 6)
    loss, choice = brute_force(problem)
    assert loss == 2.0  # 1 + 1 at cost 2 + 4
    assert choice is not None
    assert choice.tolist() == [1, 2]
    with pytest.raises(ProblemError, match="9 choices are too many to try; at most 8"):
        brute_force(problem, most=8)
