"""The whole trade-off of one resource: every breakpoint of the hull exactly, the optimum between on request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solvers.hulls import hulls
from solvers.lagrangian import EPS, Rows, ask_one, whole
from solvers.problem import Array, FloatArray, IntArray, Problem, ProblemError
from solvers.registry import Solver, solve
from solvers.solution import Solution


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points of the trade-off by rising cost: a choice for every budget.

    `cost` (P,), `loss` (P,), `bound` (P,): no choice that costs as little has a smaller loss than `bound`. Consecutive
    breakpoints differ in one group; `choice(k)` (G,) is made from that. `budgets` and `solutions`: what was asked for
    between.
    """

    cost: Array
    loss: FloatArray
    bound: FloatArray
    first: IntArray
    changed: IntArray
    option: IntArray
    budgets: tuple[float, ...] = ()
    solutions: tuple[Solution, ...] = ()

    def __len__(self) -> int:
        return len(self.cost)

    @property
    def gap(self) -> FloatArray:
        """(loss - bound) / |bound| per point, (P,)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = (self.loss - self.bound) / np.abs(self.bound)
        return np.where(self.loss == self.bound, 0.0, gap)

    def choice(self, k: int) -> IntArray:
        """The options (G,) of point k."""
        if not -len(self) <= k < len(self):
            raise ProblemError(f"point {k} of a frontier with {len(self)} points")
        choice = self.first.copy()
        steps = slice(0, k % len(self))
        # Later steps of a group overwrite earlier ones.
        choice[self.changed[steps]] = self.option[steps]
        return choice


def frontier(
    problem: Problem,
    budgets: Sequence[float] | None = None,
    *,
    solver: str | Solver = "exact",
    time_limit: float | None = None,
) -> Frontier:
    """Every breakpoint of the lower hull of (cost, loss) over all budgets, whatever the problem's own budget is.

    A breakpoint is optimal for the budget it costs, so its bound is its loss, less what rounding may hide. `budgets`:
    budgets to solve with `solver` as well, for the true optimum between breakpoints; their solutions are under
    `solutions`.
    """
    ask_one(problem, "frontier")
    flat = problem.flat
    rows = Rows.of(flat, whole(flat, up=True)[0], np.zeros(1, np.int64))
    hull = hulls(rows.loss, rows.cost[:, 0], rows.start)
    group = np.repeat(np.arange(problem.groups), np.diff(hull.start))
    steps = hull.steps()
    first = hull.rows[hull.start[:-1]]
    base = problem.total_cost(flat.choice(first))[0]
    spent = np.concatenate([[0], np.cumsum(hull.spent[steps])])
    cost = base + (spent if problem.integer else _float_costs(flat.cost[:, 0], hull.rows, hull.start, steps))
    # Summed from the end, where losses are small: rounding then is relative to what is left, not to what was saved.
    last = hull.rows[hull.start[1:] - 1]
    left = np.concatenate([np.cumsum(hull.saved[steps][::-1])[::-1], [0.0]]) + math.fsum(rows.loss[last])
    loss = np.array([rows.true(x) for x in left])
    noise = EPS * (2 * len(steps) + 4) * np.ldexp(left, rows.exponent)
    asked = tuple(budgets or ())
    found = tuple(solve(problem.with_budget(b), solver, time_limit=time_limit) for b in asked)
    return Frontier(
        cost, loss, loss - noise, flat.choice(first), group[steps], flat.choice(hull.rows[steps]), asked, found
    )


def _float_costs(cost: FloatArray, rows: IntArray, start: IntArray, steps: IntArray) -> FloatArray:
    more = np.zeros(len(rows))
    more[1:] = np.diff(cost[rows])
    return np.concatenate([[0.0], np.cumsum(more[steps])])
