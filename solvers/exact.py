"""Proven optimum for one resource: the dual, then a core of the undecided options, expanded with bounds.

Source: Pisinger, A minimal algorithm for the multiple-choice knapsack problem, EJOR 83 (1995) 394-410. Differences:
losses are floats, options are removed by reduced losses from the dual bound instead of by slopes, states are numpy
arrays.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field, replace

import numpy as np

from solvers.core import Best, Core
from solvers.lagrangian import Rows, ask_one, cheapest, dual, one_resource, shift, whole
from solvers.problem import Deadline, IntArray, Problem
from solvers.solution import ROUNDING, Solution, Status, magnitude

# States of a branch's core, kept in all: a few milliseconds.
NODE_STATES = 30_000
# Rounding of the bound, relative to the best loss, that is nothing to worry about.
CLEAR = 1e-13


@dataclass(frozen=True)
class Exact:
    """Branch over a core of undecided groups until nothing better can be left.

    `max_states`: how many partial choices are kept at once (each holds 32 bytes); beyond it the answer comes with the
    gap that is proven by then.
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
        choices = [] if answer is None else [flat.choice(answer.rows)]
        if not same:
            least = cheapest(problem)
            if least is None:
                return Solution.none(problem, Status.INFEASIBLE, self.name)
            # Rounded up, the answer is within the budget; rounded down, it proves.
            cost, limit, _ = whole(flat, up=False)
            answer = search(Rows.of(flat, cost, limit), deadline, self.max_states)
            assert answer is not None  # the cheapest choice is within the budget, and so within its costs rounded down
            choices += [c for c in [least, flat.choice(answer.rows)] if problem.feasible(c)]
        if answer is None:
            return Solution.none(problem, Status.INFEASIBLE, self.name)
        choice, bound = min(choices, key=problem.total_loss), rows.true(answer.bound)
        loss = problem.total_loss(choice)
        status = Status.TIME_LIMIT if deadline.passed else Status.FEASIBLE
        if loss - bound <= ROUNDING * magnitude(problem, choice):
            status = Status.OPTIMAL
        price = np.array([math.ldexp(answer.price, rows.exponent + shift(flat))])
        return Solution.of(problem, choice, bound, status, self.name, iterations=answer.iterations, price=price)


@dataclass(frozen=True, eq=False)
class Answer:
    """Chosen rows (G,), a proven bound in scaled loss, how many states were made, and the price per unit of (whole)
    cost.
    """

    rows: IntArray
    bound: float
    iterations: int
    price: float


def search(rows: Rows, deadline: Deadline, max_states: int) -> Answer | None:
    """The best rows of a scaled one-resource problem with integer costs; None where the cheapest choice is over the
    limit.

    One core is enough for nearly every problem. Where it grows too large, as when one group weighs more than all others
    together, its options are split and each half gets its own price: branch and bound, the least bound first.
    """
    rows, unit = coarse(rows)
    at = dual(rows)
    if at is None:
        return None
    if at.over is None:
        return Answer(at.within, 0.0, 1, 0.0)
    best = Best(at.within, math.inf)
    core = Core(rows, at, best)
    # Narrow expansions find a good choice; its gap leaves few options for the wide one.
    states = sum(core.expand(deadline, cap, max_states, most_groups=50).states for cap in (200, 2000))
    if core.noise > CLEAR * best.loss and (rows.loss > best.loss).any():
        # Losses far above the best one drown it in rounding; none of them is in a better choice, so they go.
        part, origin = rows.part(np.flatnonzero(rows.loss <= best.loss))
        answer = search(part, deadline, max_states)
        assert answer is not None  # the best choice is among the options left
        price = answer.price / unit
        return Answer(origin[answer.rows], answer.bound, states + answer.iterations, price)
    root = core.expand(deadline, 20_000, min(100_000, max_states), most_groups=len(rows.sizes))
    states += root.states
    noise = core.noise
    heap = [] if root.complete else [_Node(core.bound, 0, core.undecided(), at.within, at.over)]
    count = 1
    branching = max_states // 4
    while heap and heap[0].bound < best.loss - noise and states < branching and not deadline.passed:
        node = heapq.heappop(heap)
        for live in _halves(rows, node):
            part, origin = rows.part(live)
            child = dual(part)
            states += 1
            if child is None:
                continue
            if child.over is None:
                if child.bound < best.loss:
                    best.rows, best.loss = origin[child.within], child.bound
                continue
            if child.bound >= best.loss - noise:
                continue
            small = Core(part, child, best, origin)
            made = small.expand(deadline, NODE_STATES // 10, NODE_STATES, most_groups=len(part.sizes))
            states += made.states
            noise = max(noise, small.noise)
            if not made.complete:
                ends = origin[child.within], origin[child.over]
                heapq.heappush(heap, _Node(max(small.bound, node.bound), count, origin[small.undecided()], *ends))
                count += 1
    bound = core.bound if root.complete else min([best.loss - noise, *(n.bound for n in heap)])
    if bound < best.loss - noise and not deadline.passed:
        # Problems that branching does not break up, such as sums of equal slopes, need a wider core.
        states += core.expand(deadline, max_states // 4, max_states - states, most_groups=len(rows.sizes)).states
        bound = max(bound, core.bound)
    return Answer(best.rows, bound, states, at.price / unit)


@dataclass(frozen=True, order=True)
class _Node:
    """Rows that may still hold a better choice, with the choices their dual lies between; ordered by bound, then by
    age.
    """

    bound: float
    age: int
    live: IntArray = field(compare=False)
    within: IntArray = field(compare=False)
    over: IntArray = field(compare=False)


def _halves(rows: Rows, node: _Node) -> list[IntArray]:
    """The node's rows split at the group whose options within and over the limit differ most in cost."""
    ends = np.stack([rows.cost[node.within, 0], rows.cost[node.over, 0]])
    g = int(np.abs(ends[1] - ends[0]).argmax())
    cut = int(ends[:, g].min())
    here = rows.group[node.live] == g
    dear = rows.cost[node.live, 0] > cut
    return [node.live[~here | ~dear], node.live[~here | dear]]


def coarse(rows: Rows) -> tuple[Rows, int]:
    """The same rows with costs in units of their greatest common divisor, the limit rounded down to it; and that."""
    unit = int(np.gcd.reduce(rows.cost[:1000, 0]))
    if unit > 1:
        unit = int(np.gcd.reduce(np.append(rows.cost[:, 0], unit)))
    if unit <= 1:
        return rows, 1
    return replace(rows, cost=rows.cost // unit, limit=rows.limit // unit), unit
