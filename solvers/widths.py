"""Widths of channel groups under budgets: a geometric programme, its closed form, and whole numbers with a bound.

    maximise   Σ_g d_g log(n_g / N_g)   subject to   Σ_t a_rt n_i(t) n_j(t) ≤ B_r for every resource r,   n_g allowed

n_g is the width of group g, N_g its width as given, d_g how many layers have it as an input or as an output: with the
density p_l = (n_in / N_in)(n_out / N_out) of a layer the objective is Σ_l log p_l, that of SynExp (PreCrop, arXiv
2203.02549). A layer's weights and multiplications are products of two widths, a norm's parameters have one. In y =
log n the programme is convex; where no product has two widths that may change, a single budget leaves
n_g = d_g / (λ a_g), cut to what is allowed, with one λ to find.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from solvers.problem import Array, FloatArray, IntArray, ProblemError
from solvers.solution import ROUNDING, Status

__all__ = ["WidthProblem", "WidthSolution", "fitted_logs", "largest_widths", "solve_widths"]

NEAR = 1e-7  # what a conic solver's answer may be off, relatively, before it is rounded down


@dataclass(frozen=True, eq=False)
class WidthProblem:
    """G groups, T products of two widths, R resources; every cost is exact in int64.

    degree (G,) float ≥ 0: d_g. given (G,) int > 0: N_g. allowed: (n,) int > 0 per group, rising. coefficient (R, T) int
    ≥ 0 and pair (T, 2) int: a_rt n_i n_j; the index G stands for the constant 1. limit (R,) float. resources: their
    names; names: those of the groups. Raises ProblemError for what does not fit together.
    """

    degree: FloatArray
    given: IntArray
    allowed: Sequence[IntArray]
    coefficient: IntArray
    pair: IntArray
    limit: FloatArray
    resources: Sequence[str] = ()
    names: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Array) -> None:
            object.__setattr__(self, name, value)

        put("degree", np.asarray(self.degree, np.float64))
        put("given", np.asarray(self.given, np.int64))
        put("pair", np.asarray(self.pair, np.int64).reshape(-1, 2))
        put("limit", np.atleast_1d(np.asarray(self.limit, np.float64)))
        put("coefficient", np.asarray(self.coefficient, np.int64).reshape(len(self.limit), len(self.pair)))
        object.__setattr__(self, "allowed", tuple(np.asarray(a, np.int64) for a in self.allowed))
        G = len(self.degree)
        for name, got in (("given", len(self.given)), ("allowed", len(self.allowed))):
            if got != G:
                raise ProblemError(f"{got} entries in {name}, but {G} in degree; both need one per group")
        for g, widths in enumerate(self.allowed):
            if not len(widths) or widths[0] < 1 or (np.diff(widths) <= 0).any():
                raise ProblemError(f"{self.at(g)} may have widths {widths.tolist()[:8]}; needed positive, rising ones")
        if len(self.pair) and not (0 <= self.pair.min() and self.pair.max() <= G):
            raise ProblemError(f"pairs name groups {self.pair.min()} to {self.pair.max()}; needed 0 to {G} ({G}: none)")
        if (self.coefficient < 0).any() or (self.degree < 0).any() or (self.given < 1).any():
            raise ProblemError("a negative coefficient or degree, or a given width below 1")

    def at(self, g: int) -> str:
        """A group in messages."""
        return f"group {self.names[g]!r}" if g < len(self.names) else f"group {g}"

    @property
    def groups(self) -> int:
        return len(self.degree)

    @cached_property
    def low(self) -> IntArray:
        return np.array([a[0] for a in self.allowed], np.int64)

    @cached_property
    def high(self) -> IntArray:
        return np.array([a[-1] for a in self.allowed], np.int64)

    def cost(self, widths: Array) -> Array:
        """(..., R) of widths (..., G): exact for whole ones."""
        widths = np.asarray(widths)
        one = np.concatenate([widths, np.ones((*widths.shape[:-1], 1), widths.dtype)], axis=-1)
        return (one[..., self.pair[:, 0]] * one[..., self.pair[:, 1]]) @ self.coefficient.T

    def value(self, widths: Array) -> float:
        """Σ d log(n / N)."""
        return float(self.degree @ np.log(np.asarray(widths, np.float64) / self.given))

    def fits(self, widths: Array) -> bool:
        return bool((self.cost(widths) <= self.limit).all())


@dataclass(frozen=True, eq=False)
class WidthSolution:
    """Whole widths with their certificate.

    widths (G,), value and cost (R,) of them, `bound`: no allowed widths within the budgets have a larger value; -inf
    for widths that a rule made (nothing is claimed of them). relaxed (G,): the programme's answer before rounding, and
    `relaxed_value`. method: "all" (every group as wide as allowed fits), "closed form", "geometric programme", or the
    rule. Infeasible: widths are the smallest allowed, and cost says what they take.
    """

    widths: IntArray
    value: float
    cost: IntArray
    bound: float
    relaxed: FloatArray
    relaxed_value: float
    status: Status
    method: str
    message: str = ""

    def check(self, problem: WidthProblem) -> WidthSolution:
        """Recompute from the widths and return self. Raises ProblemError, saying what disagrees."""
        for g, width in enumerate(self.widths.tolist()):
            if width not in problem.allowed[g]:
                raise ProblemError(f"{problem.at(g)} has width {width}, which is not allowed")
        if not np.array_equal(self.cost, problem.cost(self.widths)) or self.value != problem.value(self.widths):
            raise ProblemError(f"value or cost are not those of the widths: {self.value}, {self.cost}")
        if self.status is not Status.INFEASIBLE and not problem.fits(self.widths):
            raise ProblemError(f"the widths take {self.cost.tolist()}, the limits are {problem.limit.tolist()}")
        return self


def solve_widths(problem: WidthProblem) -> WidthSolution:
    """The widths of largest value: the continuous programme, rounded down, then raised and exchanged while that helps.

    The bound is computed here, from the programme's linear pieces at its answer, and holds whatever the solver's
    accuracy. Where no allowed widths fit the status says so, with what the smallest take.
    """
    if not problem.fits(problem.low):
        return _infeasible(problem, "geometric programme")
    relaxed, method = relaxed_widths(problem)
    bound = bound_at(problem, relaxed)
    widths = improved(problem, rounded_down(problem, relaxed))
    value = problem.value(widths)
    # The bound may be below by the rounding of its sums; it is then met.
    bound = max(bound, value)
    proven = bound - value <= ROUNDING * max(1.0, abs(value))
    status = Status.OPTIMAL if proven else Status.FEASIBLE
    cost = problem.cost(widths)
    return WidthSolution(widths, value, cost, bound, relaxed, problem.value(relaxed), status, method).check(problem)


def largest_widths(
    problem: WidthProblem, ratios: Callable[[float], FloatArray], method: str, steps: int = 40
) -> WidthSolution:
    """Widths nearest, in the logarithm, to N · ratios(t), t in [0, 1], of the largest t found that fits.

    ratios (G,) must rise with t. Rounding to allowed widths can make a smaller t cost more; kept is the last of the
    bisection's points that fits, or the smallest widths where none does.
    """

    def at(t: float) -> IntArray:
        logs = np.log(np.maximum(ratios(t) * problem.given, 1e-300))
        return np.array([a[np.argmin(np.abs(np.log(a) - x))] for a, x in zip(problem.allowed, logs, strict=True)])

    if not problem.fits(problem.low):
        return _infeasible(problem, method)
    best, last, low, high = problem.low, 0.0, 0.0, 1.0
    if problem.fits(at(1.0)):
        best, last = at(1.0), 1.0
    else:
        for _ in range(steps):
            middle = 0.5 * (low + high)
            if problem.fits(widths := at(middle)):
                low, best, last = middle, widths, middle
            else:
                high = middle
    exact = np.clip(ratios(last) * problem.given, problem.low, problem.high)
    value, cost = problem.value(best), problem.cost(best)
    found = WidthSolution(best, value, cost, -math.inf, exact, problem.value(exact), Status.FEASIBLE, method)
    return found.check(problem)


def fitted_logs(problem: WidthProblem, shares: FloatArray, densities: FloatArray) -> FloatArray:
    """log(n / N) (G,) of the widths whose layers come nearest to these densities:

        minimise Σ_l (Σ_g s_lg log(n_g / N_g) - log p_l)²   within what is allowed

    shares s (L, G): 1 for the group of a layer's inputs or outputs, 2 where it is both, parts of 1 where several groups
    are concatenated; densities (L,) > 0.
    """
    from scipy.optimize import lsq_linear

    low, high = np.log(problem.low / problem.given), np.log(problem.high / problem.given)
    logs = np.clip(0.0, low, high)
    free = np.flatnonzero((high > low) & (shares != 0.0).any(axis=0))
    if free.size:
        logs[free] = 0.0
        target = np.log(np.asarray(densities, np.float64)) - shares @ logs
        logs[free] = lsq_linear(shares[:, free], target, (low[free], high[free]), method="bvls").x
    return np.clip(logs, low, high)


def _infeasible(problem: WidthProblem, method: str) -> WidthSolution:
    cost = problem.cost(problem.low)
    over = [
        f"{c} {problem.resources[r] if r < len(problem.resources) else f'of resource {r}'}, the limit is {limit:.12g}"
        for r, (c, limit) in enumerate(zip(cost.tolist(), problem.limit.tolist(), strict=True))
        if c > limit
    ]
    value, relaxed = problem.value(problem.low), problem.low.astype(np.float64)
    message = f"the smallest widths take {'; and '.join(over)}"
    return WidthSolution(problem.low, value, cost, -math.inf, relaxed, value, Status.INFEASIBLE, method, message).check(
        problem
    )


def relaxed_widths(problem: WidthProblem) -> tuple[FloatArray, str]:
    """The continuous programme's answer (G,), within low and high, and how it was found; low must fit.

    In closed form where a single budget binds and no product has two widths that may change; else, and where that
    answer breaks another budget, by a conic solver through cvxpy.
    """
    if problem.fits(problem.high):
        return problem.high.astype(np.float64), "all"
    for r in range(len(problem.limit)):
        widths = _closed_form(problem, r)
        if widths is not None and (problem.cost(widths) <= problem.limit * (1.0 + NEAR)).all():
            return widths, "closed form"
    return _conic(problem), "geometric programme"


def _slopes(problem: WidthProblem, r: int) -> FloatArray | None:
    """a_g (G,) where resource r costs Σ a_g n_g and a constant; None where two widths that may change meet."""
    free = np.append(problem.high > problem.low, False)
    both = free[problem.pair].all(axis=1) & (problem.coefficient[r] > 0)
    if both.any():
        return None
    one = np.append(problem.low, 1)
    slopes = np.zeros(problem.groups + 1)
    for side, other in ((0, 1), (1, 0)):
        changes = free[problem.pair[:, side]]
        product = problem.coefficient[r] * one[problem.pair[:, other]]
        np.add.at(slopes, problem.pair[changes, side], product[changes].astype(np.float64))
    return slopes[:-1]


def _closed_form(problem: WidthProblem, r: int) -> FloatArray | None:
    """n_g = d_g / (λ a_g) cut to [low, high], λ such that resource r is used up; None where that is not its form."""
    slopes = _slopes(problem, r)
    if slopes is None:
        return None
    low, high = problem.low.astype(np.float64), problem.high.astype(np.float64)
    room = float(problem.limit[r] - problem.cost(problem.low)[r])
    priced = (slopes > 0.0) & (problem.degree > 0.0)

    def at(price: float) -> FloatArray:
        widths = np.where(slopes > 0.0, low, high)  # what costs nothing is free, what is worth nothing stays small
        widths[priced] = np.clip(problem.degree[priced] / (price * slopes[priced]), low[priced], high[priced])
        return widths

    def used(widths: FloatArray) -> float:
        return float(slopes @ (widths - low))

    if not priced.any():
        return at(1.0)
    marks = np.concatenate([problem.degree[priced] / slopes[priced] / end[priced] for end in (low, high)])
    # Between two marks what is used is b + c / λ, so the last step is exact.
    marks = np.unique(marks)
    i = int(np.searchsorted([-used(at(m)) for m in marks], -room))
    if i == 0:
        return at(float(marks[0]))
    if i == len(marks):
        return at(float(marks[-1]))
    middle = at(math.sqrt(marks[i - 1] * marks[i]))
    moving = priced & (middle > low) & (middle < high)
    rest = used(np.where(moving, low, middle)) - float(slopes[moving] @ low[moving])
    return at(float(problem.degree[moving].sum()) / (room - rest))


def _conic(problem: WidthProblem) -> FloatArray:
    """The programme in y = log n: maximise d·y, log Σ exp(log a + y_i + y_j) ≤ log B, by cvxpy."""
    import cvxpy as cp
    from scipy.sparse import csr_matrix

    low, high = np.log(problem.low), np.log(problem.high)
    free = np.flatnonzero(high > low)
    known = np.append(np.where(high > low, 0.0, low), 0.0)
    T = len(problem.pair)
    into = np.full(problem.groups + 1, -1)
    into[free] = np.arange(len(free))
    rows, columns = np.repeat(np.arange(T), 2), into[problem.pair].ravel()
    powers = csr_matrix(
        (np.ones(int((columns >= 0).sum())), (rows[columns >= 0], columns[columns >= 0])), (T, len(free))
    )
    fixed = known[problem.pair].sum(axis=1)
    moving = np.asarray(powers.sum(axis=1)).ravel() > 0
    y = cp.Variable(len(free))
    held = [y >= low[free], y <= high[free]]
    for coefficient, limit in zip(problem.coefficient, problem.limit, strict=True):
        constant = float(np.exp(fixed[~moving]) @ coefficient[~moving])
        used = moving & (coefficient > 0)
        if used.any():
            shares = np.log(coefficient[used]) + fixed[used] - math.log(limit - constant)
            held.append(cp.log_sum_exp(powers[np.flatnonzero(used)] @ y + shares) <= 0.0)
    # Degrees as parts of their sum: solvers have absolute tolerances.
    weight = problem.degree[free] / max(float(problem.degree[free].sum()), 1e-300)
    model = cp.Problem(cp.Maximize(weight @ y), held)
    model.solve(solver=cp.CLARABEL)
    if y.value is None:
        raise ProblemError(f"cvxpy found no widths ({model.status}), though the smallest fit; check the limits' scale")
    widths = problem.low.astype(np.float64)
    widths[free] = np.clip(np.exp(y.value), problem.low[free], problem.high[free])
    return widths


def bound_at(problem: WidthProblem, widths: FloatArray) -> float:
    """An upper bound on the value of all widths within the budgets, from any widths > 0.

    Costs are convex in y = log n, so they are above their tangents at y*: with ∇ the gradients and prices λ ≥ 0

        value ≤ d·y* + λ·(B - cost(y*)) + Σ_g max over low ≤ y_g ≤ high of (d - λ∇)_g (y_g - y*_g)

    λ is the dual of that linear programme; any other would be a bound too.
    """
    from scipy.optimize import linprog

    y, low, high = np.log(widths), np.log(problem.low), np.log(problem.high)
    one = np.append(widths, 1.0)
    products = problem.coefficient * (one[problem.pair[:, 0]] * one[problem.pair[:, 1]])
    gradient = np.zeros((len(problem.limit), problem.groups + 1))
    for side in (0, 1):
        np.add.at(gradient.T, problem.pair[:, side], products.T)
    # In parts of the limits, as the two may be of any size.
    unit = np.maximum(np.abs(problem.limit), 1.0)
    slope, slack = gradient[:, :-1] / unit[:, None], (problem.limit - products.sum(axis=1)) / unit
    found = linprog(-problem.degree, slope, slack, bounds=np.stack([low - y, high - y], axis=1), method="highs")
    price = np.maximum(-found.ineqlin.marginals, 0.0) if found.success else np.zeros(len(unit))
    reduced = problem.degree - price @ slope
    best = np.maximum(reduced * (low - y), reduced * (high - y))
    sizes = [problem.degree * np.abs(y - np.log(problem.given)), price * np.abs(slack), np.abs(best)]
    noise = 1e-12 * math.fsum(float(np.abs(s).sum()) for s in sizes)
    return math.fsum([problem.value(widths), float(price @ slack), *best.tolist(), noise])


def rounded_down(problem: WidthProblem, widths: FloatArray) -> IntArray:
    """The largest allowed widths that are not above, or the smallest; within the budgets if `widths` are, up to the
    solver's accuracy. A width above by no more than that is taken, unless it does not fit.
    """
    index = [
        int(np.searchsorted(a, w * (1.0 + NEAR), "right")) - 1 for a, w in zip(problem.allowed, widths, strict=True)
    ]
    found = np.array([a[max(i, 0)] for a, i in zip(problem.allowed, index, strict=True)])
    if problem.fits(found):
        return found
    index = [
        int(np.searchsorted(a, w * (1.0 - NEAR), "right")) - 1 for a, w in zip(problem.allowed, widths, strict=True)
    ]
    found = np.array([a[max(i, 0)] for a, i in zip(problem.allowed, index, strict=True)])
    return found if problem.fits(found) else problem.low.copy()


def improved(problem: WidthProblem, widths: IntArray) -> IntArray:
    """Widths that no step up of one group makes better, and no step down of one with steps up of others.

    Steps up go first, by value per part of the tightest budget's room that they take; then the group whose step down
    leaves room for most, and again.
    """
    at = np.array([int(np.searchsorted(a, w)) for a, w in zip(problem.allowed, widths, strict=True)])

    def of(index: IntArray) -> IntArray:
        return np.array([a[i] for a, i in zip(problem.allowed, index.tolist(), strict=True)], np.int64)

    def filled(index: IntArray, held: int = -1) -> IntArray:
        """With all steps up that fit, but of one group."""
        last = np.array([len(a) - 1 for a in problem.allowed])
        while True:
            now = of(index)
            up = np.flatnonzero((index < last) & (problem.degree > 0.0) & (np.arange(problem.groups) != held)).tolist()
            wider = np.array([problem.allowed[g][index[g] + 1] for g in up], np.int64)
            many = np.repeat(now[None], len(up), axis=0)
            many[np.arange(len(up)), up] = wider
            costs, before = problem.cost(many), problem.cost(now)
            part = ((costs - before) / np.maximum(problem.limit - before, 1e-9)).max(axis=1, initial=1e-300)
            gain = np.where((costs <= problem.limit).all(axis=1), problem.degree[up] * np.log(wider / now[up]), 0.0)
            if not (gain > 0.0).any():
                return index
            index = index.copy()
            index[up[np.argmax(gain / part)]] += 1

    at = filled(at)
    while True:
        trials = [filled(filled(at - (np.arange(problem.groups) == g), g)) for g in np.flatnonzero(at > 0).tolist()]
        values = [problem.value(of(trial)) for trial in trials]
        # More by a margin, so that rounding cannot make this go round in circles.
        if not values or max(values) <= problem.value(of(at)) + 1e-9:
            return of(at)
        at = trials[int(np.argmax(values))]
