"""Groups whose options must agree: channels that one layer makes and the next one takes, in one solve with everything
else.

Every coupling is a variable with a few levels, and an option belongs to one level of each variable that its group
touches. At prices λ the rest is a sum of small tables over those variables, and its least value is found exactly by
eliminating one variable after another (non-serial dynamic programming; Bertelè and Brioschi, 1972): cheap where each
layer touches an input and an output only, as networks do. That is the Lagrangian bound; it takes out what no better
choice can hold, HiGHS gets the rest with the agreement written as equations, and the levels that come out are solved
again as a problem of their own, in whole bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solvers.fields import INTEGER_LIMIT, ProblemError
from solvers.milp import REDUCED_COST
from solvers.problem import Array, Deadline, FloatArray, IntArray, Problem
from solvers.registry import solve
from solvers.solution import ROUNDING, Solution, SolutionError, Status, magnitude

__all__ = ["Coupling", "solve_coupled"]

TABLE = 4_000_000  # entries of the largest table that an elimination may make
ROUNDS = 60  # cutting planes for the prices
STARTS = 6  # sets of levels that are solved by themselves before HiGHS is asked


@dataclass(frozen=True, eq=False)
class Coupling:
    """What the options of a problem's groups must agree on.

    levels: how many levels each of V variables has. scope: for each of G groups the variables that it touches, each
    once. state: for each group (n_g, len(scope[g])) int: the level of each of them that an option belongs to. Raises
    ProblemError where shapes or levels do not fit.
    """

    levels: Sequence[int]
    scope: Sequence[Sequence[int]]
    state: Sequence[Array]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(int(n) for n in self.levels))
        object.__setattr__(self, "scope", tuple(tuple(int(v) for v in s) for s in self.scope))
        object.__setattr__(self, "state", tuple(np.asarray(s, np.int64) for s in self.state))
        if len(self.scope) != len(self.state):
            raise ProblemError(
                f"{len(self.scope)} groups have a scope but {len(self.state)} have states; both need one"
            )
        for g, (scope, state) in enumerate(zip(self.scope, self.state, strict=True)):
            if len(set(scope)) != len(scope) or not all(0 <= v < len(self.levels) for v in scope):
                raise ProblemError(
                    f"group {g} touches variables {scope}; there are {len(self.levels)}, each once at most"
                )
            if state.ndim != 2 or state.shape[1] != len(scope):
                raise ProblemError(f"group {g} has states of shape {state.shape}; needed (options, {len(scope)})")
            top = np.array([self.levels[v] for v in scope], np.int64)
            if (state < 0).any() or (state >= top).any():
                raise ProblemError(
                    f"group {g} has an option at a level that its variables do not have ({top.tolist()})"
                )

    def assignment(self, choice: Array) -> IntArray:
        """The level of every variable (V,) under a choice (G,), -1 where nothing touches it. Raises SolutionError where
        two groups disagree.
        """
        found = np.full(len(self.levels), -1, np.int64)
        for g, j in enumerate(np.asarray(choice).tolist()):
            for v, level in zip(self.scope[g], self.state[g][j].tolist(), strict=True):
                if found[v] not in (-1, level):
                    raise SolutionError(f"group {g} has variable {v} at level {level}, another group at {found[v]}")
                found[v] = level
        return found


def solve_coupled(
    problem: Problem, coupling: Coupling, *, gap: float = 1e-4, time_limit: float | None = None
) -> Solution:
    """The least sum of losses within every budget such that all groups agree, to a relative gap, with its bound.

    The bound is the Lagrangian one, or HiGHS's where that is higher, less what its tolerances allow; the message says
    whose it is. Raises ProblemError for lower bounds, fixed or pairwise terms, objective "max", and where variables
    hang together so much that a table would have more than `TABLE` entries.
    """
    if problem.objective != "sum" or problem.pairwise or problem.lower is not None or problem.fixed:
        raise ProblemError("coupled groups are solved for the sum of losses, without pairwise, lower or fixed terms")
    if [len(s) for s in coupling.state] != [len(a) for a in problem.loss]:
        raise ProblemError("the coupling is of another problem: it has other numbers of options")
    return _Search(problem, coupling, gap, Deadline(time_limit)).run().check(problem)


class _Search:
    """Best choice and best bound so far, over the options that another one of the same levels does not beat."""

    def __init__(self, problem: Problem, coupling: Coupling, gap: float, deadline: Deadline) -> None:
        self.problem, self.coupling, self.gap, self.deadline = problem, coupling, gap, deadline
        held = np.flatnonzero(problem.budget < (2**61 if problem.integer else np.inf))
        self.held = held if len(held) else np.arange(1)
        self.live = [_undominated(a, c, s) for a, c, s in zip(problem.loss, problem.cost, coupling.state, strict=True)]
        self.order = _order(coupling)
        self.shapes = [tuple(coupling.levels[v] for v in scope) for scope in coupling.scope]
        # Where in its group's table an option belongs.
        strides = [[math.prod(shape[i + 1 :]) for i in range(len(shape))] for shape in self.shapes]
        self.cell = [s @ np.array(stride, np.int64) for s, stride in zip(coupling.state, strides, strict=True)]
        top = [problem.cost[g].max(axis=0) for g in range(problem.groups)]
        self.unit = np.maximum(np.abs(problem.budget.astype(np.float64)), np.sum(top, axis=0).astype(np.float64))
        self.unit = np.maximum(self.unit[self.held], 1e-300)
        self.limit = np.minimum(problem.budget[self.held] / self.unit, 1e3)
        self.share = [c[:, self.held] / self.unit for c in problem.cost]
        self.choice: IntArray | None = None
        self.upper, self.bound, self.word = math.inf, -math.inf, ""
        self.tried: set[tuple[int, ...]] = set()

    def run(self) -> Solution:
        smallest = np.array([self._least(r) for r in range(len(self.problem.resources))])
        if np.isinf(smallest).any():
            worst = np.full(len(smallest), INTEGER_LIMIT) if self.problem.integer else smallest
            text = "there are no levels at which every group has an option"
            return Solution.none(self.problem, Status.INFEASIBLE, "coupled", smallest_budget=worst, message=text)
        smallest = np.ceil(smallest).astype(np.int64) if self.problem.integer else smallest
        if (smallest > self.problem.budget).any():
            return Solution.none(self.problem, Status.INFEASIBLE, "coupled", smallest_budget=smallest)
        price, met = self._prices()
        for levels in met[-STARTS:][::-1]:
            self._try(levels)
        if self._open():
            live = [self._left(g, price) for g in range(self.problem.groups)]
            said = self._highs(live)
            if self.choice is None and said == "infeasible":
                text = "by HiGHS's word: no levels and options keep every limit at once"
                return Solution.none(self.problem, Status.INFEASIBLE, "coupled", smallest_budget=smallest, message=text)
        if self.choice is None:
            status = Status.TIME_LIMIT if self.deadline.passed else Status.UNKNOWN
            return Solution.none(self.problem, status, "coupled", self.bound)
        bound = min(self.bound, self.upper)
        optimal = self.upper - bound <= ROUNDING * magnitude(self.problem, self.choice)
        status = Status.OPTIMAL if optimal else Status.TIME_LIMIT if self.deadline.passed else Status.FEASIBLE
        self.coupling.assignment(self.choice)
        return Solution.of(self.problem, self.choice, bound, status, "coupled", message=self.word)

    def _open(self) -> bool:
        return self.choice is None or self.upper - self.bound > self.gap * abs(self.bound)

    def _values(self, price: FloatArray) -> list[FloatArray]:
        return [a + s @ price for a, s in zip(self.problem.loss, self.share, strict=True)]

    def _tables(self, values: Sequence[FloatArray]) -> list[FloatArray]:
        """Per group its least value at each combination of levels that it touches, inf where it has no option."""
        tables = []
        for g, value in enumerate(values):
            table = np.full(math.prod(self.shapes[g]), math.inf)
            np.minimum.at(table, self.cell[g][self.live[g]], value[self.live[g]])
            tables.append(table.reshape(self.shapes[g]))
        return tables

    def _least(self, r: int) -> float:
        """What any agreeing choice takes of a resource at least."""
        tables = self._tables([c[:, r].astype(np.float64) for c in self.problem.cost])
        return _eliminate(self.coupling, tables, self.order)[0]

    def _prices(self) -> tuple[FloatArray, list[tuple[int, ...]]]:
        """Maximise the Lagrangian bound (Kelley's cutting planes); the levels met on the way, the last ones best."""
        from scipy.optimize import linprog

        K = len(self.limit)
        point, best, cuts = np.zeros(K), np.zeros(K), []
        ceiling = math.fsum(float(np.ptp(a)) for a in self.problem.loss) or 1.0
        base = math.fsum(float(a.min()) for a in self.problem.loss)
        box, top = 4.0 * ceiling, math.inf
        met: dict[tuple[int, ...], float] = {}
        for step in range(ROUNDS):
            values = self._values(point)
            total, levels = _eliminate(self.coupling, self._tables(values), self.order)
            rows = [self._row(g, values[g], levels) for g in range(self.problem.groups)]
            value = total - float(point @ self.limit)
            value -= 1e-12 * (abs(total) + float(point @ self.limit) + ceiling)
            if value > self.bound:
                self.bound, best = value, point
            met[levels] = value
            loss = math.fsum(float(a[j]) for a, j in zip(self.problem.loss, rows, strict=True))
            slope = np.sum([s[j] for s, j in zip(self.share, rows, strict=True)], axis=0) - self.limit
            cuts.append((loss - base, slope))
            if (top < math.inf and top - self.bound <= 1e-7 * max(abs(top), abs(self.bound))) or self.deadline.passed:
                break
            answer = linprog(
                [-1.0, *np.zeros(K)],
                A_ub=np.array([[1.0, *(-slope)] for _, slope in cuts]),
                b_ub=np.array([loss for loss, _ in cuts]) / ceiling,
                bounds=[(None, None)] + [(0.0, box / ceiling)] * K,
                method="highs",
            )
            if answer.status != 0:
                break
            top, new = base - answer.fun * ceiling, np.maximum(answer.x[1:], 0.0) * ceiling
            if (new >= box * 0.999).any() and box < 1e9 * ceiling:
                box, top = box * 30.0, math.inf
            point = new if step % 2 == 0 else 0.5 * (new + best)
        self.word = "the bound is the Lagrangian one"
        return best, sorted(met, key=lambda levels: met[levels])

    def _row(self, g: int, value: FloatArray, levels: Sequence[int]) -> int:
        """The best option of a group at these levels."""
        live = self._at(g, levels)
        return int(live[np.argmin(value[live])])

    def _at(self, g: int, levels: Sequence[int]) -> IntArray:
        wanted = np.array([levels[v] for v in self.coupling.scope[g]], np.int64)
        live = self.live[g]
        return live[(self.coupling.state[g][live] == wanted).all(axis=1)]

    def _try(self, levels: tuple[int, ...]) -> None:
        """Solve the problem that one set of levels leaves."""
        if levels in self.tried or self.deadline.passed:
            return
        self.tried.add(levels)
        live = [self._at(g, levels) for g in range(self.problem.groups)]
        if not all(map(len, live)):
            return
        part = Problem(
            [a[j] for a, j in zip(self.problem.loss, live, strict=True)],
            [c[j] for c, j in zip(self.problem.cost, live, strict=True)],
            self.problem.budget,
            self.problem.resources,
        )
        one = len(self.problem.resources) == 1
        left = None if math.isinf(self.deadline.left) else max(0.01, self.deadline.left)
        found = solve(part, "exact" if one else "milp", time_limit=left)
        if found.found:
            self._offer(np.array([int(j[i]) for j, i in zip(live, found.choice, strict=True)]))

    def _offer(self, choice: IntArray) -> None:
        loss = self.problem.total_loss(choice)
        if loss < self.upper and self.problem.feasible(choice):
            self.upper, self.choice = loss, choice

    def _left(self, g: int, price: FloatArray) -> IntArray:
        """The options of a group that a choice better than the best one known may hold."""
        values = self._values(price)
        tables = self._tables(values)
        own, live = tables[g], self.live[g]
        least = np.full(own.shape, math.inf)
        for at in np.ndindex(own.shape):
            if own[at] < math.inf:
                tables[g] = np.full(own.shape, math.inf)
                tables[g][at] = own[at]
                least[at] = _eliminate(self.coupling, tables, self.order)[0]
        cell = self.cell[g][live]
        bound = least.ravel()[cell] + (values[g][live] - own.ravel()[cell]) - float(price @ self.limit)
        slack = 1e-11 * (abs(self.upper) + abs(self.bound)) if self.upper < math.inf else 0.0
        kept = live[bound <= self.upper + slack]
        return kept if self.choice is None else np.union1d(kept, [self.choice[g]])

    def _highs(self, live: Sequence[IntArray]) -> str:
        """Hand what is left to HiGHS: its choice and its bound are taken, its word is given back."""
        import highspy
        from scipy.sparse import csc_matrix

        G, K = self.problem.groups, len(self.limit)
        start = np.concatenate([[0], np.cumsum([len(j) for j in live])]).astype(np.int64)
        loss = np.concatenate([a[j] for a, j in zip(self.problem.loss, live, strict=True)])
        base = [float(a[j].min()) for a, j in zip(self.problem.loss, live, strict=True)]
        loss = loss - np.repeat(base, np.diff(start))
        worst = max(float(loss.max()), 1e-300)
        share = np.concatenate([s[j] for s, j in zip(self.share, live, strict=True)])
        offset = len(loss) + np.concatenate([[0], np.cumsum(self.coupling.levels)]).astype(np.int64)
        entries: list[tuple[int, int, float]] = []
        lower, upper = [1.0] * G + [-highspy.kHighsInf] * K, [1.0] * G + self.limit.tolist()
        for g, rows in enumerate(live):
            entries += [(g, int(start[g]) + i, 1.0) for i in range(len(rows))]
            for position, v in enumerate(self.coupling.scope[g]):
                state = self.coupling.state[g][rows, position]
                for level in range(self.coupling.levels[v]):
                    at = len(lower)
                    entries += [(at, int(start[g]) + int(i), 1.0) for i in np.flatnonzero(state == level)]
                    entries.append((at, int(offset[v]) + level, -1.0))
                    lower.append(0.0)
                    upper.append(0.0)
        entries += [(G + int(k), int(i), float(share[i, k])) for i, k in zip(*np.nonzero(share), strict=True)]
        columns = int(offset[-1])
        row, column, value = (np.array(x) for x in zip(*entries, strict=True))
        matrix = csc_matrix((value, (row, column)), shape=(len(lower), columns))
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = columns, len(lower)
        model.col_cost_ = np.append(loss / worst, np.zeros(columns - len(loss)))
        model.col_lower_, model.col_upper_ = np.zeros(columns), np.ones(columns)
        model.row_lower_, model.row_upper_ = np.array(lower), np.array(upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = (
            matrix.indptr,
            matrix.indices,
            matrix.data,
        )
        model.integrality_ = [highspy.HighsVarType.kInteger] * columns
        solver = highspy.Highs()
        fixed = {"output_flag": False, "threads": 1, "random_seed": 0, "mip_rel_gap": 0.0}
        aim = 0.25 * self.gap * abs(self.bound) / worst if math.isfinite(self.bound) else 0.0
        for key, setting in {
            **fixed,
            "mip_abs_gap": aim,
            "time_limit": max(0.01, min(self.deadline.left, 1e9)),
        }.items():
            solver.setOptionValue(key, setting)
        solver.passModel(model)
        if self.choice is not None:
            guess = highspy.HighsSolution()
            values = np.zeros(columns)
            for g, rows in enumerate(live):
                values[int(start[g]) + int(np.flatnonzero(rows == self.choice[g])[0])] = 1.0
            for v, level in enumerate(self.coupling.assignment(self.choice).tolist()):
                if level >= 0:
                    values[int(offset[v]) + level] = 1.0
            guess.col_value = values.tolist()
            solver.setSolution(guess)
        solver.run()
        said = solver.modelStatusToString(solver.getModelStatus()).lower()
        info, found = solver.getInfo(), np.array(solver.getSolution().col_value)
        if len(found) == columns and info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
            picked = [int(rows[np.argmax(found[start[g] : start[g + 1]])]) for g, rows in enumerate(live)]
            self._offer(np.array(picked))  # by itself: there may be no time left to solve its levels again
            self._try(tuple(np.maximum(self.coupling.assignment(np.array(picked)), 0).tolist()))
        if math.isfinite(info.mip_dual_bound):
            # Variables of a group, or of a coupling, add up to one: each has a tolerance of its reduced cost, no more.
            slack = (G + len(self.coupling.levels) + K) * REDUCED_COST * worst
            bound = math.fsum(base) + float(info.mip_dual_bound) * worst - slack
            if bound > self.bound:
                lagrangian, self.bound = self.bound, min(bound, self.upper)
                self.word = f"the bound is HiGHS's ({said}); the Lagrangian one is {lagrangian:.6g}"
        return said


def _undominated(loss: FloatArray, cost: Array, state: IntArray) -> IntArray:
    """The options that no other one of the same levels beats in everything; of equal ones the first."""
    kept: list[int] = []
    order = np.lexsort([*cost.T[::-1], loss, *state.T])
    ends = np.flatnonzero((np.diff(state[order], axis=0) != 0).any(axis=1)) + 1
    for own in np.split(order, ends):
        front: list[int] = []
        for i in own.tolist():  # by loss, then by cost: only earlier ones can beat it
            if not front or not (cost[front] <= cost[i]).all(axis=1).any():
                front.append(i)
        kept += front
    return np.array(sorted(kept), np.int64)


def _order(coupling: Coupling) -> list[int]:
    """Variables in the order of their elimination: the one with the smallest table next. Raises ProblemError where one
    would be too large.
    """
    factors = [frozenset(s) for s in coupling.scope if s]
    left, order = set().union(*factors), []
    while left:
        joint = {v: frozenset().union(*(f for f in factors if v in f)) for v in left}
        sizes = {v: math.prod(coupling.levels[u] for u in joint[v]) for v in left}
        v = min((size, v) for v, size in sizes.items())[1]
        if sizes[v] > TABLE:
            raise ProblemError(
                f"{len(joint[v])} couplings hang together, a table of {sizes[v]:,} entries; at most {TABLE:,} are "
                "made: give them fewer levels, or leave some at one level"
            )
        factors = [f for f in factors if v not in f] + [joint[v] - {v}]
        left.remove(v)
        order.append(v)
    return order


def _eliminate(coupling: Coupling, tables: Sequence[FloatArray], order: Sequence[int]) -> tuple[float, tuple[int, ...]]:
    """The least sum of the groups' tables, and the level of each variable there (0 where nothing touches it)."""
    factors = [(scope, table) for scope, table in zip(coupling.scope, tables, strict=True) if scope]
    total = math.fsum(float(table) for scope, table in zip(coupling.scope, tables, strict=True) if not scope)
    steps: list[tuple[int, tuple[int, ...], IntArray]] = []
    for v in order:
        mine = [f for f in factors if v in f[0]]
        others = tuple(sorted({u for scope, _ in mine for u in scope} - {v}))
        axes = (*others, v)
        joint = sum((_aligned(scope, table, axes) for scope, table in mine), np.zeros((1,) * len(axes)))
        steps.append((v, others, joint.argmin(axis=-1)))
        factors = [f for f in factors if v not in f[0]]
        least = joint.min(axis=-1)
        if others:
            factors.append((others, least))
        else:
            total += float(least)
    levels = [0] * len(coupling.levels)
    for v, others, best in reversed(steps):
        levels[v] = int(best[tuple(levels[u] for u in others)])
    return total, tuple(levels)


def _aligned(scope: Sequence[int], table: FloatArray, axes: Sequence[int]) -> FloatArray:
    """A table with its variables at their places among `axes`, and 1 for those that it does not touch."""
    present = sorted(range(len(scope)), key=lambda i: axes.index(scope[i]))
    shape = [table.shape[scope.index(u)] if u in scope else 1 for u in axes]
    return table.transpose(present).reshape(shape)
