"""EvoPress: levels of layers switched, a few at a time, the best of a few mutants kept."""

from __future__ import annotations

from autocompress.measuring import Context
from autocompress.profiling import Profile
from autocompress.strategies.searching import searched
from autocompress.types import Budget, Plan
from solvers import search

__all__ = ["EvoPress"]


class EvoPress:
    """Least KL of the stitched model by evolution: mutants of the best plan take levels from some layers and give them
    to others. Runs the model as often as the effort grants.

    A layer's levels are its options that no other one beats in both relative error and cost; the first parent is the
    exact answer on the relative error. The paper screens mutants on few samples and the survivors on more; here all are
    scored alike. Source: EvoPress, arXiv 2410.14649, algorithm 1. Raises MismatchError without a context.
    """

    needs = "evaluations"

    def __init__(self, offspring: int = 8) -> None:
        self.offspring = offspring

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        return searched(profile, budget, context, "evopress", search.evolve, {"offspring": self.offspring})
