"""Branch and bound for several resources: a proof for what one set of prices leaves open.

A part is split at a group in which the choices between which its prices lie differ most; each half has its own prices,
whose bound is higher. The part with the least bound is split first, until that bound meets the aim.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace

import numpy as np

from solvers.lagrangian import Rows
from solvers.problem import Deadline, IntArray
from solvers.several import Bundle, Prices, dual_prices

# Partial choices expanded in a part, kept in all: as long as its prices take, some milliseconds.
PART_STATES = 4_000


@dataclass(frozen=True, order=True)
class _Part:
    """Rows (of the whole problem) that may still hold a better choice, and their prices; ordered by bound, then age."""

    bound: float
    age: int
    live: IntArray = field(compare=False)
    prices: Prices = field(compare=False)  # its choices `met` are rows of the whole problem


def branch(state: Bundle, aim: float, deadline: Deadline, most: int) -> int:
    """Raise state.bound, and improve state.rows, over at most `most` splits; how many it made.

    Ends where no part can improve the best loss by more than `aim` (in scaled loss).
    """
    rows = state.problem
    heap = [_Part(state.bound, 0, np.union1d(state.reduce(), state.base), state.prices)]
    splits, age = 0, 1
    while heap and splits < most and not deadline.passed:
        if heap[0].bound >= state.upper - aim - state.noise:
            break
        part = heapq.heappop(heap)
        halves = _halves(rows, part)
        if not halves:
            heapq.heappush(heap, part)
            break
        splits += 1
        for live in halves:
            child = _child(rows, state, part, live, aim, deadline)
            if child is not None:
                heapq.heappush(heap, _Part(child[0], age, child[1], child[2]))
                age += 1
    if state.rows is not None:
        state.bound = max(state.bound, min([state.upper - aim - state.noise, *(p.bound for p in heap)]))
    return splits


def _child(
    rows: Rows, state: Bundle, part: _Part, live: IntArray, aim: float, deadline: Deadline
) -> tuple[float, IntArray, Prices] | None:
    """Bound, rows and prices of a half, or None where it holds no choice that is better by more than `aim`."""
    inner, origin = rows.part(live)
    kept = np.isin(part.prices.met, live).all(axis=1)
    known = np.searchsorted(origin, part.prices.met[kept][-12:])
    prices = dual_prices(inner, deadline, tolerance=1e-7, most=40, after=replace(part.prices, met=known))
    if prices.infeasible or prices.bound >= state.upper - aim - state.noise:
        return None
    small = Bundle(inner, prices)
    if state.rows is not None:
        # The best choice may lie elsewhere; here only better ones count.
        small.upper, small.rows = state.upper, small.base
    before = small.upper
    closed = small.expand(deadline, PART_STATES // 4, PART_STATES, len(inner.sizes), aim)
    if small.rows is not None and small.upper < before:
        state.offer(origin[small.rows])
    if closed:
        return None
    left = np.union1d(small.reduce(), small.base)
    return max(part.bound, small.bound), origin[left], replace(prices, met=origin[prices.met])


def _halves(rows: Rows, part: _Part) -> list[IntArray]:
    """The part's rows split at one group; nothing where every group has one row left."""
    prices = part.prices
    unit = np.maximum(np.abs(rows.limit.astype(np.float64)), 1e-300)
    values = rows.loss[prices.met].sum(axis=1) + rows.cost[prices.met].sum(axis=1) @ prices.price
    tight = prices.met[np.argsort(values, kind="stable")[: rows.cost.shape[1] + 1]]
    share = rows.cost[tight] / unit
    spread = (share.max(axis=0) - share.min(axis=0)) * (prices.price > 0)
    if (spread > 0).any():
        g, r = np.unravel_index(int(spread.argmax()), spread.shape)
        costs = rows.cost[tight[:, g], r]
        middle = 0.5 * (float(costs.min()) + float(costs.max()))
        dear = rows.cost[part.live, r] > middle
    else:
        # The prices rest on one choice: split the group with the most options left, in the middle of its list.
        g = np.bincount(rows.group[part.live]).argmax()
        own = part.live[rows.group[part.live] == g]
        dear = part.live >= own[len(own) // 2]
    here = rows.group[part.live] == g
    halves = [part.live[~here | ~dear], part.live[~here | dear]]
    return halves if all((rows.group[h] == g).any() for h in halves) else []
