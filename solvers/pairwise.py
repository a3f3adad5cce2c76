"""Local search with pairwise terms: single and double changes that keep every limit."""

from __future__ import annotations

import math

import numpy as np

from solvers.lagrangian import argmin
from solvers.milp import finite
from solvers.problem import Deadline, FloatArray, IntArray, Problem


class Move:
    """Rows of a flat problem being changed one or two groups at a time."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.flat = problem, problem.flat
        self.cost, self.limit = finite(self.flat.cost, self.flat.limit)
        self.unit = np.maximum(np.abs(self.limit.astype(np.float64)), np.maximum(np.abs(self.cost).max(axis=0), 1e-300))
        self.joined: list[list[tuple[int, FloatArray]]] = [[] for _ in range(problem.groups)]
        for p in problem.pairwise:
            self.joined[p.first].append((p.second, p.loss))
            self.joined[p.second].append((p.first, p.loss.T))

    def argmin(self, values: FloatArray) -> IntArray:
        return argmin(values, self.flat.start)

    def cheapest(self) -> IntArray:
        """The rows with the least share of the limits."""
        return self.argmin((self.cost / self.unit).sum(axis=1))

    def part(self, g: int) -> slice:
        return slice(int(self.flat.start[g]), int(self.flat.start[g + 1]))

    def local(self, g: int, choice: IntArray, without: int = -1) -> FloatArray:
        """The loss of every option of group g, given the others' options in `choice` (G,); pairs with `without` left
        out.
        """
        part = self.part(g)
        values = self.flat.loss[part].copy()
        for h, table in self.joined[g]:
            if h != without:
                values += table[self.flat.option[part], choice[h]]
        return values

    def fits(self, rows: IntArray) -> bool:
        """Whether rows (G,) keep every limit, exactly."""
        return self.problem.feasible(self.flat.choice(rows))

    def left(self, rows: IntArray) -> FloatArray:
        """What the limits leave (K,); exact for integers, and for floats less a rounding, so that what fits it fits."""
        left = self.limit - self.cost[rows].sum(axis=0)
        return left if left.dtype == np.int64 else left - 1e-12 * self.unit

    def repair(self, rows: IntArray, deadline: Deadline) -> IntArray | None:
        """Rows within the limits: each time the change that adds the least loss per unit of excess taken away."""
        rows, group = rows.copy(), self.flat.group
        for _ in range(4 * len(rows)):
            left = self.left(rows) / self.unit
            if (left >= 0).all():
                return rows if self.fits(rows) else None
            if deadline.passed:
                return None
            change = (self.cost - self.cost[rows][group]) / self.unit
            cured = np.maximum(-left, 0).sum() - np.maximum(change - left, 0).sum(axis=1)
            worse = self.flat.loss - self.flat.loss[rows][group]
            worse = worse - min(0.0, float(worse.min())) + 1e-300
            score = np.full(len(cured), np.inf)
            with np.errstate(over="ignore"):
                score[cured > 0] = worse[cured > 0] / cured[cured > 0]
            best = int(score.argmin())
            if score[best] == np.inf:
                return None
            rows[group[best]] = best
        return None

    def single(self, rows: IntArray, g: int) -> bool:
        """Give group g its best option that fits; whether that changed it."""
        part = self.part(g)
        values = self.local(g, self.flat.choice(rows))
        ok = ((self.cost[part] - self.cost[rows[g]]) <= self.left(rows)).all(axis=1)
        now = values[rows[g] - part.start]
        best = int(np.where(ok, values, np.inf).argmin())
        if not ok[best] or not values[best] < now - 1e-15 * abs(now):
            return False
        rows[g] = part.start + best
        return True

    def double(self, rows: IntArray, g: int, h: int) -> bool:
        """Give groups g and h their best pair of options that fits; whether that changed them."""
        a, b = self.part(g), self.part(h)
        choice = self.flat.choice(rows)
        values = self.local(g, choice, h)[:, None] + self.local(h, choice, g)
        for other, table in self.joined[g]:
            if other == h:
                values += table[np.ix_(self.flat.option[a], self.flat.option[b])]
        more = (self.cost[a] - self.cost[rows[g]])[:, None] + (self.cost[b] - self.cost[rows[h]])
        ok = (more <= self.left(rows)).all(axis=2)
        now = values[rows[g] - a.start, rows[h] - b.start]
        i, j = np.unravel_index(int(np.where(ok, values, np.inf).argmin()), values.shape)
        if not ok[i, j] or not values[i, j] < now - 1e-15 * abs(now):
            return False
        rows[g], rows[h] = a.start + i, b.start + j
        return True


def descend(problem: Problem, starts: list[IntArray], sweeps: int, deadline: Deadline) -> IntArray | None:
    """The best choice (G,) within the limits from repaired starts (rows), by single and then double changes; None where
    none fits.
    """
    move = Move(problem)
    best, least = None, math.inf
    # Double changes look at all pairs of groups while these are few, else at pairs with a term and at neighbours.
    G = problem.groups
    near = {(p.first, p.second) for p in problem.pairwise} | {(g, g + 1) for g in range(G - 1)}
    pairs = sorted(near if G > 30 else {(g, h) for g in range(G) for h in range(g + 1, G)})
    for start in starts:
        rows = move.repair(start, deadline)
        if rows is None:
            continue
        for _ in range(sweeps):
            if deadline.passed:
                break
            moved = sum(move.single(rows, g) for g in range(G) if not deadline.passed)
            if not moved:
                moved = sum(move.double(rows, g, h) for g, h in pairs if not deadline.passed)
            if not moved:
                break
        choice = move.flat.choice(rows)
        loss = problem.total_loss(choice)
        if loss < least and problem.feasible(choice):
            best, least = choice, loss
    return best
