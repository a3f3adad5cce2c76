"""`auto`: a portfolio. Several objectives are solved exactly, each plan is measured, and the best measured one is
handed out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autocompress.batches import batch_samples
from autocompress.measuring import Context, Trial
from autocompress.planning import allocate, energy_losses, limits_of, make_plan
from autocompress.profiling import Profile
from autocompress.types import Budget, Plan

__all__ = ["Auto"]


class Auto:
    """Exact solves of the relative error and of mixtures with a fit of the measured KL; the least measured KL wins.

    A linear fit of the KL is the better objective where errors are small, the relative error where they are large
    (engine.md section 7); the weights of the mixtures are their geometric means. Plans are compared on all of the
    calibration data: on the held-out fifth alone, 256 images of CIFAR-10, the choice was worse on other training
    images than a choice on all 1,024 (the Hessians saw four fifths of them, but so did those of every rival).
    Deterministic: a fixed list, no clocks. Without a context it is the exact solve of the relative error.
    """

    needs = "curves"  # more, where there is a context

    def __init__(self, mixtures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)) -> None:
        self.mixtures = mixtures

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        limits = limits_of(budget, profile)
        if context is None or not context.held:
            return make_plan(profile, budget, allocate(profile, limits, energy_losses(profile)), "auto(energy)")
        held, fit = context.held_samples, sum(batch_samples(b) for b in context.fit)
        best: tuple[float, Plan] | None = None
        notes = []
        for label, losses in self.objectives(profile, context).items():
            plan = make_plan(profile, budget, allocate(profile, limits, losses), f"auto({label})")
            small = context.build(profile, plan.layers)
            kl = context.divergence_of(small)
            overall = (kl * held + context.divergence_of(small, "fit") * fit) / (held + fit)
            context.log.append(Trial(plan.strategy, plan.layers, kl, overall))
            notes.append(f"{label}: KL {overall:.6g} on all calibration data, {kl:.6g} on the held-out slice")
            if best is None or overall < best[0]:
                best = overall, plan.replace(measured={"kl": kl, "kl_all": overall})
        assert best is not None
        return best[1].replace(notes=tuple(notes))

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
