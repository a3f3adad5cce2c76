"""The lower convex hull of every group's (cost, loss) points, all groups at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.problem import Array, FloatArray, IntArray

# Vectorised passes before the groups that are left go through the scalar loop: enough for all but adversarial curves.
PASSES = 40


@dataclass(frozen=True, eq=False)
class Hulls:
    """Vertices of G hulls end to end, each from its cheapest option to its smallest loss, slopes strictly rising
    towards zero.

    `rows` (V,): the option of each vertex; `start` (G + 1,). Vertex v > start[g] saves `saved[v]` of loss for
    `spent[v]` > 0 of cost over its predecessor, at `slope[v]` = saved / spent; first vertices have 0, 0 and inf.
    """

    rows: IntArray
    start: IntArray
    saved: FloatArray
    spent: Array
    slope: FloatArray

    def steps(self) -> IntArray:
        """All vertices but the first of each group, by falling slope; ties by position, so that a group's own order is
        kept.
        """
        first = np.zeros(len(self.rows), bool)
        first[self.start[:-1]] = True
        later = np.flatnonzero(~first)
        return later[np.argsort(-self.slope[later], kind="stable")]


def hulls(loss: FloatArray, cost: Array, start: IntArray) -> Hulls:
    """The hulls of points with `loss` (N,) and `cost` (N,), group g in start[g]:start[g + 1].

    A point on or above the line through its two neighbours is no vertex, whatever else goes, so all such points go at
    once.
    """
    group = np.repeat(np.arange(len(start) - 1), np.diff(start))
    order = pareto(loss, cost, start)
    settled: list[IntArray] = []
    for _ in range(PASSES):
        g = group[order]
        keep = _convex(loss[order], cost[order].astype(np.float64), g)
        # Groups that lose no point are done.
        open_group = np.zeros(len(start) - 1, bool)
        open_group[g[~keep]] = True
        settled.append(order[~open_group[g]])
        order = order[keep & open_group[g]]
        if not len(order):
            break
    rest = [
        _chain(rows, loss, cost) for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(rows)
    ]
    rows = np.concatenate(settled + rest)
    rows = rows[np.argsort(group[rows], kind="stable")]
    counts = np.bincount(group[rows], minlength=len(start) - 1)
    ends = np.concatenate([[0], np.cumsum(counts)])
    saved, spent = np.zeros(len(rows)), np.zeros(len(rows), cost.dtype)
    saved[1:], spent[1:] = -np.diff(loss[rows]), np.diff(cost[rows])
    saved[ends[:-1]], spent[ends[:-1]] = 0.0, 0
    slope = np.full(len(rows), np.inf)
    later = spent > 0
    slope[later] = saved[later] / spent[later]
    return Hulls(rows, ends, saved, spent, slope)


def pareto(loss: FloatArray, cost: Array, start: IntArray) -> IntArray:
    """The rows that no other of their group beats in both, by group and rising cost; of equal ones the first."""
    group = np.repeat(np.arange(len(start) - 1), np.diff(start))
    order = np.lexsort((np.arange(len(loss)), loss, cost, group))
    return order[_falling(loss[order], group[order])]


def _falling(loss: FloatArray, group: IntArray) -> Array:
    """Which points, sorted by cost within groups, have a smaller loss than every cheaper one of their group."""
    # Ranks turn the running minimum per group into one over all: later groups rank lower.
    rank = np.empty(len(loss), np.int64)
    order = np.lexsort((loss, -group))
    fresh = np.ones(len(loss), bool)
    fresh[1:] = (loss[order][1:] != loss[order][:-1]) | (group[order][1:] != group[order][:-1])
    rank[order] = np.cumsum(fresh)
    keep = np.ones(len(loss), bool)
    keep[1:] = rank[1:] < np.minimum.accumulate(rank)[:-1]
    return keep


def _convex(loss: FloatArray, cost: FloatArray, group: IntArray) -> Array:
    """Which points lie strictly below the line through their neighbours; ends of groups do."""
    keep = np.ones(len(loss), bool)
    if len(loss) < 3:
        return keep
    inner = (group[1:-1] == group[:-2]) & (group[1:-1] == group[2:])
    before, after = cost[1:-1] - cost[:-2], cost[2:] - cost[1:-1]
    down, further = loss[:-2] - loss[1:-1], loss[1:-1] - loss[2:]
    keep[1:-1] = ~inner | (down * after > further * before)
    return keep


def _chain(rows: IntArray, loss: FloatArray, cost: Array) -> IntArray:
    """Andrew's monotone chain over one group's points, sorted by cost with falling loss."""
    kept: list[int] = []
    for row in rows.tolist():
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (loss[a] - loss[b]) * float(cost[row] - cost[b]) > (loss[b] - loss[row]) * float(cost[b] - cost[a]):
                break
            kept.pop()
        kept.append(row)
    return np.array(kept, np.int64)
