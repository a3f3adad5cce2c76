"""The linear relaxation by cvxpy: prices with a meaning, and pairwise terms.

    minimise   Σ loss·x + Σ_p M_p·y_p   subject to   Σ_j x_gj = 1 : value_g,   Σ cost·x ≤ limit : price,
               Σ_j y_p[i, j] = x_gi : α,   Σ_i y_p[i, j] = x_hj : β,   x, y ≥ 0        (the local polytope of the pairs)

Any price ≥ 0, α and β give a bound, so the bound printed is computed from them here, not read from the solver.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from solvers.hulls import hulls
from solvers.lagrangian import EPS, Rows
from solvers.milp import finite
from solvers.pairwise import Move, descend
from solvers.problem import Deadline, FloatArray, IntArray, Problem, ProblemError
from solvers.several import dual_prices
from solvers.solution import ROUNDING, Solution, Status, magnitude


@dataclass(frozen=True, eq=False)
class Relaxed:
    """The relaxation's answer: `share` (N,) of every option of the flat problem, `price` (K,) of the flat problem's
    limits in loss per unit, `value` (G,) the dual value of every group (its loss plus what it pays), and the proven
    `bound`.
    """

    share: FloatArray
    price: FloatArray
    value: FloatArray
    bound: float
    status: str


def relax(problem: Problem, time_limit: float | None = None) -> Relaxed | None:
    """Solve the linear relaxation; None where cvxpy's solver finds no solution (infeasible, or out of time)."""
    import cvxpy as cp
    from scipy.sparse import csr_matrix

    flat = problem.flat
    cost, limit = finite(flat.cost, flat.limit)
    G = problem.groups
    kept, known = _columns(problem, time_limit)
    N = len(kept)
    # In units of the largest loss and of the limits: solvers have absolute tolerances.
    span = max(float(np.abs(flat.loss).max()), *(float(np.abs(p.loss).max()) for p in problem.pairwise), 1e-300)
    unit = np.maximum(np.abs(limit.astype(np.float64)), np.maximum(np.abs(cost).max(axis=0), 1e-300))
    x = cp.Variable(N, nonneg=True)
    pick = csr_matrix((np.ones(N), (flat.group[kept], np.arange(N))), shape=(G, N))
    one = pick @ x == 1
    within = csr_matrix((cost[kept] / unit).T) @ x <= limit / unit
    objective = (flat.loss[kept] / span) @ x
    links = []
    for first, second, table in _tables(problem):
        y = cp.Variable(table.shape, nonneg=True)
        links.append((cp.sum(y, axis=1) == x[first], cp.sum(y, axis=0) == x[second]))
        objective = objective + cp.sum(cp.multiply(table / span, y))
    model = cp.Problem(cp.Minimize(objective), [one, within, *(c for pair in links for c in pair)])
    options = {} if time_limit is None else {"time_limit": max(0.01, time_limit)}
    try:
        with warnings.catch_warnings():
            # "Solution may be inaccurate", at a time limit: nothing here rests on it being accurate.
            warnings.simplefilter("ignore", UserWarning)
            model.solve(solver=cp.HIGHS, **options)
    except cp.SolverError:
        return None
    if x.value is None or one.dual_value is None:
        return None
    price = np.maximum(np.asarray(within.dual_value, dtype=np.float64), 0.0) * span / unit
    duals = [(span * np.asarray(a.dual_value), span * np.asarray(b.dual_value)) for a, b in links]
    bound = max(known, _bound(problem, price, duals), _bound(problem, price, [(-a, -b) for a, b in duals]))
    full = np.zeros(len(flat.limit))
    held = flat.limit < (2.0**61 if flat.limit.dtype == np.int64 else np.inf)
    full[held if held.any() else slice(0, 1)] = price
    value = np.asarray(one.dual_value, dtype=np.float64) * span
    share = np.zeros(len(flat.loss))
    share[kept] = x.value
    return Relaxed(share, full, -value, bound, str(model.status))


def _columns(problem: Problem, time_limit: float | None) -> tuple[IntArray, float]:
    """The options worth a variable, and a bound known without solving.

    With one resource only options on the lower hulls can be in the solution. With several, those that add least at the
    best prices are taken; the bound is computed over all options, so leaving some out can only make it less tight.
    """
    flat = problem.flat
    cost, limit = finite(flat.cost, flat.limit)
    if problem.pairwise:
        return np.arange(len(flat.loss)), -math.inf
    if cost.shape[1] == 1:
        return np.sort(hulls(flat.loss, cost[:, 0], flat.start).rows), -math.inf
    rows = Rows.of(flat, cost, limit)
    prices = dual_prices(rows, Deadline(time_limit))
    values = rows.loss + rows.cost @ prices.price
    above = values - np.minimum.reduceat(values, rows.start[:-1])[rows.group]
    most = min(20 * problem.groups, len(above)) - 1
    near = np.flatnonzero(above <= np.partition(above, most)[most])
    return np.unique(np.concatenate([near, *prices.met])), rows.true(prices.bound)


def _tables(problem: Problem) -> list[tuple[slice, slice, FloatArray]]:
    """Pairwise terms by rows of the flat problem, with the options of fixed groups cut out."""
    start, option, found = problem.flat.start, problem.flat.option, []
    for p in problem.pairwise:
        first, second = slice(start[p.first], start[p.first + 1]), slice(start[p.second], start[p.second + 1])
        found.append((first, second, p.loss[np.ix_(option[first], option[second])]))
    return found


def _bound(problem: Problem, price: FloatArray, duals: list[tuple[FloatArray, FloatArray]]) -> float:
    """Σ_g min_i (loss + price·cost + Σ α) + Σ_p min_ij (M - α - β) - price·limit, less what rounding may have added."""
    flat = problem.flat
    cost, limit = finite(flat.cost, flat.limit)
    values = flat.loss + cost @ price
    sizes = np.abs(flat.loss) + np.abs(cost) @ price
    terms = []
    for (first, second, table), (a, b) in zip(_tables(problem), duals, strict=True):
        values[first] += a
        values[second] += b
        sizes[first] += np.abs(a)
        sizes[second] += np.abs(b)
        terms.append(float((table - a[:, None] - b).min()))
        terms.append(-4 * EPS * float((np.abs(table) + np.abs(a)[:, None] + np.abs(b)).max()))
    terms += np.minimum.reduceat(values, flat.start[:-1]).tolist()
    paid = (price * limit).tolist()
    noise = (4 + len(price) + len(duals)) * EPS * float(np.maximum.reduceat(sizes, flat.start[:-1]).sum())
    return math.fsum([*terms, *(-p for p in paid), -noise, -4 * EPS * math.fsum(map(abs, paid))])


@dataclass(frozen=True)
class Relaxation:
    """Round the linear relaxation, repair it, improve it by single and double changes; bound and prices from its duals.

    The solver for pairwise terms, and the one whose prices are exact linear-programming duals. `sweeps`: passes over
    all groups.
    """

    sweeps: int = 20
    name: str = "relaxation"

    def why_not(self, problem: Problem) -> str:
        """Why this solver does not take the problem, or ""."""
        return "" if problem.objective == "sum" else f"solver '{self.name}' minimises the sum of losses; use 'minimax'"

    def __call__(self, problem: Problem, *, time_limit: float | None = None, seed: int = 0) -> Solution:
        """Solve; deterministic, so `seed` is not used."""
        if self.why_not(problem):
            raise ProblemError(self.why_not(problem))
        deadline = Deadline(time_limit)
        if (problem.smallest() > problem.budget).any():
            return Solution.none(problem, Status.INFEASIBLE, self.name)
        relaxed = relax(problem, None if time_limit is None else 0.5 * deadline.left)
        # Every group's smallest loss and every pair's smallest term are a bound of their own, free of cancellation.
        least = [float(a.min()) for a in np.split(problem.flat.loss, problem.flat.start[1:-1])]
        bound = math.fsum(least + [float(p.loss.min()) for p in problem.pairwise])
        bound = bound if relaxed is None else max(bound, relaxed.bound)
        choice = descend(problem, self._starts(problem, relaxed), self.sweeps, deadline)
        if choice is None:
            status = Status.TIME_LIMIT if deadline.passed else Status.UNKNOWN
            return Solution.none(problem, status, self.name, bound, message="no rounding is within the limits")
        status = Status.TIME_LIMIT if deadline.passed else Status.FEASIBLE
        if problem.total_loss(choice) - bound <= ROUNDING * magnitude(problem, choice):
            status = Status.OPTIMAL
        price = None if relaxed is None else relaxed.price[: len(problem.resources)]
        return Solution.of(problem, choice, bound, status, self.name, price=price)

    @staticmethod
    def _starts(problem: Problem, relaxed: Relaxed | None) -> list[IntArray]:
        """Rows to start from: the largest shares, the best at the prices, and the cheapest."""
        flat = problem.flat
        move = Move(problem)
        starts = [move.cheapest()]
        if relaxed is not None:
            starts = [move.argmin(-relaxed.share), move.argmin(flat.loss + flat.cost @ relaxed.price), *starts]
        return starts


def marginal(problem: Problem, choice: IntArray, resource: int = 0) -> tuple[FloatArray, FloatArray]:
    """What a unit of a resource is worth in every group at a choice (G,): loss saved per unit more, loss added per unit
    less.

    Both (G,): the steepest step up (0 where there is none) and the gentlest step down (inf where there is none). At the
    best choice of a convex problem the price lies between them in every group. Pairwise terms are not counted.
    """
    up, down = np.zeros(problem.groups), np.full(problem.groups, np.inf)
    for g, j in enumerate(np.asarray(choice).tolist()):
        more = (problem.cost[g][:, resource] - problem.cost[g][j, resource]).astype(np.float64)
        saved = problem.loss[g][j] - problem.loss[g]
        if (more > 0).any():
            up[g] = max(0.0, float((saved[more > 0] / more[more > 0]).max()))
        if (more < 0).any():
            down[g] = float((saved[more < 0] / more[more < 0]).min())
    return up, down
