"""Budgeted choice with a certificate: one option per group, least loss, every budget kept, and how far from the best it
is.
"""

from solvers.frontier import Frontier, frontier
from solvers.problem import Pairwise, Problem, ProblemError
from solvers.registry import SOLVERS, solve
from solvers.solution import Solution, SolutionError, Status

__all__ = [
    "SOLVERS",
    "Frontier",
    "Pairwise",
    "Problem",
    "ProblemError",
    "Solution",
    "SolutionError",
    "Status",
    "frontier",
    "solve",
]
