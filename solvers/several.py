"""Several resources at once: the dual by cutting planes, choices from it, and a proof by partial choices.

With prices λ (K,) ≥ 0 and r_gj ≥ 0 the loss of an option above its group's best at these prices, every choice has

    loss = L(λ) + Σ_g r_gj + λ·slack,        slack = limit - cost ≥ 0 in every resource,

so an option with r_gj at or above (best loss known - L(λ)) belongs to no better choice (reduction), and a partial
choice whose Σ r and unavoidable rest reach that gap cannot be completed to one (proof).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from solvers.core import most_promising
from solvers.lagrangian import Rows, bound_at
from solvers.problem import Deadline, FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Prices:
    """The best prices found: `price` (K,) in scaled loss per unit, `bound` in scaled loss, and the choices met on the
    way (C, G).

    `infeasible`: the bound is above every choice's loss, so there is none.
    """

    price: FloatArray
    bound: float
    noise: float
    met: IntArray
    iterations: int
    infeasible: bool


def dual_prices(
    rows: Rows, deadline: Deadline, tolerance: float = 1e-9, most: int = 400, after: Prices | None = None
) -> Prices:
    """Maximise L over the prices of K resources (Kelley's cutting planes; the master has K + 1 variables).

    Ends where the master's value is within `tolerance` of the best bound, relatively, or at `most` cuts; every bound is
    proven wherever it ends. `after`: prices of nearly the same rows, whose choices (in these rows) are cuts already.
    """
    from scipy.optimize import linprog

    K = rows.cost.shape[1]
    # Resources in units of what the limits leave, so that prices are comparable.
    unit = np.maximum(np.abs(rows.limit.astype(np.float64)), np.maximum(rows.cost.max(axis=0), 1e-300))
    share = rows.cost / unit
    limit = rows.limit / unit
    ceiling = math.fsum(np.maximum.reduceat(rows.loss, rows.start[:-1]))
    box = 4.0 * max(ceiling, 1e-300)
    best, noise, price, top = -math.inf, 0.0, np.zeros(K), math.inf
    point = np.zeros(K) if after is None else after.price * unit
    met: list[IntArray] = [] if after is None else list(after.met)
    cuts = [(math.fsum(rows.loss[chosen]), share[chosen].sum(axis=0) - limit) for chosen in met]
    iterations = 0
    while iterations < most:
        iterations += 1
        chosen = rows.argmin(rows.loss + share @ point)
        value, error = bound_at(rows, point / unit)
        if value > best:
            best, noise, price = value, error, point
        if best > ceiling * (1 + 1e-9):
            return Prices(price / unit, best, noise, np.array(met), iterations, True)
        met.append(chosen)
        cuts.append((math.fsum(rows.loss[chosen]), share[chosen].sum(axis=0) - limit))
        if (top < math.inf and top - best <= tolerance * max(abs(top), abs(best))) or deadline.passed:
            break
        # max θ subject to θ ≤ loss_i + λ·(cost_i - limit) for every choice i met.
        scale = max(1e-300, ceiling)
        matrix = np.array([[1.0, *(-slope)] for _, slope in cuts])
        answer = linprog(
            [-1.0, *np.zeros(K)],
            A_ub=matrix,
            b_ub=np.array([c for c, _ in cuts]) / scale,
            bounds=[(None, None)] + [(0.0, box / scale)] * K,
            method="highs",
        )
        if answer.status != 0:
            break
        top, new = -answer.fun * scale, np.maximum(answer.x[1:], 0.0) * scale
        if (new >= box * 0.999).any() and box < 1e12 * max(ceiling, 1e-300):
            box *= 30.0
            top = math.inf
        if np.array_equal(new, point):
            break
        # A step between the best point and the master's is steadier than the master's alone.
        point = new if iterations % 2 else 0.5 * (new + price)
    return Prices(price / unit, best, noise, np.array(met), iterations, False)


class Bundle:
    """The search state of a problem with several resources: the best rows so far, `rows` (G,) or None, `upper` and
    `bound`.
    """

    def __init__(self, problem: Rows, prices: Prices) -> None:
        self.problem, self.prices, self.price = problem, prices, prices.price
        self.dual = self.bound = prices.bound
        self.noise = prices.noise
        values = problem.loss + problem.cost @ prices.price
        self.base = problem.argmin(values)
        self.above = values - values[self.base][problem.group]
        self.rows: IntArray | None = None
        # Nothing reaches what is above the largest losses, so this reduces nothing away before a choice is known.
        largest = math.fsum(np.maximum.reduceat(problem.loss, problem.start[:-1]))
        self.upper = math.nextafter(largest + 1e-9 * abs(largest) + 4 * self.noise, math.inf)
        self.live = np.arange(len(problem.loss))

    def offer(self, chosen: IntArray) -> bool:
        """Take a choice (G,) if it is within the limits and the best so far; whether it was within them."""
        left = self.problem.limit - self.problem.cost[chosen].sum(axis=0)
        if (left < 0).any():
            return False
        loss = math.fsum(self.problem.loss[chosen])
        if self.rows is None or loss < self.upper:
            self.rows, self.upper = chosen, loss
        return True

    def reduce(self) -> IntArray:
        """The rows that a better choice could use; none of the others can."""
        self.live = self.live[self.above[self.live] < self.upper - self.dual - self.noise]
        return self.live

    def repair(self, chosen: IntArray, deadline: Deadline, moves: int = 300) -> IntArray | None:
        """Rows within the limits, from any rows: each time the change that costs least per excess taken away."""
        rows, now = self.problem, chosen.copy()
        unit = np.maximum(np.abs(rows.limit.astype(np.float64)), 1e-300)
        for _ in range(moves):
            left = (rows.limit - rows.cost[now].sum(axis=0)) / unit
            if (left >= 0).all():
                return now
            if deadline.passed:
                return None
            over = np.maximum(-left, 0.0)
            change = (rows.cost - rows.cost[now][rows.group]) / unit
            cured = over.sum() - np.maximum(change - left, 0.0).sum(axis=1)
            worse = np.maximum(self.above - self.above[now][rows.group], 0.0)
            score = np.full(len(cured), np.inf)
            with np.errstate(over="ignore"):
                score[cured > 0] = (worse[cured > 0] + 1e-12) / cured[cured > 0]
            best = int(score.argmin())
            if score[best] == np.inf:
                return None
            now[rows.group[best]] = best
        return None

    def expand(self, deadline: Deadline, cap: int, total: int, most_groups: int, aim: float = 0.0) -> bool:
        """Expand partial choices group by group, improving `rows` on the way and raising `bound`; whether nothing was
        cut.

        `aim`: partial choices that can improve the loss by no more than this are dropped, and the bound says so. At
        most `cap` states are kept at a time, `total` in all, over `most_groups` groups.
        """
        rows = self.problem
        self.offer(self.base)
        live = self.reduce()
        live = live[live != self.base[rows.group[live]]]
        group = rows.group[live]
        more = rows.cost[live] - rows.cost[self.base[group]]
        above, order, starts = _ordered(self.above[live], group)
        live, more = live[order], more[order]
        stages, last = len(starts) - 1, min(len(starts) - 1, most_groups)
        priced = more @ self.price
        surplus = _suffix(np.where(priced > 0, above / np.where(priced > 0, priced, 1.0), np.inf), starts)
        debt = np.stack(
            [
                _suffix(np.where(c < 0, above / np.where(c < 0, -c, 1.0), np.inf), starts)
                for c in more.astype(np.float64).T
            ],
            axis=1,
        )
        slack = (rows.limit - rows.cost[self.base].sum(axis=0))[None]
        states, heights = slack, np.zeros(1)
        dropped, kept = math.inf, 1
        history: list[tuple[IntArray, IntArray]] = []
        base_loss, promise, extra = math.fsum(rows.loss[self.base]), np.zeros(1), np.zeros(1)
        gain = rows.loss[live] - rows.loss[self.base[rows.group[live]]]
        stage = 0
        while stage < last and len(states) and kept < total and not deadline.passed:
            limit = self.upper - aim - self.dual - self.noise
            wide = int(starts[stage + 1] - starts[stage]) + 1
            room = max(1, (4 * cap + 50_000) // wide)
            if len(states) > room:
                keep, dropped = most_promising(promise, room, dropped)
                states, heights, extra = states[keep], heights[keep], extra[keep]
                history[-1] = history[-1][0][keep], history[-1][1][keep]
            made, made_above, made_extra = [states], [heights], [extra]
            parent, row = [np.arange(len(states))], [np.full(len(states), -1)]
            for j in range(int(starts[stage]), int(starts[stage + 1])):
                alive = np.flatnonzero(heights < limit - above[j])
                made.append(states[alive] - more[j])
                made_above.append(heights[alive] + above[j])
                made_extra.append(extra[alive] + gain[j])
                parent.append(alive)
                row.append(np.full(len(alive), j))
            stage += 1
            states, heights, extra = np.concatenate(made), np.concatenate(made_above), np.concatenate(made_extra)
            fits = np.flatnonzero((states >= 0).all(axis=1))
            winner = int(fits[extra[fits].argmin()]) if len(fits) else -1
            came, through = np.concatenate(parent), np.concatenate(row)
            if winner >= 0 and (self.rows is None or base_loss + extra[winner] < self.upper):
                self.offer(self._trace([*history, (came, through)], live, winner))
            promise = heights + self._rest(states, surplus[stage], debt[stage])
            alive = np.flatnonzero(promise < self.upper - aim - self.dual - self.noise)
            if len(alive) > cap:
                keep, dropped = most_promising(promise[alive], cap, dropped)
                alive = alive[keep]
            history.append((came[alive], through[alive]))
            states, heights, extra, promise = states[alive], heights[alive], extra[alive], promise[alive]
            kept += len(alive)
        complete = dropped == math.inf and (stage == stages or not len(states))
        if not complete and len(states):
            dropped = min(dropped, float(promise.min()))
        if complete and self.rows is None:
            self.bound = math.inf
            return True
        self.bound = max(self.bound, min(self.upper - aim, self.dual + dropped) - self.noise)
        return complete

    def _rest(self, slack: FloatArray, surplus: float, debt: FloatArray) -> FloatArray:
        """The least that states (S, K) still add: the unused is paid for at the price, the owed must be earned."""
        rest = min(1.0, surplus) * np.maximum(slack @ self.price, 0.0)
        for k in range(slack.shape[1]):
            owes = slack[:, k] < 0
            owed = np.inf if debt[k] == np.inf else debt[k] * -slack[owes, k].astype(np.float64)
            rest[owes] = np.maximum(rest[owes], owed)
        return rest

    def _trace(self, history: list[tuple[IntArray, IntArray]], live: IntArray, state: int) -> IntArray:
        """The rows (G,) of a state, from who it was made of."""
        chosen = self.base.copy()
        for parent, row in reversed(history):
            if row[state] >= 0:
                at = live[row[state]]
                chosen[self.problem.group[at]] = at
            state = int(parent[state])
        return chosen


def _ordered(above: FloatArray, group: IntArray) -> tuple[FloatArray, IntArray, IntArray]:
    """Rows by group, groups by their smallest r: the sorted r, the order, and where groups start."""
    if not len(above):
        return above, np.zeros(0, np.int64), np.zeros(1, np.int64)
    cuts = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(np.append(cuts, len(group)))
    least = np.minimum.reduceat(above, cuts)
    rank = np.empty(len(cuts), np.int64)
    rank[np.argsort(least, kind="stable")] = np.arange(len(cuts))
    order = np.argsort(np.repeat(rank, sizes), kind="stable")
    return above[order], order, np.concatenate([[0], np.cumsum(sizes[np.argsort(rank)])])


def _suffix(ratio: FloatArray, starts: IntArray) -> FloatArray:
    """The smallest ratio in groups k and later, (stages + 1,), inf after the last."""
    least = np.minimum.reduceat(ratio, starts[:-1]) if len(ratio) else np.zeros(0)
    return np.append(np.minimum.accumulate(least[::-1])[::-1], np.inf)
