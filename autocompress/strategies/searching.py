"""Searches that score stitched models: what they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from autocompress.measuring import Context
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, searchable, with_context
from autocompress.types import Budget, Plan
from solvers import SOLVERS, Problem
from solvers.milp import MILP
from solvers.registry import Solver
from solvers.search import Found

__all__ = ["Search", "searched", "solver_for"]

Search = Callable[..., Found]


def solver_for(problem: Problem) -> str | Solver:
    """What a search solves reweighted problems by: one that takes as many limits as there are, to within 0.1 % where it
    is the slower one.
    """
    return "exact" if not SOLVERS["exact"].why_not(problem) else MILP(gap=1e-3)


def searched(
    profile: Profile, budget: Budget, context: Context | None, name: str, search: Search, options: Mapping[str, Any]
) -> Plan:
    """The best scored choice of a search that starts from the exact answer on the relative error.

    search(problem, score, evaluations=, seed=, solver=, **options), as `solvers.search` has them; it is granted the
    context's evaluations. The plan's bound is on the relative error; a note says how often the model was run, and what
    that was worth. Raises MismatchError without a context, CalibrationError where nothing is held out to score on.
    """
    context = with_context(context, name, "scores compressed models")
    asked = searchable(profile, budget)
    found = search(
        asked.problem,
        asked.score(context),
        evaluations=context.granted,
        seed=context.seed,
        solver=solver_for(asked.problem),
        **options,
    )
    # At the smallest size there is, names alone decide what fits, which no search knows.
    best = found.choice if math.isfinite(found.score) else asked.first
    plan = chosen_plan(profile, budget, asked.choice(best), name)
    before, after = found.trace[0][1], found.trace[-1][1]
    note = f"{found.evaluations} evaluations: the first scored {before:.6g}, the best {after:.6g}"
    return plan.replace(seed=context.seed, notes=(*plan.notes, note))
