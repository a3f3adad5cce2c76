"""Several resources: reduce by the dual bound, give what is left to HiGHS, prove the answer ourselves.

HiGHS keeps limits within 1e-6 of their scale, so its "optimal" can be over a budget of bytes: here its choice is added
up in integers. The bound printed is the Lagrangian one, raised by partial choices (`several.Bundle`), where that meets
the gap soon. Where it does not, as with costs that few options change (MACs of low-rank layers), it is that of HiGHS's
branch and cut, less what its tolerances allow, and the solution's message says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from solvers.branch import branch
from solvers.lagrangian import Rows, argmin, improve
from solvers.problem import Array, Deadline, IntArray, Problem, ProblemError
from solvers.several import Bundle, dual_prices
from solvers.solution import ROUNDING, Solution, Status, magnitude

# Splits before HiGHS is asked: some ten milliseconds each where there are thousands of options.
EARLY = 20
# HiGHS's tolerance of a reduced cost, in the units that it is given.
REDUCED_COST = 1e-7


@dataclass(frozen=True)
class MILP:
    """Solve to a relative `gap` proven by our own bound or HiGHS's, or say what was proven.

    `states`: how many partial choices the proof may hold; `branches`: how often it may split the problem. To compare,
    `reduce=False` hands HiGHS the whole problem, and `start=False` no choice to start from.
    """

    gap: float = 1e-4
    states: int = 300_000
    branches: int = 2000
    reduce: bool = True
    start: bool = True
    name: str = "milp"

    def why_not(self, problem: Problem) -> str:
        """Why this solver does not take the problem, or ""."""
        if problem.objective != "sum":
            return f"solver '{self.name}' minimises the sum of losses; use 'minimax'"
        if problem.pairwise:
            return f"solver '{self.name}' knows no pairwise terms ({len(problem.pairwise)} here); use 'relaxation'"
        return ""

    def __call__(self, problem: Problem, *, time_limit: float | None = None, seed: int = 0) -> Solution:
        """Solve; deterministic, so `seed` is not used."""
        if self.why_not(problem):
            raise ProblemError(self.why_not(problem))
        deadline = Deadline(time_limit)
        flat = problem.flat
        if (problem.smallest() > problem.budget).any():
            return Solution.none(problem, Status.INFEASIBLE, self.name)
        rows = Rows.of(flat, *finite(flat.cost, flat.limit))
        prices = dual_prices(rows, deadline)
        if prices.infeasible:
            return self._infeasible(problem, "proven: the Lagrangian bound is above every loss", time_limit)
        state = Bundle(rows, prices)
        if self.start:
            self._start(state, [state.base, *prices.met[::-1][:8]], deadline)
            state.expand(deadline, cap=300, total=self.states, most_groups=40)
        if self.reduce and self._open(rows, state) and not deadline.passed:
            # Most gaps close within a few splits, before HiGHS has presolved.
            branch(state, self._aim(rows, state), deadline, min(self.branches, EARLY))
        said = ""
        if self._open(rows, state) and not deadline.passed:
            live, own = state.reduce() if self.reduce else np.arange(len(rows.loss)), state.bound
            said, chosen, bound = highs(rows, live, state, deadline, self.gap)
            if chosen is not None and not state.offer(chosen):
                fixed = state.repair(chosen, deadline)
                if fixed is not None:
                    state.offer(improve(rows, fixed, deadline))
            # What the bound took out holds no choice better than the best one known.
            state.bound = max(own, min(bound, state.upper))
            if state.bound > own:
                said += f", and its bound (the Lagrangian one is {rows.true(own):.6g})"
        if self._open(rows, state) and not deadline.passed:
            aim = self._aim(rows, state)
            if not state.expand(deadline, self.states, self.states, len(rows.sizes), aim):
                branch(state, aim, deadline, self.branches)
        if state.rows is None:
            if state.bound == math.inf:
                return self._infeasible(problem, "proven: every partial choice ends over a limit", time_limit)
            if said == "infeasible":
                return self._infeasible(problem, "by HiGHS's word: the linear relaxation is feasible", time_limit)
            status = Status.TIME_LIMIT if deadline.passed else Status.UNKNOWN
            return Solution.none(problem, status, self.name, rows.true(state.bound), message=f"HiGHS: {said}")
        choice, bound = flat.choice(state.rows), rows.true(state.bound)
        status = Status.TIME_LIMIT if deadline.passed else Status.FEASIBLE
        if problem.total_loss(choice) - bound <= ROUNDING * magnitude(problem, choice):
            status = Status.OPTIMAL
        left = f"{len(state.live)} of {len(rows.loss)} options left by the bound" + (f"; HiGHS: {said}" if said else "")
        price = np.ldexp(prices.price, rows.exponent)[: len(problem.resources)]
        return Solution.of(
            problem, choice, bound, status, self.name, iterations=prices.iterations, message=left, price=price
        )

    @staticmethod
    def _start(state: Bundle, starts: list[IntArray], deadline: Deadline) -> None:
        """Offer repaired and improved starts, made from the options that add least at the prices."""
        rows, groups = state.problem, len(state.problem.sizes)
        most = min(20 * groups, len(state.above)) - 1
        near = np.flatnonzero(state.above <= np.partition(state.above, most)[most])
        part, origin = rows.part(np.unique(np.concatenate([near, *starts])))
        small = Bundle(part, replace(state.prices, met=state.prices.met[:0]))
        for chosen in starts:
            fixed = None if deadline.passed else small.repair(np.searchsorted(origin, chosen), deadline)
            if fixed is not None:
                state.offer(origin[fixed])
                state.offer(origin[improve(part, fixed, deadline)])
        if state.rows is None:
            fixed = state.repair(state.base, deadline)
            if fixed is not None:
                state.offer(improve(rows, fixed, deadline))

    def _open(self, rows: Rows, state: Bundle) -> bool:
        """Whether the gap is not reached yet."""
        if state.rows is None:
            return state.bound < math.inf
        loss, bound = rows.true(state.upper), rows.true(state.bound)
        return loss - bound > self.gap * abs(bound) and state.upper - state.bound > 4 * state.noise

    def _aim(self, rows: Rows, state: Bundle) -> float:
        """By how much, in scaled loss, a choice must be better to be worth looking for: half the gap."""
        loss = 0.0 if state.rows is None or math.isinf(self.gap) else abs(rows.true(state.upper))
        return math.ldexp(0.5 * self.gap * loss, -rows.exponent) if loss else 0.0

    def _infeasible(self, problem: Problem, why: str, time_limit: float | None) -> Solution:
        """The least of each resource that the other budgets allow; where they allow nothing, whatever they are."""
        smallest = problem.smallest().copy()
        if not (smallest > problem.budget).any():
            for r in range(len(smallest)):
                others = problem.budget.copy()
                others[r] = problem.total_cost(np.array([a[:, r].argmax() for a in problem.cost]))[r]
                asked = Problem(
                    [a[:, r].astype(np.float64) for a in problem.cost],
                    problem.cost,
                    others,
                    problem.resources,
                    lower=problem.lower,
                    fixed=problem.fixed,
                )
                rows = Rows.of(asked.flat, *finite(asked.flat.cost, asked.flat.limit))
                if dual_prices(rows, Deadline(time_limit)).infeasible:
                    continue
                least = MILP(self.gap, self.states)._least(asked, time_limit)
                if least is not None:
                    smallest[r] = asked.total_cost(least)[r]
        return Solution.none(problem, Status.INFEASIBLE, self.name, smallest_budget=smallest, message=why)

    def _least(self, asked: Problem, time_limit: float | None) -> IntArray | None:
        """A choice of the least loss, or None where none is found (never asks for advice again)."""
        found = _Quiet(self.gap, self.states)(asked, time_limit=time_limit)
        return found.choice if found.found else None


class _Quiet(MILP):
    """MILP that reports an infeasible problem without working out the smallest budgets."""

    def _infeasible(self, problem: Problem, why: str, time_limit: float | None) -> Solution:
        return Solution.none(problem, Status.INFEASIBLE, self.name, message=why)


def finite(cost: Array, limit: Array) -> tuple[Array, Array]:
    """Costs (N, K) and limits (K,) with unlimited resources dropped (one is kept where all are unlimited, at 2**61)."""
    held = limit < 2.0**61 if limit.dtype == np.int64 else limit < np.inf
    if held.all():
        return cost, limit
    if not held.any():
        return cost[:, :1], np.full(1, 2**61, limit.dtype)
    return cost[:, held], limit[held]


def highs(
    rows: Rows, live: IntArray, state: Bundle, deadline: Deadline, gap: float
) -> tuple[str, IntArray | None, float]:
    """What HiGHS says about the options `live` (the others are out); its rows (G,), not yet checked; its bound on what
    any choice of them loses, -inf where it has none.

    It starts from the best choice known. Limits are scaled to about one, so its tolerance of 1e-6 is relative to them;
    it lets more choices in, so the bound stands. A reduced cost may be wrong by `REDUCED_COST`, and one option of each
    group has its whole share of it: that is taken off.
    """
    import highspy
    from scipy.sparse import csc_matrix

    live = np.union1d(live, state.base if state.rows is None else state.rows)
    group = rows.group[live]
    G, K, n = len(rows.sizes), rows.cost.shape[1], len(live)
    unit = np.maximum(np.abs(rows.limit.astype(np.float64)), np.maximum(rows.cost.max(axis=0), 1e-300))
    scaled = rows.cost[live] / unit
    at, r = np.nonzero(scaled)
    matrix = csc_matrix(
        (np.append(np.ones(n), scaled[at, r]), (np.append(group, G + r), np.append(np.arange(n), at))), shape=(G + K, n)
    )
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = n, G + K
    # In units of the largest loss left, or HiGHS's absolute tolerances would call small losses nothing.
    worst = max(float(rows.loss[live].max()), 1e-300)
    model.col_cost_ = rows.loss[live] / worst
    model.col_lower_, model.col_upper_ = np.zeros(n), np.ones(n)
    model.row_lower_ = np.append(np.ones(G), np.full(K, -highspy.kHighsInf))
    model.row_upper_ = np.append(np.ones(G), rows.limit / unit)
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    model.integrality_ = [highspy.HighsVarType.kInteger] * n
    solver = highspy.Highs()
    options = {"output_flag": False, "threads": 1, "random_seed": 0, "mip_rel_gap": gap / 4}
    for key, value in {**options, "time_limit": max(0.01, min(deadline.left, 1e9))}.items():
        solver.setOptionValue(key, value)
    solver.passModel(model)
    if state.rows is not None:
        start = highspy.HighsSolution()
        start.col_value = np.isin(live, state.rows).astype(np.float64).tolist()
        solver.setSolution(start)
    solver.run()
    said = solver.modelStatusToString(solver.getModelStatus()).lower()
    values, info = np.array(solver.getSolution().col_value), solver.getInfo()
    bound = float(info.mip_dual_bound) * worst
    bound = bound - (G + K) * REDUCED_COST * worst if math.isfinite(bound) else -math.inf
    if len(values) != n or info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return said, None, bound
    cuts = np.flatnonzero(np.diff(group, prepend=-1))
    return said, live[argmin(-values, np.append(cuts, n))], bound
