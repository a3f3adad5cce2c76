"""Allocation on the relative error of each layer, by any solver; the best single option; and the one that a fit of the
KL suggests.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from autocompress.measuring import LEVELS, Context
from autocompress.planning import energy_losses, limits_of, single_options
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, refused, solved_plan, with_context
from autocompress.types import Budget, Plan

__all__ = ["RawError", "Sensitivity", "SingleOption", "Solved"]


class Solved:
    """Least sum of error / layer energy within the budget, by one of the solvers. Needs the curves only.

    Source: OBC, arXiv 2208.11580, section 6, with a proven solver in place of its rounding dynamic programme.
    """

    needs = "curves"

    def __init__(self, solver: str) -> None:
        self.solver = solver
        self.couples = solver == "exact"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        return solved_plan(profile, budget, energy_losses(profile), self.solver, self.solver)


class RawError:
    """Least sum of squared output errors ½ tr(ΔW H ΔWᵀ), as they come, within the budget. Needs the curves only.

    The objective of a layer-wise method that takes layers for comparable; a layer with large activations counts for
    more. Source: the error of OBC, arXiv 2208.11580, equation 1, summed over layers.
    """

    needs = "curves"
    couples = True

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        losses = {n: np.array([row.error for row in layer.rows]) for n, layer in profile.layers.items()}
        return solved_plan(profile, budget, losses, "raw")


def _whole(profile: Profile) -> Profile:
    return profile


class SingleOption:
    """The same option for every layer: of those that fit, the least sum of error / layer energy. The baseline of
    everything. `offered` leaves of a profile what may be chosen from.
    """

    needs = "curves"

    def __init__(self, name: str = "uniform", offered: Callable[[Profile], Profile] = _whole) -> None:
        self.name = name
        self.offered = offered

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        limits, offered = limits_of(budget, profile), self.offered(profile)
        plans = single_options(offered, limits)
        if not plans:
            # Where calibration reached no layer there is nothing to choose, and one allocation: everything dense.
            every = single_options(offered, 1 << 62, undominated=False) or [
                {name: layer.rows[0] for name, layer in profile.layers.items()}
            ]
            raise refused(profile, budget, every, f"no single option for all layers ({self.name})")
        return chosen_plan(profile, budget, plans[0], self.name)


class Sensitivity:
    """Least predicted rise of the KL to the dense model, each layer's KL linear in its error, by an exact solve. Runs
    the model.

    The slope of a layer is the median of (measured KL)/(error) over its levels when it alone is compressed.
    Source: HIGGS's linearity (arXiv 2411.17525), measured with OBS errors. Raises MismatchError without a context.
    """

    needs = "evaluations"
    couples = True

    def __init__(self, levels: tuple[float, ...] = LEVELS) -> None:
        self.levels = levels

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, "kl", "measures the model")
        points = context.sensitivities(profile, self.levels)
        losses = {}
        for name, layer in profile.layers.items():
            slopes = [kl / error for error, kl in points[name]]
            slope = float(np.median(slopes)) if slopes else 0.0
            losses[name] = np.array([slope * row.error for row in layer.rows])
        return solved_plan(profile, budget, losses, "kl")
