"""The two baselines every table needs: marginal gain, and the same option everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.hulls import hulls
from solvers.lagrangian import lexmin
from solvers.problem import Array, Deadline, Flat, FloatArray, IntArray, Problem, ProblemError
from solvers.solution import Solution, Status


def weights(flat: Flat) -> FloatArray:
    """What a unit of each limit counts, (K,): the inverse of the span between the cheapest and the dearest choice."""
    least = np.minimum.reduceat(flat.cost, flat.start[:-1], axis=0).sum(axis=0)
    most = np.maximum.reduceat(flat.cost, flat.start[:-1], axis=0).sum(axis=0)
    span = (most - least).astype(np.float64)
    return np.where(span > 0, 1 / np.maximum(span, np.finfo(float).tiny), 0.0)


@dataclass(frozen=True)
class Greedy:
    """From the cheapest options, take the step with the most loss saved per unit of cost, as long as it fits.

    A group whose next step does not fit stays where it is. Several resources count by their share of the span between
    the cheapest and the dearest choice. Pairwise terms are not looked at. Gives no bound. Source: Yang et al., CVPR
    2020, arXiv 1910.05897 (the quantised projection).
    """

    name: str = "greedy"

    def why_not(self, problem: Problem) -> str:
        """Why this solver does not take the problem, or ""."""
        return "" if problem.objective == "sum" else f"solver '{self.name}' minimises a sum; use 'minimax'"

    def __call__(self, problem: Problem, *, time_limit: float | None = None, seed: int = 0) -> Solution:
        """Solve; deterministic, so `seed` is not used."""
        deadline = Deadline(time_limit)
        if self.why_not(problem):
            raise ProblemError(self.why_not(problem))
        flat = problem.flat
        single = flat.cost.shape[1] == 1
        joint: Array = flat.cost[:, 0] if single else flat.cost @ weights(flat)
        now = lexmin(joint, flat.loss, flat.start)
        if single and not problem.feasible(flat.choice(now)):
            return Solution.none(problem, Status.INFEASIBLE, self.name)
        ladder = hulls(flat.loss, joint, flat.start)
        group = np.repeat(np.arange(problem.groups), np.diff(ladder.start))
        left = flat.limit - flat.cost[now].sum(axis=0)
        frozen = np.zeros(problem.groups, bool)
        steps = 0
        for v in ladder.steps():
            if steps % 256 == 0 and deadline.passed:
                break
            g, row = group[v], ladder.rows[v]
            if frozen[g]:
                continue
            after = left - (flat.cost[row] - flat.cost[now[g]])
            # A step that makes nothing worse is taken even where a limit is still broken.
            if ((after < 0) & (after < left)).any():
                frozen[g] = True
                continue
            now[g], left = row, after
            steps += 1
        choice = flat.choice(now)
        if not problem.feasible(choice):
            return Solution.none(
                problem, Status.UNKNOWN, self.name, message=f"marginal gain ends at {problem.violated(choice)}"
            )
        status = Status.TIME_LIMIT if deadline.passed else Status.FEASIBLE
        return Solution.of(problem, choice, -np.inf, status, self.name, iterations=steps)


@dataclass(frozen=True)
class Uniform:
    """The same option in every group: the best one that fits.

    The same label where the problem has option names, else the same index. Groups with a single option (or a fixed one)
    take it. Gives no bound; where nothing fits the status is UNKNOWN, for other choices may fit.
    """

    name: str = "uniform"

    def why_not(self, problem: Problem) -> str:
        """It takes every problem."""
        return ""

    def __call__(self, problem: Problem, *, time_limit: float | None = None, seed: int = 0) -> Solution:
        """Solve; deterministic, so `seed` is not used."""
        deadline = Deadline(time_limit)
        candidates = self.candidates(problem)
        losses = [problem.total_loss(choice) for _, choice in candidates]
        for k in np.argsort(losses, kind="stable"):
            if deadline.passed:
                return Solution.none(problem, Status.TIME_LIMIT, self.name)
            choice = candidates[k][1]
            if problem.feasible(choice):
                return Solution.of(problem, choice, -np.inf, Status.FEASIBLE, self.name, iterations=len(candidates))
        if (problem.smallest() > problem.budget).any():
            return Solution.none(problem, Status.INFEASIBLE, self.name)
        message = f"none of the {len(candidates)} options that every group has is within the limits for all groups"
        return Solution.none(problem, Status.UNKNOWN, self.name, message=message)

    @staticmethod
    def candidates(problem: Problem) -> list[tuple[str, IntArray]]:
        """Every option all groups share, with the choice (G,) it makes; in the order of the first free group."""
        fixed = dict(problem.fixed or {})
        forced = {g: fixed.get(g, 0) for g, a in enumerate(problem.loss) if g in fixed or len(a) == 1}
        free = [g for g in range(problem.groups) if g not in forced]
        base = np.array([forced.get(g, 0) for g in range(problem.groups)])
        if not free:
            return [("", base)]
        if problem.options is None:
            shared = range(min(len(problem.loss[g]) for g in free))
            return [(str(j), _with(base, free, j)) for j in shared]
        names = {g: {label: j for j, label in reversed(list(enumerate(problem.options[g])))} for g in free}
        labels = [label for label in names[free[0]] if all(label in names[g] for g in free)]
        labels.sort(key=names[free[0]].__getitem__)
        return [(label, _with(base, free, [names[g][label] for g in free])) for label in labels]


def _with(base: IntArray, groups: list[int], options: int | list[int]) -> IntArray:
    choice = base.copy()
    choice[groups] = options
    return choice
