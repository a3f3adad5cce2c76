"""Allocation on the relative error of each layer, by any solver; the best single option; and the one that a fit of the
KL suggests.
"""

from __future__ import annotations

import numpy as np

from autocompress.errors import InfeasibleError
from autocompress.measuring import LEVELS, Context
from autocompress.planning import (
    Limits,
    energy_losses,
    infeasible,
    limits_of,
    running_cost,
    single_options,
    within,
)
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, solved_plan, with_context
from autocompress.types import Budget, Plan

__all__ = ["RawError", "Sensitivity", "SingleOption", "Solved"]


class Solved:
    """Least sum of error / layer energy within the budget, by one of the solvers. Needs the curves only.

    Source: OBC, arXiv 2208.11580, section 6, with a proven solver in place of its rounding dynamic programme.
    """

    needs = "curves"

    def __init__(self, solver: str) -> None:
        self.solver = solver

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        return solved_plan(profile, budget, energy_losses(profile), self.solver, self.solver)


class RawError:
    """Least sum of squared output errors ½ tr(ΔW H ΔWᵀ), as they come, within the budget. Needs the curves only.

    The objective of a layer-wise method that takes layers for comparable; a layer with large activations counts for
    more. Source: the error of OBC, arXiv 2208.11580, equation 1, summed over layers.
    """

    needs = "curves"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        losses = {n: np.array([row.error for row in layer.rows]) for n, layer in profile.layers.items()}
        return solved_plan(profile, budget, losses, "raw")


class SingleOption:
    """The same option for every layer: of those that fit, the least sum of error / layer energy. The baseline of
    everything.
    """

    needs = "curves"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        limits = limits_of(budget, profile)
        plans = single_options(profile, limits)
        if not plans and (fitting := single_options(profile, limits.bytes, undominated=False)):
            choices = [{n: row.option for n, row in rows.items()} for rows in fitting]
            least = {n: min(running_cost(profile, n, c) for c in choices) for n in limits.running}
            raise InfeasibleError(
                f"no single option for all layers is within {limits}: the least that one of them within the bytes "
                f"takes is {Limits(limits.bytes, least)}",
                limits.bytes,
            )
        if not plans:
            # Where calibration reached no layer there is nothing to choose, and one allocation: everything dense.
            every = single_options(profile, 1 << 62, undominated=False) or [
                {name: layer.rows[0] for name, layer in profile.layers.items()}
            ]
            smallest = limits.bytes
            while (size := min(map(within(profile, smallest).template.file_bytes, every))) > smallest:
                smallest = size  # a larger budget may store norms in more bits
            raise infeasible(profile, limits.bytes, smallest, "no single option for all layers")
        return chosen_plan(profile, budget, plans[0], "uniform")


class Sensitivity:
    """Least predicted rise of the KL to the dense model, each layer's KL linear in its error, by an exact solve. Runs
    the model.

    The slope of a layer is the median of (measured KL)/(error) over its levels when it alone is compressed.
    Source: HIGGS's linearity (arXiv 2411.17525), measured with OBS errors. Raises MismatchError without a context.
    """

    needs = "evaluations"

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
