"""The smallest worst error under a budget (the objective of ALDS, arXiv 2107.11442), then the smallest sum among those.

A worst error of at most t is possible where the cheapest options with loss ≤ t fit; the smallest such t is one of the
losses, and is found by bisection over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from solvers.exact import Exact
from solvers.lagrangian import lexmin
from solvers.milp import MILP
from solvers.problem import Array, Deadline, FloatArray, IntArray, Problem, ProblemError
from solvers.solution import Solution, Status


@dataclass(frozen=True)
class Minimax:
    """Minimise the largest loss of a group; `relative` divides each group's losses by its largest first.

    Proven for problems with the objective "max" (one resource: optimal). On problems with the objective "sum" it makes
    the same choice, its worst error stands in `message`, and nothing is claimed about the sum.
    """

    relative: bool = False
    name: str = "minimax"

    def why_not(self, problem: Problem) -> str:
        """Why this solver does not take the problem, or ""."""
        if problem.pairwise:
            return f"solver '{self.name}' knows no pairwise terms ({len(problem.pairwise)} here); use 'relaxation'"
        if self.relative and problem.objective == "max":
            return f"solver '{self.name}' with relative=True minimises another maximum than the problem's"
        return ""

    def __call__(self, problem: Problem, *, time_limit: float | None = None, seed: int = 0) -> Solution:
        """Solve; deterministic, so `seed` is not used."""
        if self.why_not(problem):
            raise ProblemError(self.why_not(problem))
        deadline = Deadline(time_limit)
        losses = [_relative(a) if self.relative else a for a in problem.loss]
        one = problem.flat.cost.shape[1] == 1
        fit = (lambda t: _cheapest(problem, losses, t)) if one else (lambda t: _several(problem, losses, t, deadline))
        fixed = problem.fixed or {}
        free = [a[[fixed[g]]] if g in fixed else a for g, a in enumerate(losses)]
        # Below the largest of the groups' smallest losses some group has no option at all.
        floor = max(float(a.min()) for a in free)
        levels = np.unique(np.concatenate(free))
        levels = levels[levels >= floor]
        choice, low, proven, steps = self._bisect(levels, fit, deadline)
        if choice is None:
            status = (
                Status.INFEASIBLE if proven == len(levels) else Status.TIME_LIMIT if deadline.passed else Status.UNKNOWN
            )
            if status is Status.INFEASIBLE and not one:
                return replace(MILP()(replace(problem, objective="sum"), time_limit=time_limit), solver=self.name)
            return Solution.none(problem, status, self.name)
        worst = float(levels[low])
        choice = self._least_sum(problem, losses, worst, choice, deadline)
        said = f"smallest worst {'relative ' if self.relative else ''}error {worst:.6g}"
        if problem.objective == "sum":
            status = Status.TIME_LIMIT if deadline.passed else Status.FEASIBLE
            return Solution.of(problem, choice, -math.inf, status, self.name, iterations=steps, message=said)
        bound = float(levels[min(proven, low)])
        status = Status.OPTIMAL if bound == worst else Status.TIME_LIMIT if deadline.passed else Status.FEASIBLE
        return Solution.of(problem, choice, bound, status, self.name, iterations=steps, message=said)

    @staticmethod
    def _bisect(
        levels: FloatArray, fit: Callable[[float], tuple[IntArray | None, bool]], deadline: Deadline
    ) -> tuple[IntArray | None, int, int, int]:
        """A choice of the smallest level found, that level's index, how many levels are proven too small, and the
        steps.
        """
        choice, is_proof = fit(float(levels[-1]))
        if choice is None:
            return None, len(levels), len(levels) if is_proof else 0, 1
        low, high, proven, steps = 0, len(levels) - 1, 0, 1
        while low < high and not deadline.passed:
            middle = (low + high) // 2
            found, is_proof = fit(float(levels[middle]))
            steps += 1
            if found is not None:
                choice, high = found, middle
            else:
                low = middle + 1
                if is_proof:
                    proven = low
        return choice, high, proven, steps

    def _least_sum(
        self, problem: Problem, losses: list[FloatArray], worst: float, choice: IntArray, deadline: Deadline
    ) -> IntArray:
        """Among the choices whose worst error is `worst`, one with a smaller sum of losses, where the time allows."""
        if deadline.passed:
            return choice
        part, kept = _within(problem, losses, worst)
        left = None if deadline.limit is None else max(1e-3, deadline.left)
        solver = Exact(max_states=200_000) if part.flat.cost.shape[1] == 1 else MILP()
        found = solver(part, time_limit=left)
        if not found.found:
            return choice
        better = np.array([k[j] for k, j in zip(kept, found.choice, strict=True)])
        total = replace(problem, objective="sum")
        return better if total.total_loss(better) < total.total_loss(choice) else choice


def _relative(loss: FloatArray) -> FloatArray:
    top = float(loss.max())
    return loss / top if top > 0 else loss


def _cheapest(problem: Problem, losses: list[FloatArray], worst: float) -> tuple[IntArray | None, bool]:
    """The cheapest choice with losses ≤ worst, or None where it is over the budget; that is a proof."""
    flat = problem.flat
    loss = (
        np.concatenate(losses)
        if not problem.fixed
        else np.concatenate([losses[g][flat.option[flat.group == g]] for g in range(problem.groups)])
    )
    over = loss > worst
    cost = flat.cost[:, 0].astype(np.float64) if flat.cost.dtype != np.int64 else flat.cost[:, 0]
    top = np.iinfo(np.int64).max if cost.dtype == np.int64 else np.inf
    choice = flat.choice(lexmin(np.where(over, top, cost), loss, flat.start))
    return (choice if problem.feasible(choice) else None), True


def _several(
    problem: Problem, losses: list[FloatArray], worst: float, deadline: Deadline
) -> tuple[IntArray | None, bool]:
    """A choice with losses ≤ worst, by MILP; the second says whether None is a proof."""
    part, kept = _within(problem, losses, worst)
    left = None if deadline.limit is None else max(1e-3, deadline.left)
    found = MILP(gap=math.inf)(part, time_limit=left)
    if not found.found:
        return None, found.status is Status.INFEASIBLE and found.message.startswith(("proven", "the cheapest"))
    return np.array([k[j] for k, j in zip(kept, found.choice, strict=True)]), False


def _within(problem: Problem, losses: list[FloatArray], worst: float) -> tuple[Problem, list[Array]]:
    """The problem (with the sum as objective) of the options whose loss is at most `worst`, and which these are, per
    group.
    """
    fixed = problem.fixed or {}
    kept = [np.array([fixed[g]]) if g in fixed else np.flatnonzero(a <= worst) for g, a in enumerate(losses)]
    part = Problem(
        [a[k] for a, k in zip(problem.loss, kept, strict=True)],
        [c[k] for c, k in zip(problem.cost, kept, strict=True)],
        problem.budget,
        problem.resources,
        lower=problem.lower,
    )
    return part, kept
