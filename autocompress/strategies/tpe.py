"""TPE: coefficients of layers proposed by a tree-structured Parzen estimator."""

from __future__ import annotations

from autocompress.measuring import Context
from autocompress.profiling import Profile
from autocompress.strategies.searching import searched
from autocompress.types import Budget, Plan
from solvers import studies

__all__ = ["Tpe"]


class Tpe:
    """Least KL of the stitched model over coefficients per layer, each standing for the exact answer to
    Σ c_l · relative error, an order of magnitude either way on a logarithmic scale. Runs the model as often as the
    effort grants.

    Proposed by Optuna's TPE, 20 of them at random first; the unweighted answer is scored before any.
    Source: Bergstra et al., "Algorithms for hyper-parameter optimization", NIPS 2011, section 4, over the coefficients
    of SPDY, arXiv 2201.13096. Raises MismatchError without a context.
    """

    needs = "evaluations"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        return searched(profile, budget, context, "tpe", studies.tpe, {})
