"""Dynamic programming over buckets of cost: rounded up to choose, rounded down to prove.

best[b] = min_j best[b - t_gj] + loss_gj over groups g = 1 … G, with t_gj = ⌈cost_gj / bucket⌉. With costs rounded up
every choice found is within the budget; with costs rounded down the same recursion is a lower bound. The published one
(SPDY, in OBC's code) rounds to the nearest, so it breaks budgets, drops options of zero cost, and answers where nothing
fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.lagrangian import EPS, Rows, ask_one, cheapest, one_resource, whole
from solvers.problem import Deadline, FloatArray, IntArray, Problem
from solvers.solution import ROUNDING, Solution, Status, magnitude


@dataclass(frozen=True)
class DP:
    """Solve over at most `buckets` buckets; exact where a bucket is one unit (the greatest common divisor of the
    costs).

    Time is options × buckets, memory groups × buckets × 4 bytes.
    """

    buckets: int = 10_000
    name: str = "dp"

    def why_not(self, problem: Problem) -> str:
        """Why this solver does not take the problem, or ""."""
        return one_resource(problem, self.name)

    def __call__(self, problem: Problem, *, time_limit: float | None = None, seed: int = 0) -> Solution:
        """Solve; deterministic, so `seed` is not used."""
        ask_one(problem, self.name)
        deadline = Deadline(time_limit)
        flat, least = problem.flat, cheapest(problem)
        if least is None:
            return Solution.none(problem, Status.INFEASIBLE, self.name)
        upper = Rows.of(flat, *whole(flat, up=True)[:2])
        lower = Rows.of(flat, *whole(flat, up=False)[:2])
        same = bool((upper.cost == lower.cost).all() and upper.limit[0] == lower.limit[0])
        unit = max(1, int(np.gcd.reduce(upper.cost[:, 0]))) if same else 1
        # Nobody spends more than every group's dearest option costs.
        most = int(np.maximum.reduceat(upper.cost[:, 0], flat.start[:-1]).sum())
        size = max(1, -(-min(int(upper.limit[0]), most) // (unit * self.buckets))) * unit
        exact = same and size == unit
        rows, proven = None, -np.inf
        if upper.limit[0] >= 0:
            rows, proven = self._table(upper, -(-upper.cost[:, 0] // size), int(upper.limit[0]) // size, True, deadline)
        if not exact or rows is None:
            # ⌊cost / size⌋ ≤ cost / size, so a choice within the limit is within ⌊limit / size⌋ buckets.
            _, proven = self._table(lower, lower.cost[:, 0] // size, int(lower.limit[0]) // size, False, deadline)
        proven = 0.0 if np.isneginf(proven) else proven * (1 - EPS * problem.groups)
        bound = lower.true(proven)
        # Rounded up, even the cheapest choice may seem not to fit; it does.
        choice = least if rows is None else flat.choice(rows)
        status = Status.TIME_LIMIT if deadline.passed else Status.FEASIBLE
        if problem.total_loss(choice) - bound <= ROUNDING * magnitude(problem, choice):
            status = Status.OPTIMAL
        return Solution.of(problem, choice, bound, status, self.name, iterations=len(flat.loss))

    @staticmethod
    def _table(
        rows: Rows, ticks: IntArray, limit: int, trace: bool, deadline: Deadline
    ) -> tuple[IntArray | None, float]:
        """The rows (G,) of the least loss with Σ ticks ≤ limit, and that loss; None and -inf where time is up or
        nothing fits.
        """
        width = min(limit, int(np.maximum.reduceat(ticks, rows.start[:-1]).sum())) + 1
        best: FloatArray = np.zeros(width)
        taken = []
        for g in range(len(rows.sizes)):
            if deadline.passed:
                return None, -np.inf
            part = np.arange(rows.start[g], rows.start[g + 1])
            new = np.full(width, np.inf)
            which = np.full(width, -1, np.int32) if trace else np.zeros(0, np.int32)
            for j in _useful(part, ticks, rows.loss):
                t = int(ticks[j])
                if t >= width:
                    continue
                made = best[: width - t] + rows.loss[j]
                if trace:
                    better = made < new[t:]
                    np.copyto(new[t:], made, where=better)
                    np.copyto(which[t:], j, where=better)
                else:
                    np.minimum(new[t:], made, out=new[t:])
            best = new
            taken.append(which)
        if best[-1] == np.inf:
            return None, -np.inf
        if not trace:
            return None, float(best[-1])
        chosen = np.empty(len(rows.sizes), np.int64)
        left = width - 1
        for g in reversed(range(len(taken))):
            chosen[g] = taken[g][left]
            left -= int(ticks[chosen[g]])
        return chosen, float(best[-1])


def _useful(part: IntArray, ticks: IntArray, loss: FloatArray) -> list[int]:
    """The rows of a group with a smaller loss than every row of as few ticks."""
    order = part[np.lexsort((loss[part], ticks[part]))]
    keep = np.ones(len(order), bool)
    keep[1:] = loss[order][1:] < np.minimum.accumulate(loss[order])[:-1]
    return order[keep].tolist()
