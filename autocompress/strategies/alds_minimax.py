"""ALDS's objective: no layer loses more, relative to what it puts out, than the worst one must."""

from __future__ import annotations

from autocompress.measuring import Context
from autocompress.planning import allocate, energy_losses, limits_of, make_plan
from autocompress.profiling import Profile
from autocompress.types import Budget, Plan

__all__ = ["AldsMinimax"]


class AldsMinimax:
    """Least largest relative error of a layer within the budget, and among those the least sum. Needs the curves only.

    The paper bounds the relative error of a layer in the operator norm and chooses ranks; here it is error / energy,
    the share of its output that a layer loses on the calibration data, over any options. The plan's predicted loss,
    bound and gap are those of the largest relative error.
    Source: ALDS, arXiv 2107.11442, equation 4 (its global step), solved exactly over the options instead of by a
    threshold. Raises InfeasibleError as `allocate` does.
    """

    needs = "curves"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        losses = energy_losses(profile)
        found = allocate(profile, limits_of(budget, profile), losses, "minimax", "max")
        return make_plan(profile, budget, found, "alds_minimax")
