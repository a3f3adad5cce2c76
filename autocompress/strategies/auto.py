"""`auto`: a portfolio. Several objectives are solved exactly, each plan is measured, and the best measured one is
handed out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autocompress.measuring import Context
from autocompress.planning import Allocation, allocate, budget_bytes, energy_losses, make_plan
from autocompress.profiling import Profile
from autocompress.types import Budget, Plan

__all__ = ["Auto"]


class Auto:
    """Exact solves of the relative error, of a fit of the measured KL, and of mixtures of both; the least measured KL
    wins.

    A linear fit of the KL is the better objective where errors are small, the relative error where they are large
    (engine.md section 7); the weights of the mixtures are their geometric means. Deterministic: a fixed list, no
    clocks. Without a context it is the exact solve of the relative error.
    """

    def __init__(self, mixtures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> None:
        self.mixtures = mixtures

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        limit = budget_bytes(budget, profile)
        if context is None or not context.held:
            return make_plan(profile, budget, allocate(profile, limit, energy_losses(profile)), "auto(energy)")
        best: Plan | None = None
        tried = {}
        for label, losses in self.objectives(profile, context).items():
            found = allocate(profile, limit, losses)
            plan = self._measured(profile, budget, found, f"auto({label})", context)
            tried[label] = plan.measured["kl"]
            if best is None or plan.measured["kl"] < best.measured["kl"]:
                best = plan
        assert best is not None
        return best.replace(notes=tuple(f"{label}: measured KL {kl:.6g}" for label, kl in tried.items()))

    def objectives(self, profile: Profile, context: Context) -> dict[str, Mapping[str, np.ndarray]]:
        """Losses per option under each mixture: error · (1/energy)^(1-m) · slope^m."""
        points = context.sensitivities(profile)
        energy, slope = {}, {}
        for name, layer in profile.layers.items():
            if layer.reached and layer.energy > 0.0 and points[name]:
                energy[name] = 1.0 / layer.energy
                slope[name] = max(float(np.median([kl / error for error, kl in points[name]])), 1e-30)
        floor = min((s for s in slope.values() if s > 1e-30), default=1e-30)
        found: dict[str, Mapping[str, np.ndarray]] = {}
        for m in self.mixtures:
            weight = {n: energy[n] ** (1.0 - m) * max(slope[n], 1e-3 * floor) ** m for n in energy}
            label = "energy" if m == 0.0 else "kl" if m == 1.0 else f"kl^{m:g}"
            found[label] = {
                n: np.array([weight.get(n, 0.0) * row.error for row in layer.rows])
                for n, layer in profile.layers.items()
            }
        return found

    def _measured(self, profile: Profile, budget: Budget, found: Allocation, strategy: str, context: Context) -> Plan:
        plan = make_plan(profile, budget, found, strategy)
        return plan.replace(measured={"kl": context.measure(profile, plan.layers)})
