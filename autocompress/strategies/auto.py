"""`auto`: a portfolio. Several objectives are solved exactly, each plan is measured, what is left of the evaluations is
searched around the best, and the best measured plan is handed out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autocompress.batches import batch_samples
from autocompress.coupling import is_coupled
from autocompress.errors import InfeasibleError
from autocompress.measuring import Context, Trial, merit
from autocompress.planning import energy_losses, relative_gap
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, searchable, solved_plan
from autocompress.strategies.searching import solver_for
from autocompress.types import Budget, Plan
from solvers.search import nearby

__all__ = ["Auto"]

# The part of the granted evaluations that goes to the search. The plans of the objectives, and the single options that
# the answer is held against in the end, are measured besides.
SEARCH_SHARE = 0.25
# A plan is better than another where its merit is less by more than this part. Sums in float32 move the merit of one
# plan by 5e-6 of itself with the number of threads (measured on the tests' small network); that must not decide.
NOISE = 1e-4


@dataclass(frozen=True)
class _Judged:
    """A plan and how it measured: `merit` on the held-out slice and on all calibration data, which decides."""

    plan: Plan
    held: float
    overall: float


class Auto:
    """Exact solves of the relative error and of mixtures with a fit of the measured KL, a search around the best of
    them, and of all the plan that measures best.

    A linear fit of the KL is the better objective where errors are small, the relative error where they are large; the
    weights of the mixtures are their geometric means. soft: the fit is of softened outputs (`Context.temperature`),
    which holds on to larger errors (`experiments/auto_trial.py`). Plans are compared by their
    `measuring.merit` on all of the calibration data. The search (`solvers.search.nearby`) draws weights near the best
    ones and scores their plans on a sample of what the Hessians saw; its plan is taken only if it is better on the
    held-out slice, which the search never sees, and on all. Where channels can go, each objective is solved without
    that too. Needs evaluations; without a context it is the exact solve of the relative error. Deterministic: fixed
    counts, seeded draws, no clocks.
    """

    needs = "curves"  # more, where there is a context
    couples = True

    def __init__(self, mixtures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0), soft: bool = True) -> None:
        self.mixtures = mixtures
        self.soft = soft

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        if context is None or not context.held:
            return solved_plan(profile, budget, energy_losses(profile), "auto(energy)")
        best: tuple[_Judged, Mapping[str, np.ndarray]] | None = None
        notes = []
        seen: dict[tuple[str, ...], tuple[str, _Judged]] = {}
        for label, losses in self.objectives(profile, context).items():
            plans = {label: solved_plan(profile, budget, losses, f"auto({label})")}
            if is_coupled(profile):
                plans |= _of_whole_layers(profile, budget, losses, label, plans[label].bound)
            for name, plan in plans.items():
                at = (str(plan.vector_bits), *map(str, plan.layers.values()))
                if at in seen:
                    notes.append(f"{name}: the plan of {seen[at][0]}")
                    continue
                found = _judged(profile, plan, context)
                seen[at] = name, found
                notes.append(_figures(name, found))
                if best is None or _less(found.overall, best[0].overall):
                    best = found, losses
        assert best is not None
        chosen, losses = best
        if (rival := self._nearby(profile, budget, context, chosen.plan, losses)) is not None:
            better = _less(rival.held, chosen.held) and _less(rival.overall, chosen.overall)
            notes.append(f"{_figures('search around it', rival)}: {'taken' if better else 'not taken'}")
            chosen = rival if better else chosen
        return chosen.plan.replace(notes=tuple(notes))

    def _nearby(
        self, profile: Profile, budget: Budget, context: Context, best: Plan, losses: Mapping[str, np.ndarray]
    ) -> _Judged | None:
        """What a search around the best plan finds, if it finds another one; at the widths of that plan."""
        if coupled := is_coupled(profile):
            assert profile.widths is not None
            at = profile.at(profile.widths.structure_of(best.layers))
            losses = {n: losses[n][[profile.layers[n].rows.index(row) for row in x.rows]] for n, x in at.layers.items()}
            profile = at
        search = searchable(profile, budget, losses)
        evaluations = round(SEARCH_SHARE * context.granted)
        found = nearby(
            search.problem,
            search.score(context, "sample"),
            evaluations=evaluations,
            seed=context.seed,
            solver=solver_for(search.problem),
        )
        rows = search.choice(found.choice)
        if not math.isfinite(found.score) or {n: row.option for n, row in rows.items()} == best.layers:
            return None
        name = f"{best.strategy.removesuffix(')')}, searched)"
        plan = chosen_plan(profile, budget, rows, name, losses)
        if coupled:  # the bound of these widths is none of all widths; that of the best plan is
            bound = min(best.bound, plan.predicted_loss)
            plan = plan.replace(bound=bound, gap=relative_gap(plan.predicted_loss, bound))
        return _judged(profile, plan, context)

    def objectives(self, profile: Profile, context: Context) -> dict[str, Mapping[str, np.ndarray]]:
        """Losses per option under each mixture: error · (1/energy)^(1-m) · slope^m."""
        points = context.sensitivities(profile, soft=self.soft)
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


def _of_whole_layers(
    profile: Profile, budget: Budget, losses: Mapping[str, np.ndarray], label: str, bound: float
) -> dict[str, Plan]:
    """The plan of these losses that leaves channels alone, under its label; nothing where none is within the budget.

    Errors of lost channels and of lost ranks or bits do not weigh alike in the whole network, so both are measured.
    bound: what no plan, narrower ones included, is below.
    """
    whole = profile.whole()
    own = {n: losses[n][[row.option.width is None for row in x.rows]] for n, x in profile.layers.items()}
    try:
        plan = solved_plan(whole, budget, own, f"auto({label}, whole)")
    except InfeasibleError:
        return {}
    bound = min(bound, plan.predicted_loss)
    return {f"{label}, whole": plan.replace(bound=bound, gap=relative_gap(plan.predicted_loss, bound))}


def _judged(profile: Profile, plan: Plan, context: Context) -> _Judged:
    """The plan, measured on the held-out slice and on all of the calibration data."""
    small = context.build(profile, plan.layers)
    held, fit = context.held_samples, sum(batch_samples(b) for b in context.fit)
    parts = context.judge(small), context.judge(small, "fit")
    kl_all, soft = ((a * held + b * fit) / (held + fit) for a, b in zip(*parts, strict=True))
    plan = plan.replace(measured={"kl": parts[0][0], "kl_all": kl_all})
    context.log.append(Trial(plan.strategy, plan.layers, parts[0][0], kl_all, plan))
    return _Judged(plan, merit(*parts[0]), merit(kl_all, soft))


def _less(merit: float, than: float) -> bool:
    """Whether a merit is less by more than what rounding does to it."""
    return merit < (1.0 - NOISE) * than


def _figures(label: str, found: _Judged) -> str:
    measured = found.plan.measured
    return (
        f"{label}: KL {measured['kl_all']:.6g} on all calibration data, {measured['kl']:.6g} on the held-out slice, "
        f"merit {found.overall:.6g}"
    )
