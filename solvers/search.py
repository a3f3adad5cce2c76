"""Black-box search: over a callable that scores a choice, because measured loss is not the sum of what was profiled.

`score(choice)` takes the options (G,) and returns a number to minimise; what it does is its own business. Every choice
scored is within the budgets. Every search is seeded, starts from the solved problem (so it never ends worse than that),
scores no choice twice, and keeps a trace. Evaluations are counted, never seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from solvers.greedy import weights
from solvers.hulls import pareto
from solvers.problem import FloatArray, IntArray, Problem, ProblemError
from solvers.registry import Solver, solve
from solvers.solution import Solution, Status

Score = Callable[[IntArray], float]
# Levels a mutant moves at most at once: steps of one seldom leave room for another group's next level.
STRIDE = 4


@dataclass(frozen=True, eq=False)
class Found:
    """The result of a search: the best choice (G,), its score, and the trace, one (evaluation, best score so far) per
    evaluation.

    `solution` is the choice as an answer to the problem, checked; its bound is about the profiled loss, not the score.
    `front`: (choice, score, cost, coefficients) that no other scored choice beats in score and cost, by rising cost,
    where a search looks for them; the choice is that of least losses with each group's times its coefficient (G,).
    """

    choice: IntArray
    score: float
    trace: tuple[tuple[int, float], ...]
    solution: Solution
    front: tuple[tuple[IntArray, float, float, FloatArray], ...] = ()

    @property
    def evaluations(self) -> int:
        return len(self.trace)


class _Scored:
    """A score with a memory: counts evaluations, keeps the best and the trace."""

    def __init__(self, score: Score, most: int) -> None:
        if most < 1:
            raise ProblemError(f"evaluations is {most}; at least 1 is needed")
        self.score, self.most = score, most
        self.known: dict[bytes, float] = {}
        self.trace: list[tuple[int, float]] = []
        self.best: tuple[float, IntArray] | None = None

    @property
    def full(self) -> bool:
        return len(self.trace) >= self.most

    def __call__(self, choice: IntArray) -> float:
        key = choice.tobytes()
        if key not in self.known:
            value = float(self.score(choice.copy()))
            # A network that is broken scores nan; that is as bad as can be.
            self.known[key] = math.inf if math.isnan(value) else value
            if self.best is None or self.known[key] < self.best[0]:
                self.best = self.known[key], choice.copy()
            self.trace.append((len(self.trace) + 1, self.best[0]))
        return self.known[key]

    def found(self, problem: Problem, name: str) -> Found:
        assert self.best is not None
        return finish(problem, self.best[1], self.best[0], self.trace, name)


def finish(problem: Problem, choice: IntArray, score: float, trace: list[tuple[int, float]], name: str) -> Found:
    """A checked result."""
    solution = Solution.of(problem, choice, -math.inf, Status.FEASIBLE, name, iterations=len(trace)).check(problem)
    return Found(choice, score, tuple(trace), solution)


def start(problem: Problem, solver: str | Solver) -> IntArray:
    """The solved problem, to start from. Raises ProblemError where no choice is found."""
    solution = solve(problem, solver)
    if not solution.found:
        raise ProblemError(f"there is nothing to search: {solution.message or solution.status}")
    return solution.choice


def reweighted(problem: Problem, coefficients: FloatArray, solver: str | Solver) -> IntArray:
    """The choice (G,) that is best when the losses of group g are multiplied by coefficients[g] ≥ 0."""
    asked = problem.with_loss([c * a for c, a in zip(coefficients.tolist(), problem.loss, strict=True)])
    return start(asked, solver)


def spdy(
    problem: Problem,
    score: Score,
    *,
    evaluations: int = 1000,
    seed: int = 0,
    initial: int = 100,
    patience: int = 100,
    solver: str | Solver = "exact",
) -> Found:
    """SPDY's search: coefficients per group, the problem solved exactly for each, the score of the solution kept.

    `initial` random coefficients in [0, 1]; then k = ⌈G / 10⌉ random coordinates of the best are drawn anew,
    improvements kept, and k falls by one after `patience` misses in a row. Source: SPDY, arXiv 2201.13096, section 3.3;
    its code takes ⌊G / 10⌋, which is no search at all for fewer than 10 groups. The unweighted solution is scored
    first.
    """
    rng = np.random.default_rng(seed)
    scored = _Scored(score, evaluations)
    scored(start(problem, solver))
    best, least = np.ones(problem.groups), scored.trace[0][1]
    # Coefficients that lead to a choice known already cost no evaluation, so draws are limited as well.
    draws = 0
    while draws < initial and not scored.full:
        draws += 1
        coefficients = rng.random(problem.groups)
        value = scored(reweighted(problem, coefficients, solver))
        if value < least:
            best, least = coefficients, value
    for k in range(-(-problem.groups // 10), 0, -1):
        misses = 0
        while misses < patience and not scored.full:
            trial = best.copy()
            trial[rng.choice(problem.groups, k, replace=False)] = rng.random(k)
            value = scored(reweighted(problem, trial, solver))
            misses += 1
            if value < least:
                best, least, misses = trial, value, 0
    return scored.found(problem, "spdy")


def nearby(
    problem: Problem,
    score: Score,
    *,
    evaluations: int = 100,
    seed: int = 0,
    spread: float = 0.25,
    solver: str | Solver = "exact",
) -> Found:
    """Search near the solved problem: log-normal coefficients per group, the problem solved exactly for each.

    A trial multiplies the coefficients of the best one so far by e^(spread · z), z standard normal, and takes its place
    if its solution scores less. Unlike the moves of `evolve`, that keeps every choice an optimum of losses like the
    given ones, so there is little room to fit the noise of the score.
    """
    rng = np.random.default_rng(seed)
    scored = _Scored(score, evaluations)
    least, best, draws = scored(start(problem, solver)), np.ones(problem.groups), 0
    # Coefficients that lead to a choice known already cost no evaluation, so draws are limited as well.
    while not scored.full and draws < 2 * evaluations:
        draws += 1
        trial = best * np.exp(spread * rng.standard_normal(problem.groups))
        value = scored(reweighted(problem, trial, solver))
        if value < least:
            least, best = value, trial
    return scored.found(problem, "nearby")


def evolve(
    problem: Problem,
    score: Score,
    *,
    evaluations: int = 1000,
    seed: int = 0,
    offspring: int = 16,
    switches: int = 3,
    first: IntArray | None = None,
    solver: str | Solver = "exact",
) -> Found:
    """Evolutionary level switching: of `offspring` mutants of the best choice the best survives, if it is better.

    A mutant moves min(u, v) random groups up to STRIDE levels down and others up while they fit, u and v uniform on 1 …
    `switches`. Levels are a group's options that none beats in both loss and cost, by cost. Source: EvoPress, arXiv
    2410.14649, algorithm 1; there all levels cost the same, here the budgets decide what fits.
    """
    rng = np.random.default_rng(seed)
    scored = _Scored(score, evaluations)
    parent = start(problem, solver) if first is None else np.asarray(first, np.int64)
    if problem.violated(parent):
        raise ProblemError(f"the first choice is over: {problem.violated(parent)}")
    ladders = levels(problem)
    least = scored(parent)
    stale = 0
    # Where mutants are all known, as in a tiny problem, the search is over.
    while not scored.full and stale < 100:
        before = len(scored.trace)
        children: list[tuple[float, int, IntArray]] = []
        for _ in range(offspring):
            moves = int(min(rng.integers(1, switches + 1, 2)))
            child = mutate(problem, ladders, parent, moves, rng)
            if child is not None and not scored.full:
                children.append((scored(child), len(children), child))
        if children and min(children)[0] < least:
            least, _, parent = min(children)
        stale = stale + 1 if len(scored.trace) == before else 0
    return scored.found(problem, "evolve")


def levels(problem: Problem) -> list[list[int]]:
    """Per group the options that none beats in both loss and (joint) cost, by rising cost; fixed groups have one."""
    flat = problem.flat
    joint = flat.cost[:, 0] if flat.cost.shape[1] == 1 else flat.cost @ weights(flat)
    rows = pareto(flat.loss, joint, flat.start)
    ladders: list[list[int]] = [[] for _ in range(problem.groups)]
    for row in rows.tolist():
        ladders[int(flat.group[row])].append(int(flat.option[row]))
    return ladders


def mutate(
    problem: Problem, ladders: list[list[int]], parent: IntArray, moves: int, rng: np.random.Generator
) -> IntArray | None:
    """`moves` random groups one level down, then random others up while they fit; None where that is no choice within
    the budgets.
    """
    child = parent.copy()
    # A choice off the ladder (a dominated option) stands where it would be inserted.
    at = {g: _level(problem, ladders[g], g, int(child[g])) for g in range(problem.groups) if len(ladders[g]) > 1}
    movable = [g for g in at if at[g] > 0]
    if not movable:
        return None
    lowered = rng.permutation(movable)[:moves].tolist()
    for g in lowered:
        child[g] = ladders[g][at[g] - int(rng.integers(1, min(STRIDE, at[g]) + 1))]
    for g in rng.permutation([g for g in at if g not in lowered]).tolist():
        top = min(len(ladders[g]) - 1, at[g] + int(rng.integers(1, STRIDE + 1)))
        for level in range(top, at[g], -1):
            old = child[g]
            child[g] = ladders[g][level]
            if problem.feasible(child):
                break
            child[g] = old
    return child if problem.feasible(child) else None


def _level(problem: Problem, ladder: list[int], g: int, option: int) -> int:
    if option in ladder:
        return ladder.index(option)
    cost = problem.cost[g][:, 0]
    return max(0, int(np.searchsorted(cost[ladder], cost[option], side="right")) - 1)
