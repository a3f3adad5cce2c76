"""Proven optimum for one resource: the dual, then a core of the undecided options, expanded with bounds.

Source: Pisinger, A minimal algorithm for the multiple-choice knapsack problem, EJOR 83 (1995) 394-410. Differences: losses are
floats, options are removed by reduced losses from the dual bound instead of by slopes, states are numpy arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from solvers.core import Core
from solvers.lagrangian import Rows, ask_one, dual, one_resource, whole
from solvers.problem import Deadline, IntArray, Problem
from solvers.solution import ROUNDING, Solution, Status, magnitude


@dataclass(frozen=True)
class Exact:
    """Branch over a core of undecided groups until nothing better can be left.

    `max_states`: how many partial choices are kept at once (each holds 32 bytes); beyond it the answer comes with the gap that
    is proven by then.
    """

    max_states: int = 4_000_000
    name: str = "exact"

    def why_not(self, problem: Problem) -> str:
        """Why this solver does not take the problem, or ""."""
        return one_resource(problem, self.name)

    def __call__(self, problem: Problem, *, time_limit: float | None = None, seed: int = 0) -> Solution:
        """Solve; deterministic, so `seed` is not used."""
        ask_one(problem, self.name)
        deadline = Deadline(time_limit)
        flat = problem.flat
        cost, limit, same = whole(flat, up=True)
        rows = Rows.of(flat, cost, limit)
        answer = search(rows, deadline, self.max_states)
        if not same:
            # Rounded up, the answer is within the budget; rounded down, it proves.
            cost, limit, _ = whole(flat, up=False)
            lower = search(Rows.of(flat, cost, limit), deadline, self.max_states)
            if lower is None:
                return Solution.none(problem, Status.INFEASIBLE, self.name)
            rounded = lower if problem.feasible(flat.choice(lower.rows)) else answer
            if rounded is None:
                return Solution.none(problem, Status.UNKNOWN, self.name, rows.true(lower.bound))
            answer = Answer(rounded.rows, lower.bound, lower.iterations, lower.price)
        elif answer is None:
            return Solution.none(problem, Status.INFEASIBLE, self.name)
        choice, bound = flat.choice(answer.rows), rows.true(answer.bound)
        loss = problem.total_loss(choice)
        status = Status.TIME_LIMIT if deadline.passed else Status.FEASIBLE
        if loss - bound <= ROUNDING * magnitude(problem, choice):
            status = Status.OPTIMAL
        price = np.array([math.ldexp(answer.price, rows.exponent)])
        return Solution.of(problem, choice, bound, status, self.name, iterations=answer.iterations, price=price)


@dataclass(frozen=True, eq=False)
class Answer:
    """Chosen rows (G,), a proven bound in scaled loss, how many states were made, and the price per unit of (whole) cost."""

    rows: IntArray
    bound: float
    iterations: int
    price: float


def search(rows: Rows, deadline: Deadline, max_states: int) -> Answer | None:
    """The best rows of a scaled one-resource problem with integer costs; None where the cheapest choice is over the limit."""
    at = dual(rows)
    if at is None:
        return None
    if at.over is None:
        return Answer(at.within, 0.0, 1, 0.0)
    core = Core(rows, at)
    # A narrow expansion finds a good choice; its gap leaves few options for the full one.
    states = 0
    for cap in (200, 2000):
        states += core.expand(deadline, cap=cap, total=max_states, most_groups=50).states
    states += core.expand(deadline, cap=max_states, total=max_states, most_groups=len(rows.sizes)).states
    return Answer(core.rows, core.bound, states, at.price)
