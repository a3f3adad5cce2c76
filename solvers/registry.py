"""One door: solvers by name, and `solve`, which never hands out an answer it has not checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from solvers.dp import DP
from solvers.exact import Exact
from solvers.greedy import Greedy, Uniform
from solvers.lagrangian import Lagrangian
from solvers.milp import MILP
from solvers.minimax import Minimax
from solvers.problem import Deadline, Problem, ProblemError
from solvers.relaxation import Relaxation
from solvers.solution import Solution

# A solver is a callable (problem, *, time_limit, seed) -> Solution; `why_not(problem)`, where it has one, says what it
# cannot take.
Solver = Callable[..., Solution]

SOLVERS: dict[str, Any] = {
    s.name: s for s in (Exact(), Lagrangian(), DP(), MILP(), Relaxation(), Minimax(), Greedy(), Uniform())
}


def solve(
    problem: Problem, solver: str | Solver = "exact", *, time_limit: float | None = None, seed: int = 0
) -> Solution:
    """Solve a problem by a solver's name or by a solver such as DP(buckets=1000), and check the answer.

    `time_limit` in seconds is a ceiling; reaching it is a Status, and so is an infeasible problem. Raises ProblemError
    for an unknown name or a problem that the solver does not take, SolutionError where the solver's answer does not
    hold.
    """
    if isinstance(solver, str) and solver not in SOLVERS:
        raise ProblemError(f"there is no solver {solver!r}; there are {', '.join(sorted(SOLVERS))}")
    chosen = SOLVERS[solver] if isinstance(solver, str) else solver
    Deadline(time_limit)
    begun = time.perf_counter()
    solution = chosen(problem, time_limit=time_limit, seed=seed)
    return replace(solution, seconds=time.perf_counter() - begun).check(problem)
