"""Prices: the Lagrangian dual of a budgeted choice, its bound, and the choices it leads to.

L(λ) = Σ_g min_j (loss_gj + λ·cost_gj) - λ·budget is a lower bound for every λ ≥ 0 (Everett 1963; Fisher 1981). For one
resource its maximum is where two choices meet, one over and one within the budget; cutting planes find it exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from solvers.fields import INTEGER_LIMIT
from solvers.problem import Array, Deadline, Flat, FloatArray, IntArray, Problem, ProblemError
from solvers.solution import ROUNDING, Solution, Status, magnitude

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Rows:
    """Options of G groups with every group's smallest loss and cost taken off, and losses scaled by a power of two.

    `loss` (N,) float64 in [0, 1]; `cost` (N, K) ≥ 0, int64 where the problem's are; `limit` (K,) what is left of the
    limits; `start` (G + 1,). True loss = `base` + 2**`exponent` · loss. Smallest entries are zero, so all sums have one
    sign, and float64 sums are right to a few EPS *relatively*; that is what the bounds below rest on.
    """

    loss: FloatArray
    cost: Array
    limit: Array
    start: IntArray
    base: float
    exponent: int

    @cached_property
    def sizes(self) -> IntArray:
        return np.diff(self.start)

    @cached_property
    def group(self) -> IntArray:
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @classmethod
    def of(cls, flat: Flat, cost: Array | None = None, limit: Array | None = None) -> Rows:
        """Take the smallest entries off; `cost` and `limit` stand in for those of the problem."""
        cost = flat.cost if cost is None else cost
        limit = flat.limit if limit is None else limit
        low = np.minimum.reduceat(flat.loss, flat.start[:-1])
        least = np.minimum.reduceat(cost, flat.start[:-1], axis=0)
        n = int(flat.sizes[0])
        if (flat.sizes == n).all():
            loss = (flat.loss.reshape(-1, n) - low[:, None]).ravel()
            cost = (cost.reshape(-1, n, cost.shape[1]) - least[:, None]).reshape(cost.shape)
        else:
            loss = flat.loss - low[flat.group]
            cost = cost - least[flat.group]
        if cost.dtype == np.int64:
            left = limit - least.sum(axis=0)
        else:
            left = np.array([math.fsum([b, *(-column)]) for b, column in zip(limit, least.T, strict=True)])
        exponent = int(np.frexp(loss.max())[1]) if loss.max() > 0 else 0
        return cls(np.ldexp(loss, -exponent), cost, left, flat.start, math.fsum(low), exponent)

    def part(self, live: IntArray) -> tuple[Rows, IntArray]:
        """These rows only, sorted, every group with at least one; and `live`, where they were."""
        counts = np.bincount(self.group[live], minlength=len(self.sizes))
        start = np.concatenate([[0], np.cumsum(counts)])
        return replace(self, loss=self.loss[live], cost=self.cost[live], start=start), live

    def true(self, loss: float) -> float:
        """A loss of these rows in the problem's own scale."""
        return math.fsum([self.base, math.ldexp(loss, self.exponent)])

    def argmin(self, values: FloatArray) -> IntArray:
        """The first row with the smallest value in every group, (G,)."""
        return argmin(values, self.start)


def argmin(values: Array, start: IntArray) -> IntArray:
    """The first row with the smallest value between start[g] and start[g + 1], for every g."""
    n = int(start[1] - start[0])
    if n * (len(start) - 1) == start[-1] and (np.diff(start) == n).all():
        return values.reshape(-1, n).argmin(axis=1) + start[:-1]
    least = np.minimum.reduceat(values, start[:-1])
    hits = np.flatnonzero(values == np.repeat(least, np.diff(start)))
    return hits[np.searchsorted(hits, start[:-1])]


def lexmin(first: Array, second: Array, start: IntArray) -> IntArray:
    """Like argmin, ties in `first` broken by `second`."""
    least = np.repeat(np.minimum.reduceat(first, start[:-1]), np.diff(start))
    worst = np.iinfo(np.int64).max if second.dtype == np.int64 else np.inf
    return argmin(np.where(first == least, second, worst), start)


def shift(flat: Flat) -> int:
    """The power of two by which `whole` multiplies costs: 0 for integers."""
    if flat.cost.dtype == np.int64:
        return 0
    most = float(np.maximum.reduceat(np.abs(flat.cost[:, 0]), flat.start[:-1]).sum())
    return 60 - int(np.frexp(most)[1])


def whole(flat: Flat, up: bool) -> tuple[IntArray, IntArray, bool]:
    """Costs (N, 1) and limit (1,) of a one-resource problem as integers; the third says whether they are exact.

    Float costs are multiples of a power of two small enough that sums just fit 62 bits: rounded `up` every choice
    within the limit is within the budget, rounded down every choice within the budget is within the limit.
    """
    if flat.cost.dtype == np.int64:
        return flat.cost, flat.limit, True
    power = shift(flat)
    scaled = np.ldexp(flat.cost, power)
    limit = np.floor(np.clip(np.ldexp(flat.limit, power), -float(INTEGER_LIMIT), float(INTEGER_LIMIT)))
    rounded = np.ceil(scaled) if up else np.floor(scaled)
    return rounded.astype(np.int64), limit.astype(np.int64), bool((rounded == scaled).all())


@dataclass(frozen=True, eq=False)
class Dual:
    """The best price of a one-resource problem: the rows chosen just within the budget and just over it, and the bound.

    `within` and `over` (G,) row indices (`over` is None where the smallest losses fit, and the choice is optimal);
    `price` in scaled loss per unit; `bound` in scaled loss, proven; `noise`: what it was lowered by for rounding;
    `above` (N,) = r ≥ 0.
    """

    within: IntArray
    over: IntArray | None
    price: float
    bound: float
    noise: float
    iterations: int
    above: FloatArray = field(default_factory=lambda: np.zeros(0), repr=False)


def bound_at(rows: Rows, price: FloatArray) -> tuple[float, float]:
    """L(price) of scaled rows for a price (K,) ≥ 0, lowered by all that rounding may have added; and that amount."""
    values = rows.loss + rows.cost @ price
    least = math.fsum(np.minimum.reduceat(values, rows.start[:-1]))
    paid = math.fsum((price * rows.limit).tolist())
    noise = EPS * ((4 + 2 * len(price)) * least + 4 * float(np.abs(price * rows.limit).sum()))
    return least - paid - noise, noise


def dual(rows: Rows) -> Dual | None:
    """Maximise L over the price of one resource, by cutting planes; None where the cheapest choice is over the limit.

    The two choices that bracket the limit give the next price, the slope of the line between them; where no choice lies
    below that line, the price is optimal. Options outside the bracket are dropped as it closes, so all steps together
    cost a few passes over the options. Each group's losses must be scaled rows with integer costs.
    """
    loss, cost, limit = rows.loss, rows.cost[:, 0], int(rows.limit[0])
    within = lexmin(cost, loss, rows.start)
    if int(cost[within].sum()) > limit:
        return None
    over = lexmin(loss, cost, rows.start)
    if int(cost[over].sum()) <= limit:
        return Dual(over, None, 0.0, math.fsum(loss[over]), 0.0, 1)
    low_price, high_price, price = 0.0, math.inf, 0.0
    origin, start = None, rows.start
    iterations = 1
    while True:
        # Options cheaper than `within` or dearer than `over` are no longer chosen at any price in the bracket.
        open_groups = np.flatnonzero(within != over)
        ends = np.sort(np.stack([cost[within], cost[over]]), axis=0)
        at = rows.group if origin is None else np.repeat(np.arange(len(start) - 1), np.diff(start))
        keep = (within != over)[at]
        keep &= (cost >= ends[0][at]) & (cost <= ends[1][at])
        if origin is None:
            done_within, done_over, origin = within.copy(), over.copy(), np.arange(len(loss))
            groups = np.arange(len(within))
        done_within[groups], done_over[groups] = origin[within], origin[over]
        groups = groups[open_groups]
        kept = np.flatnonzero(keep)
        loss, cost, origin = loss[kept], cost[kept], origin[kept]
        within, over = np.searchsorted(kept, within[open_groups]), np.searchsorted(kept, over[open_groups])
        start = np.concatenate([[0], np.cumsum(np.bincount(at[kept], minlength=len(start) - 1)[open_groups])])
        fixed_cost = int(rows.cost[done_within, 0].sum()) - int(cost[within].sum())

        chord = float((loss[within] - loss[over]).sum()) / float(int((cost[over] - cost[within]).sum()))
        price = chord
        middle = iterations > 12 and iterations % 2 == 0 and low_price > 0 and high_price < math.inf
        if middle:
            price = math.sqrt(low_price) * math.sqrt(high_price)
        values = loss + price * cost
        chosen = argmin(values, start)
        iterations += 1
        total = fixed_cost + int(cost[chosen].sum())
        below = float((values[chosen] - values[within]).sum())
        inside = fixed_cost + int(cost[within].sum()) < total < fixed_cost + int(cost[over].sum())
        if not middle and (not inside or below >= -4 * EPS * float(values[within].sum())):
            break
        if total <= limit:
            high_price, within = price, chosen if inside else within
        else:
            low_price, over = price, chosen if inside else over
    done_within = _fill(rows, done_within, done_over)
    above, bound, noise = above_base(rows, done_within, price)
    return Dual(done_within, done_over, price, max(bound, 0.0), noise, iterations, above)


def above_base(rows: Rows, base: IntArray, price: float) -> tuple[FloatArray, float, float]:
    """r (N,) ≥ 0, what every option adds above its group's best at a price; L(price); and what that was lowered by for
    rounding.

    Written as differences from a base choice that is (nearly) best at the price, so that rounding is relative to these,
    which matters where price · limit is many orders of magnitude above the loss.
    """
    more_loss = rows.loss - _spread(rows, rows.loss[base])
    paid = price * (rows.cost[:, 0] - _spread(rows, rows.cost[base, 0]))
    above = more_loss + paid
    # The true value is at least this; in most groups the base's own zero stays the least.
    above -= 3 * EPS * (np.abs(more_loss) + np.abs(paid))
    least = np.minimum.reduceat(above, rows.start[:-1])
    above -= _spread(rows, least)
    loss = math.fsum(rows.loss[base])
    unused = price * (int(rows.limit[0]) - int(rows.cost[base, 0].sum()))
    noise = 4 * EPS * (loss + abs(unused)) - math.fsum(least)
    return above, math.fsum([loss, -unused, -noise]), noise


def _spread(rows: Rows, values: Array) -> Array:
    """One value per group (G,) to all its rows (N,)."""
    n = int(rows.sizes[0])
    if len(values) * n == len(rows.loss) and (rows.sizes == n).all():
        return np.repeat(values, n)
    return values[rows.group]


def one_resource(problem: Problem, solver: str) -> str:
    """Why a one-resource solver does not take a problem, or ""."""
    if problem.objective != "sum":
        return f"solver '{solver}' minimises the sum of losses, not their '{problem.objective}'; use 'minimax'"
    if problem.pairwise:
        return f"solver '{solver}' knows no pairwise terms ({len(problem.pairwise)} here); use 'relaxation'"
    if problem.flat.cost.shape[1] != 1:
        what = f"{len(problem.resources)} resources" + (" and lower bounds" if problem.lower is not None else "")
        return f"solver '{solver}' takes one resource and no lower bounds, and this problem has {what}; use 'milp'"
    return ""


def cheapest(problem: Problem) -> IntArray | None:
    """The cheapest choice (G,) of a one-resource problem, or None where even that is over the budget, exactly."""
    flat = problem.flat
    choice = flat.choice(lexmin(flat.cost[:, 0], flat.loss, flat.start))
    return choice if problem.feasible(choice) else None


def ask_one(problem: Problem, solver: str) -> None:
    reason = one_resource(problem, solver)
    if reason:
        raise ProblemError(reason)


def _fill(rows: Rows, within: IntArray, over: IntArray) -> IntArray:
    """Move groups from `within` to `over`, which cost the same at the price, as long as they fit: the largest moves
    first.
    """
    now = within.copy()
    more = rows.cost[over, 0] - rows.cost[within, 0]
    left = int(rows.limit[0]) - int(rows.cost[within, 0].sum())
    order = np.argsort(-more, kind="stable")
    order = order[more[order] > 0]
    while len(order):
        # A run that fits, then past the first that does not.
        fits = int(np.searchsorted(np.cumsum(more[order]), left, side="right"))
        now[order[:fits]] = over[order[:fits]]
        left -= int(more[order[:fits]].sum())
        order = order[fits:]
        order = order[more[order] <= left]
    return now


@dataclass(frozen=True)
class Lagrangian:
    """The choice at the best price, repaired: what is left of the budget goes to the most loss saved that still fits.

    Fast and close, with a bound; for the proven optimum take `exact` (one resource) or `milp`.
    """

    name: str = "lagrangian"

    def why_not(self, problem: Problem) -> str:
        """Why this solver does not take the problem, or ""."""
        return one_resource(problem, self.name)

    def __call__(self, problem: Problem, *, time_limit: float | None = None, seed: int = 0) -> Solution:
        """Solve in a few passes over the options; deterministic, so `seed` is not used."""
        ask_one(problem, self.name)
        flat = problem.flat
        least = cheapest(problem)
        lower = Rows.of(flat, *whole(flat, up=False)[:2])
        at = dual(lower)
        if at is None or least is None:
            return Solution.none(problem, Status.INFEASIBLE, self.name)
        price = np.array([math.ldexp(at.price, lower.exponent + shift(flat))])
        upper = Rows.of(flat, *whole(flat, up=True)[:2])
        found = dual(upper)
        # Float costs rounded up may leave nothing; the cheapest choice is within the budget even so.
        choice = least if found is None else flat.choice(improve(upper, found.within, Deadline(time_limit)))
        loss, bound = problem.total_loss(choice), lower.true(at.bound)
        status = Status.OPTIMAL if loss - bound <= ROUNDING * magnitude(problem, choice) else Status.FEASIBLE
        return Solution.of(problem, choice, bound, status, self.name, iterations=at.iterations, price=price)


def improve(rows: Rows, chosen: IntArray, deadline: Deadline, moves: int = 100) -> IntArray:
    """Rows (G,) within the limits, made better by single changes: each time the one that saves the most loss and still
    fits.
    """
    now = chosen.copy()
    for _ in range(moves):
        if deadline.passed:
            break
        left = rows.limit - rows.cost[now].sum(axis=0)
        saved = rows.loss[now][rows.group] - rows.loss
        fits = ((rows.cost - rows.cost[now][rows.group]) <= left).all(axis=1)
        saved[~fits] = 0.0
        best = int(saved.argmax())
        if saved[best] <= 0:
            break
        now[rows.group[best]] = best
    return now
