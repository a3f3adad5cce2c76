"""Problem and Solution: validation in words, exact sums, round trips, and certificates that cannot be forged."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solvers import SOLVERS, Problem, ProblemError, Solution, SolutionError, Status, solve
from solvers.instances import paired, several, suite

LOSS, COST = [[1.0, 0.0], [2.0, 0.5]], [[0, 3], [1, 4]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": [], "cost": []}, "the problem has no groups"),
        ({"loss": LOSS[:1]}, "1 groups have losses but 2 have costs"),
        (
            {"loss": [[1.0, 0.0, 3.0], [2.0, 0.5]]},
            "group 'g0' has 3 losses but 2 costs; both need one entry per option",
        ),
        ({"names": ["stem", "head"], "loss": [[1.0], [2.0, 0.5]]}, "group 'stem' has 1 losses but 2 costs"),
        ({"loss": [[1.0, math.nan], [2.0, 0.5]]}, "group 'g0' option 1 has loss nan; losses must be finite"),
        ({"loss": [[], [2.0, 0.5]]}, r"group 'g0' has losses of shape \(0,\); a non-empty vector is needed"),
        ({"cost": [[0.0, math.inf], [1, 4]]}, "group 'g0' option 1 has cost inf; costs must be finite"),
        ({"cost": [["a", "b"], [1, 4]]}, "group 'g0' has costs of shape .* and type"),
        ({"cost": [[2**61, 0], [2**61, 0]]}, r"integer costs may add up to 4611686018427387904; .*under 2\*\*62"),
        ({"resources": ("bytes", "ms")}, r"group 'g0' has 1 costs per option for 2 resources \['bytes', 'ms'\]"),
        ({"budget": [1, 2]}, r"budget has shape \(2,\) but the resources \['bytes'\] need one number each"),
        ({"budget": math.nan}, "budget for 'bytes' is nan"),
        ({"budget": "64 kB"}, "budget is '64 kB'; it needs real numbers"),
        ({"names": ["a"]}, "1 names for 2 groups"),
        ({"names": ["a", "a"]}, "two groups are named 'a'"),
        ({"options": [["dense"], ["dense", "w4"]]}, "group 'g0' has 2 losses but 1 option names"),
        ({"pairwise": [(0, 0, np.zeros((2, 2)))]}, "a pairwise term joins groups 0 and 0; two different groups"),
        ({"pairwise": [(0, 1, np.zeros((2, 3)))]}, r"has shape \(2, 3\); their options need \(2, 2\)"),
        ({"pairwise": [(0, 1, np.full((2, 2), np.inf))]}, "the pairwise term of groups 0 and 1 holds inf"),
        ({"fixed": {5: 0}}, "group 5 is fixed, but groups are 0 to 1"),
        ({"fixed": {1: 2}}, "group 'g1' is fixed to option 2, but its options are 0 to 1"),
        ({"objective": "mean"}, "objective is 'mean'; it must be 'sum' or 'max'"),
        ({"objective": "max", "pairwise": [(0, 1, np.zeros((2, 2)))]}, "pairwise terms need the objective 'sum'"),
    ],
)
def test_validation_says_what_was_got_and_what_is_needed(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        Problem(**{"loss": LOSS, "cost": COST, "budget": 5, **change})


def test_bytes_stay_exact_beyond_what_floats_hold() -> None:
    top = 2**60
    problem = Problem([[0.0, 1.0]] * 3, [np.array([top + 1, 1])] * 3, 3 * top + 2)
    assert problem.cost[0].dtype == np.int64
    assert not problem.feasible(np.array([0, 0, 0]))  # one byte over; as float64 the two sides are equal
    assert float(3 * (top + 1)) == float(3 * top + 2)
    assert problem.with_budget(3 * top + 3).feasible(np.array([0, 0, 0]))
    solution = solve(problem)
    assert solution.loss == 1.0
    assert int(solution.cost[0]) == 2 * top + 3


def test_a_float_budget_bounds_whole_bytes() -> None:
    assert Problem(LOSS, COST, 5.9).budget.tolist() == [5]
    assert Problem(LOSS, COST, 5, lower=4.1).lower.tolist() == [5]
    assert Problem(LOSS, COST, np.inf).feasible(np.array([1, 1]))


def test_float_costs_are_compared_exactly() -> None:
    problem = Problem([[0.0]] * 3, [[0.1]] * 3, 0.3, "ms")
    assert not problem.feasible(np.array([0, 0, 0]))  # 3 · 0.1000…0055 is over 0.2999…9889
    assert Problem([[0.0]] * 3, [[0.1]] * 3, math.nextafter(0.3, 1), "ms").feasible(np.array([0, 0, 0]))


@pytest.mark.parametrize("instance", suite(), ids=lambda i: i.name)
def test_problem_round_trip(instance: Any, tmp_path: Path) -> None:
    instance.problem.save(tmp_path / "p.npz")
    back = Problem.load(tmp_path / "p.npz")
    assert back.fingerprint == instance.problem.fingerprint
    assert back.cost[0].dtype == instance.problem.cost[0].dtype
    first = (tmp_path / "p.npz").read_bytes()
    back.save(tmp_path / "q.npz")
    assert (tmp_path / "q.npz").read_bytes() == first


def test_load_refuses_another_schema(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", header=np.frombuffer(b'{"schema": 99}', np.uint8))
    with pytest.raises(ProblemError, match="has schema 99; this version reads schema 1"):
        Problem.load(tmp_path / "p.npz")


def test_fingerprint_sees_every_field() -> None:
    base = Problem(LOSS, COST, 5)
    others = [
        Problem([[1.0, 0.0], [2.0, 0.25]], COST, 5),
        Problem(LOSS, [[0, 3], [1, 5]], 5),
        Problem(LOSS, COST, 6),
        Problem(LOSS, COST, 5, "ms"),
        Problem(LOSS, COST, 5, names=["a", "b"]),
        Problem(LOSS, COST, 5, options=[["x", "y"]] * 2),
        Problem(LOSS, COST, 5, lower=1),
        Problem(LOSS, COST, 5, fixed={0: 0}),
        Problem(LOSS, COST, 5, objective="max"),
        Problem(LOSS, COST, 5, pairwise=[(0, 1, np.eye(2))]),
        Problem(LOSS, [[0.0, 3.0], [1.0, 4.0]], 5),
    ]
    assert len({p.fingerprint for p in [base, *others]}) == 1 + len(others)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_solution_round_trip(solver: str, tmp_path: Path) -> None:
    for problem in (Problem(LOSS, COST, 5), Problem(LOSS, COST, 0)):
        if SOLVERS[solver].why_not(problem):
            continue
        solution = solve(problem, solver)
        solution.save(tmp_path / "s.json")
        back = Solution.load(tmp_path / "s.json").check(problem)
        assert str(back) == str(solution)
        assert back.choice.tolist() == solution.choice.tolist()
        assert (back.bound, back.gap, back.status) == (solution.bound, solution.gap, solution.status)


FORGED = [
    ({"loss": 1.5}, "loss is given as 1.5; the choice has 2.0"),
    ({"cost": np.array([3])}, r"cost is given as \[3\]; the choice has \[4\]"),
    ({"bound": 2.5}, "bound 2.5 is above the loss 2.0"),
    ({"bound": 1.0}, "status is 'optimal', but the loss 2.0 is above the bound 1.0"),
    ({"choice": np.array([1, 2])}, "group 'g1' has options 0 to 1; the choice is 2"),
    ({"choice": np.array([1])}, r"choice has shape \(1,\); the problem has 2 groups"),
    ({"choice": np.array([1, 1])}, "bytes: 7 is over the budget of 5"),
    ({"status": Status.INFEASIBLE}, "status is 'infeasible', but there is a choice"),
    ({"choice": np.array([-1, -1])}, "but there is no choice"),
]


@pytest.mark.parametrize(("change", "words"), FORGED)
def test_check_catches_a_forged_answer(change: dict[str, Any], words: str) -> None:
    problem = Problem(LOSS, COST, 5)
    solution = solve(problem).check(problem)
    assert (solution.loss, solution.status) == (1.5, Status.OPTIMAL) or solution.loss == 2.0
    honest = Solution.of(problem, np.array([1, 0]), 2.0, Status.OPTIMAL, "hand")
    honest.check(problem)
    with pytest.raises(SolutionError, match=words):
        dataclasses.replace(honest, **change).check(problem)


def test_check_catches_fixed_lower_and_a_false_infeasible() -> None:
    fixed = Problem(LOSS, COST, 7, fixed={0: 0})
    with pytest.raises(SolutionError, match="group 'g0' is fixed to option 0; the choice is 1"):
        Solution.of(fixed, np.array([1, 0]), -math.inf, Status.FEASIBLE, "hand").check(fixed)
    lower = Problem(LOSS, COST, 7, lower=6)
    with pytest.raises(SolutionError, match="bytes: 4 is under the lower bound of 6"):
        Solution.of(lower, np.array([1, 0]), -math.inf, Status.FEASIBLE, "hand").check(lower)
    with pytest.raises(SolutionError, match=r"status is 'infeasible', but the budget \[7\] covers \[1\]"):
        Solution.none(Problem(LOSS, COST, 7), Status.INFEASIBLE, "hand").check(Problem(LOSS, COST, 7))


def test_solve_checks_whoever_answers() -> None:
    problem = Problem(LOSS, COST, 5)

    def liar(problem: Problem, *, time_limit: float | None, seed: int) -> Solution:
        return Solution.of(problem, np.array([1, 1]), -math.inf, Status.FEASIBLE, "liar")

    with pytest.raises(SolutionError, match="bytes: 7 is over the budget of 5"):
        solve(problem, liar)
    with pytest.raises(ProblemError, match="there is no solver 'best'; there are dp, exact"):
        solve(problem, "best")
    with pytest.raises(ProblemError, match="time_limit is 0 seconds; it must be positive"):
        solve(problem, time_limit=0)


def test_gap() -> None:
    problem = Problem([[0.0, 1.0]], [[0, 0]], 0)
    assert solve(problem).gap == 0.0  # 0 / 0
    half = Solution.of(Problem([[3.0]], [[0]], 0), np.array([0]), 2.0, Status.FEASIBLE, "hand")
    assert half.gap == 0.5
    assert "bound 2, gap 5.00e-01" in str(half)
    nothing = Solution.of(Problem([[3.0]], [[0]], 0), np.array([0]), -math.inf, Status.FEASIBLE, "hand")
    assert nothing.gap == math.inf
    assert "no guarantee" in str(nothing)
    negative = Solution.of(Problem([[-3.0]], [[0]], 0), np.array([0]), -4.0, Status.FEASIBLE, "hand")
    assert negative.gap == 0.25


def test_infeasible_carries_advice() -> None:
    solution = solve(Problem(LOSS, COST, 0))
    assert solution.status is Status.INFEASIBLE
    assert solution.message == "the cheapest choice needs 1 bytes, the budget is 0"
    joint = Problem([np.zeros(2)] * 3, [np.array([[0, 1], [1, 0]])] * 3, [1, 1], ("bytes", "operations"))
    found = solve(joint, "milp")
    assert found.status is Status.INFEASIBLE
    assert found.smallest_budget is not None
    assert found.smallest_budget.tolist() == [2, 2]  # with the other at 1, two of three groups must pay


def test_several_resources_print_their_costs() -> None:
    problem = several(4, 4, 2, 0)
    assert str(solve(problem, "milp")).count(", ") >= 3
    assert paired(3, 3).with_loss([np.zeros(3)] * 3).pairwise == ()
