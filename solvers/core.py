"""The core of a one-resource problem: partial choices over the undecided groups, pruned by bounds and by dominance.

Write a choice as its difference from a base choice x: ΔC more cost, ΔL more loss. With r_gj ≥ 0 the loss of an option
at the dual price λ above its group's best, every choice within the limit has

    loss = bound + Σ_g r_gj + λ·slack,        slack = limit - cost ≥ 0,

so a partial choice whose Σ r, plus the least that using up or regaining its slack can still add, reaches the gap is
dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from solvers.lagrangian import EPS, Dual, Rows
from solvers.problem import Deadline, FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class States:
    """Partial choices sorted by cost: `cost` (S,) int64 and `loss` (S,) over the base, `above` (S,) = Σ r."""

    cost: IntArray
    loss: FloatArray
    above: FloatArray

    def take(self, keep: IntArray) -> States:
        return States(self.cost[keep], self.loss[keep], self.above[keep])


@dataclass(frozen=True, eq=False)
class Expansion:
    """What an expansion ended with: a proven bound, whether it was complete, and how many states it kept in all."""

    bound: float
    complete: bool
    states: int


@dataclass(eq=False)
class Best:
    """The best choice so far: `rows` (G,) of the whole problem, and its scaled loss."""

    rows: IntArray
    loss: float


class Core:
    """The undecided part of a one-resource problem whose dual is `at`; `origin` (N,) are its rows in the whole problem.

    Improves `best`, and raises `bound`: no choice of these rows has a smaller scaled loss, unless `best` has it.
    """

    def __init__(self, rows: Rows, at: Dual, best: Best, origin: IntArray | None = None) -> None:
        self.problem, self.price, self.base, self.best = rows, at.price, at.within, best
        self.origin = np.arange(len(rows.loss)) if origin is None else origin
        self.loss, self.cost, self.start = rows.loss, rows.cost[:, 0], rows.start
        self.dual = self.bound = at.bound
        # Twice what the bound has already been lowered by, so that a loss that meets the bound ends the search.
        self.noise = 2 * at.noise
        self.above = at.above
        self.slack = int(rows.limit[0]) - int(self.cost[self.base].sum())
        self.base_loss = math.fsum(self.loss[self.base])
        if self.base_loss < best.loss:
            best.rows, best.loss = self.origin[self.base], self.base_loss
        # Rows that may still matter; reduced again whenever the gap has shrunk.
        self.live = np.arange(len(self.loss))

    @property
    def gap(self) -> float:
        """How far Σ r may reach: the best loss less the dual bound at the price, which r is measured from."""
        return self.best.loss - self.dual

    def candidates(self) -> tuple[IntArray, IntArray]:
        """Rows other than the base that a better choice could use, by group in the order of expansion; and where groups
        start.
        """
        self.live = self.live[self.above[self.live] < self.gap - self.noise]
        group = np.searchsorted(self.start, self.live, side="right") - 1
        # An option of the base's own cost is worse than the base.
        differ = self.cost[self.live] != self.cost[self.base[group]]
        live, group = self.live[differ], group[differ]
        if not len(live):
            return live, np.zeros(1, np.int64)
        ratio = self.above[live] / np.abs(self.cost[live] - self.cost[self.base[group]])
        cuts = np.flatnonzero(np.diff(group, prepend=-1))
        key = np.minimum.reduceat(ratio, cuts)
        rank = np.empty(len(cuts), np.int64)
        rank[np.lexsort((np.arange(len(cuts)), key))] = np.arange(len(cuts))
        sizes = np.diff(np.append(cuts, len(live)))
        order = np.argsort(np.repeat(rank, sizes), kind="stable")
        starts = np.concatenate([[0], np.cumsum(sizes[np.argsort(rank)])])
        return live[order], starts

    def undecided(self) -> IntArray:
        """The rows that a better choice could use, those of the base among them, sorted."""
        live = self.live[self.above[self.live] < self.gap - self.noise]
        return np.union1d(live, self.base)

    def expand(self, deadline: Deadline, cap: int, total: int, most_groups: int) -> Expansion:
        """Expand the core group by group, improving `best` and `bound` on the way.

        At most `cap` states are kept at a time (the most promising), `total` over all stages, and `most_groups` groups
        are expanded; where one of these or the deadline cuts, the expansion is not complete and its bound is what is
        left.
        """
        rows, starts = self.candidates()
        owner = np.searchsorted(self.start, rows, side="right") - 1
        more_cost = self.cost[rows] - self.cost[self.base[owner]]
        more_loss = self.loss[rows] - self.loss[self.base[owner]]
        above = self.above[rows]
        up, down = _rates(more_cost, above, starts)
        states = States(np.zeros(1, np.int64), np.zeros(1), np.zeros(1))
        history: list[tuple[IntArray, IntArray]] = []
        promise = np.zeros(1)
        dropped, kept, stages, widest = math.inf, 1, len(starts) - 1, 0.0
        last = min(stages, most_groups)
        stage = 0
        while stage < last and not deadline.passed and kept < total:
            part = slice(int(starts[stage]), int(starts[stage + 1]))
            limit = self.gap - self.noise
            usable = np.flatnonzero(above[part] < limit) + part.start
            # Not more than a few times `cap` states are made at once.
            room = max(1, (4 * cap + 50_000) // (len(usable) + 1))
            if len(states.cost) > room:
                keep, dropped = most_promising(promise, room, dropped, self._key(states, promise))
                states = states.take(keep)
                history[-1] = history[-1][0][keep], history[-1][1][keep]
            made, parent, row = _join(states, more_cost, more_loss, above, usable, limit)
            stage += 1
            promise = made.above + _rest(self.slack - made.cost, self.price, up[stage], down[stage])
            states, parent, row, promise = _prune(made, parent, row, promise, limit)
            if not len(states.cost):
                break
            if len(states.cost) > cap:
                keep, dropped = most_promising(promise, cap, dropped, self._key(states, promise))
                states, parent, row, promise = states.take(keep), parent[keep], row[keep], promise[keep]
            history.append((parent, row))
            kept += len(states.cost)
            widest = max(widest, float(np.abs(states.loss).max()))
            fits = int(np.searchsorted(states.cost, self.slack, side="right"))
            if fits:
                # Dominated states are gone, so loss falls with cost and the dearest state that fits is the best.
                loss = self.base_loss + float(states.loss[fits - 1])
                if loss < self.best.loss:
                    chosen = self._trace(history, rows, fits - 1)
                    self.best.rows, self.best.loss = self.origin[chosen], math.fsum(self.loss[chosen])
        complete = dropped == math.inf and (stage == stages or not len(states.cost))
        if not complete and len(states.cost):
            dropped = min(dropped, float(promise.min()) if stage else 0.0)
        noise = self.noise + EPS * (2 * len(history) + 4) * widest
        self.bound = max(self.bound, min(self.best.loss, self.dual + dropped) - noise)
        return Expansion(self.bound, complete, kept)

    def _key(self, states: States, promise: FloatArray) -> FloatArray:
        """What states are kept by: their promise, and of equal ones those near the limit."""
        return promise + 0.01 * self.price * np.abs(self.slack - states.cost)

    def _trace(self, history: list[tuple[IntArray, IntArray]], rows: IntArray, state: int) -> IntArray:
        """The rows (G,) of a state, from who it was made of."""
        chosen = self.base.copy()
        for parent, row in reversed(history):
            if row[state] >= 0:
                at = rows[row[state]]
                chosen[np.searchsorted(self.start, at, side="right") - 1] = at
            state = parent[state]
        return chosen


def _rates(more_cost: IntArray, above: FloatArray, starts: IntArray) -> tuple[FloatArray, FloatArray]:
    """For groups k and later: the least Σ r per unit of cost added (`up`), or given back (`down`); (stages + 1,), inf
    where none can.
    """
    found = []
    for sign in (1, -1):
        moved = (sign * more_cost) > 0
        ratio = np.full(len(above), np.inf)
        ratio[moved] = above[moved] / (sign * more_cost[moved])
        least = np.minimum.reduceat(ratio, starts[:-1]) if len(above) else np.zeros(0)
        found.append(np.append(np.minimum.accumulate(least[::-1])[::-1], np.inf))
    return found[0], found[1]


def _rest(slack: IntArray, price: float, up: float, down: float) -> FloatArray:
    """The least that a state with this slack (S,) still adds: unused slack costs the price, or a dearer option; a debt
    cheaper ones.
    """
    rest = np.minimum(price, up) * slack
    debt = slack < 0
    rest[debt] = np.inf if down == math.inf else down * -slack[debt]
    return rest


def most_promising(
    promise: FloatArray, most: int, dropped: float, key: FloatArray | None = None
) -> tuple[IntArray, float]:
    """The positions, in order, of the `most` states least in `key` (the promise), and the least of `dropped` and all
    others.
    """
    order = np.argpartition(promise if key is None else key, most)
    return np.sort(order[:most]), min(dropped, float(promise[order[most:]].min()))


def _join(
    states: States, more_cost: IntArray, more_loss: FloatArray, above: FloatArray, usable: IntArray, limit: float
) -> tuple[States, IntArray, IntArray]:
    """Every state with the base and with every usable option of one group, where Σ r stays under the limit; and where
    from.
    """
    S = len(states.cost)
    total = above[usable][:, None] + states.above
    which, parent = np.nonzero(total < limit)
    row = usable[which]
    made = States(
        np.concatenate([states.cost, states.cost[parent] + more_cost[row]]),
        np.concatenate([states.loss, states.loss[parent] + more_loss[row]]),
        np.concatenate([states.above, total[which, parent]]),
    )
    own = np.arange(S, dtype=np.int32)
    parents = np.concatenate([own, parent.astype(np.int32)])
    return made, parents, np.concatenate([np.full(S, -1, np.int32), row.astype(np.int32)])


def _prune(
    made: States, parent: IntArray, row: IntArray, promise: FloatArray, limit: float
) -> tuple[States, IntArray, IntArray, FloatArray]:
    """Keep what may beat the limit and no cheaper state with as little loss dominates, sorted by cost."""
    alive = np.flatnonzero(promise < limit)
    order = alive[np.argsort(made.cost[alive], kind="stable")]
    cost, loss = made.cost[order], made.loss[order]
    keep = np.ones(len(order), bool)
    keep[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
    order = order[keep]
    cost = cost[keep]
    # Of states with one cost the last is the best.
    order = order[np.append(cost[1:] != cost[:-1], True)] if len(order) else order
    return made.take(order), parent[order], row[order], promise[order]
