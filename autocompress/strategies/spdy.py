"""SPDY: layers' losses reweighted at random until the exact answer is one that the stitched model likes."""

from __future__ import annotations

from autocompress.measuring import Context
from autocompress.profiling import Profile
from autocompress.strategies.searching import searched
from autocompress.types import Budget, Plan
from solvers import search

__all__ = ["Spdy"]

# Of the evaluations, one in three at random coefficients, and as many misses before steps get smaller: the paper's 100
# and 100 are for a thousand and more.
SHARE = 3


class Spdy:
    """Least KL of the stitched model over coefficients c in [0, 1] per layer, each standing for the exact answer to
    Σ c_l · relative error. Runs the model as often as the effort grants.

    A third of the evaluations, at most the paper's 100, go to random coefficients, the rest to a search around the best
    of them, in smaller steps after as many without success; the unweighted answer is
    scored first. Source: SPDY, arXiv 2201.13096, section 3.3, on relative errors
    instead of its quadratic prior, statistics corrected in every trial. Raises MismatchError without a context.
    """

    needs = "evaluations"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        granted = 0 if context is None else context.granted
        share = min(100, granted // SHARE)
        return searched(profile, budget, context, "spdy", search.spdy, {"initial": share, "patience": share})
