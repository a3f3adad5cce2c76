"""What strategies share: the protocol, plans from losses or from choices, one-parameter families, and what a search is
given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocompress.compressors import Measured
from autocompress.errors import BudgetError, InfeasibleError, MismatchError
from autocompress.layers import weight_of
from autocompress.measuring import Context
from autocompress.planning import (
    Allocation,
    Limits,
    allocate,
    energy_losses,
    infeasible,
    limits_of,
    make_plan,
    problem_of,
    running_cost,
    within,
    within_limits,
)
from autocompress.profiling import Profile
from autocompress.types import Budget, Plan
from solvers import Problem

__all__ = [
    "NEEDS",
    "Choice",
    "Searchable",
    "Strategy",
    "chosen_plan",
    "largest_that_fits",
    "needs_of",
    "no_times",
    "no_worse_than",
    "refused",
    "searchable",
    "solved_plan",
    "weights_of",
    "with_context",
]

Strategy = Callable[[Profile, Budget, Context | None], Plan]
Choice = Mapping[str, Measured]

# What a rule looks at, beside the curves that every profile has: the dense model, its weights or its outputs; its
# derivatives; compressed models. Every word but "curves" needs a context.
NEEDS = ("curves", "weights", "gradients", "evaluations")


def needs_of(strategy: Any) -> str:
    """The most that a strategy looks at, one of `NEEDS`; of a callable that does not say, "evaluations"."""
    return str(getattr(strategy, "needs", "evaluations"))


def with_context(context: Context | None, strategy: str, why: str) -> Context:
    """The context itself. Raises MismatchError, saying what it is needed for, where there is none."""
    if context is None:
        raise MismatchError(f"strategy {strategy!r} {why}: give a context (on the command line: --task)")
    return context


def no_times(budget: Budget, strategy: str) -> None:
    """Raise BudgetError where milliseconds are limited: there is no table of them for what this strategy makes."""
    if budget.latency_ms is not None:
        raise BudgetError(
            f"strategy {strategy!r} makes layers narrower, and there is no table of milliseconds for narrower layers; "
            "limit macs or bops instead, or ask a strategy that leaves channels alone, such as exact"
        )


def weights_of(profile: Profile, context: Context | None, strategy: str) -> dict[str, np.ndarray]:
    """The dense weights, float64 (groups, rows, columns), of every layer that calibration reached: the others have no
    options that a rule could choose from. Of a narrower structure those that stay, as they are before the refit; a
    grouped layer lacks whole groups. Raises MismatchError without a context.
    """
    model = with_context(context, strategy, "looks at the weights").model
    found = {}
    for name, layer in profile.layers.items():
        if layer.reached:
            weight = layer.layer.matrix(weight_of(model, layer.layer.key))
            (groups, height, _), (columns, rows) = weight.shape, profile.cut(name)
            some = weight.reshape(groups * height, -1)[rows][:, columns]
            found[name] = some.reshape(1 if groups == 1 else -1, len(rows) if groups == 1 else height, len(columns))
    return found


def solved_plan(
    profile: Profile,
    budget: Budget,
    losses: Mapping[str, np.ndarray],
    name: str,
    solver: str = "exact",
) -> Plan:
    """The plan of least summed losses, (options,) per layer, within the budget, by a solver, with its certificate."""
    found = allocate(profile, limits_of(budget, profile), losses, solver)
    used = solver if found.solution is None else found.solution.solver
    return make_plan(profile, budget, found, name if used == solver else f"{name}({used})")


def chosen_plan(
    profile: Profile,
    budget: Budget,
    rows: Choice,
    name: str,
    losses: Mapping[str, np.ndarray] | None = None,
) -> Plan:
    """The plan of a choice that some rule made, with the bound of its objective over all choices of the same bytes.

    losses: the objective that it is judged by, (options,) per layer; the relative error where a rule has none of its
    own. Raises InfeasibleError where the choice is not within the budget.
    """
    limits = limits_of(budget, profile)
    losses = energy_losses(profile) if losses is None else losses
    size = profile.template.file_bytes(rows)
    if not within_limits(profile, limits, rows):
        raise infeasible(profile, limits.bytes, size, f"the choice of strategy {name!r}")
    loss = float(sum(losses[n][profile.layers[n].rows.index(row)] for n, row in rows.items()))
    bound = min(allocate(profile, limits, losses, "lagrangian").bound, loss)
    gap = (loss - bound) / abs(bound) if bound else 0.0 if loss == bound else float("inf")
    room = limits.bytes - size + sum(row.bytes for row in rows.values())
    return make_plan(profile, budget, Allocation(dict(rows), loss, bound, gap, size, room), name)


def refused(profile: Profile, budget: Budget, smallest: Sequence[Choice], what: str) -> InfeasibleError:
    """The refusal of a budget that none of these choices, the smallest that a rule can make, is within; it names the
    running costs where the bytes would do.
    """
    limits = limits_of(budget, profile)
    fitting = [rows for rows in smallest if within_limits(profile, limits.bytes, rows)]
    if fitting:
        choices = [{n: row.option for n, row in rows.items()} for rows in fitting]
        least = {n: min(running_cost(profile, n, c) for c in choices) for n in limits.running}
        return InfeasibleError(
            f"{what} is within {limits}: the least that one of them within the bytes takes is "
            f"{Limits(limits.bytes, least)}",
            limits.bytes,
        )
    least_bytes = limits.bytes
    while (size := min(map(within(profile, least_bytes).template.file_bytes, smallest))) > least_bytes:
        least_bytes = size  # a larger budget may store norms in more bits
    return infeasible(profile, limits.bytes, least_bytes, what)


def largest_that_fits(
    profile: Profile, budget: Budget, propose: Callable[[float], Choice], name: str, steps: int = 40
) -> Choice:
    """The choice propose(t), t in [0, 1], of the largest t found whose file and running costs are within the budget.

    propose must give its smallest file at t = 0; in between, size need not rise with every step of t (rounding to
    options breaks that), so what is kept is the last of the bisection's points that fits. Raises InfeasibleError, with
    the size of propose(0), where not even that fits.
    """
    limits = limits_of(budget, profile)
    best = propose(0.0)
    if not within_limits(profile, limits, best):
        raise refused(profile, budget, [best], f"no choice of strategy {name!r}")
    if within_limits(profile, limits, top := propose(1.0)):
        return top
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = 0.5 * (low + high)
        rows = propose(middle)
        if within_limits(profile, limits, rows):
            low, best = middle, rows
        else:
            high = middle
    return best


def no_worse_than(profile: Profile, rows: Mapping[str, Measured]) -> Profile:
    """The profile with only those options of each layer whose error is at most that of its row."""
    layers = {
        name: dataclasses.replace(layer, rows=tuple(r for r in layer.rows if r.error <= rows[name].error))
        for name, layer in profile.layers.items()
    }
    return dataclasses.replace(profile, layers=layers)


@dataclass(frozen=True)
class Searchable:
    """An allocation as `solvers.search` takes it: the problem, the rows that its options stand for, the limits that a
    choice is held to, and the exact answer (G,), which keeps them.
    """

    profile: Profile
    limits: Limits
    problem: Problem
    rows: Sequence[Sequence[Measured]]
    first: np.ndarray

    def rows_of(self, answer: Sequence[int] | np.ndarray) -> dict[str, Measured]:
        """The row of each layer that an answer (G,) of the problem stands for."""
        return {n: r[int(i)] for n, r, i in zip(self.profile.layers, self.rows, answer, strict=True)}

    def choice(self, answer: np.ndarray) -> dict[str, Measured]:
        """The rows of an answer, with as much given up as makes the file fit.

        Payloads that fit beside one header need not fit beside another. Where a file is too long, one layer after
        another gets the option that adds the least loss of those that save what is missing (or save the most) and cost
        no more of anything else; where that does not help either, the answer stays as it is, and does not fit.
        """
        chosen = [int(i) for i in answer]
        for _ in chosen:
            rows = self.rows_of(chosen)
            missing = self.profile.template.file_bytes(rows) - self.limits.bytes
            if missing <= 0:
                return rows
            steps = []
            for g, i in enumerate(chosen):
                cost, loss = self.problem.cost[g], self.problem.loss[g]
                for j in np.flatnonzero((cost <= cost[i]).all(axis=1) & (cost[:, 0] < cost[i, 0])).tolist():
                    saved = int(cost[i, 0] - cost[j, 0])
                    steps.append((-min(saved, missing), float(loss[j] - loss[i]), saved, g, j))
            if not steps:
                break
            *_, g, j = min(steps)
            chosen[g] = j
        return self.rows_of(answer)

    def score(self, context: Context, part: str = "held") -> Callable[[np.ndarray], float]:
        """`Context.score` of the choice on a part of the data; inf where the file is too long."""

        def score(answer: np.ndarray) -> float:
            rows = self.choice(answer)
            if not within_limits(self.profile, self.limits, rows):
                return float("inf")
            return context.score(self.profile, {n: row.option for n, row in rows.items()}, part)

        return score


def searchable(profile: Profile, budget: Budget, losses: Mapping[str, np.ndarray] | None = None) -> Searchable:
    """The allocation on these losses (default: the relative error) within the budget, for a search that starts from its
    exact answer. Raises InfeasibleError as `allocate` does.
    """
    limits = limits_of(budget, profile)
    losses = energy_losses(profile) if losses is None else losses
    found = allocate(profile, limits, losses)
    problem = problem_of(profile, limits, losses, found.payload_bytes)
    first = np.array([profile.layers[n].rows.index(row) for n, row in found.rows.items()], np.int64)
    return Searchable(profile, limits, problem, [layer.rows for layer in profile.layers.values()], first)
