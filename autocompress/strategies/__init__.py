"""Strategies: each turns (profile, budget, context) into a plan. `plan` asks one, under the never-worse rule."""

from __future__ import annotations

from collections.abc import Callable

from autocompress.errors import AutocompressError
from autocompress.measuring import Context
from autocompress.planning import budget_bytes, single_options
from autocompress.profiling import Profile
from autocompress.strategies.auto import Auto
from autocompress.strategies.solved import Sensitivity, SingleOption, Solved
from autocompress.types import Budget, Plan

__all__ = ["STRATEGIES", "Strategy", "StrategyError", "plan"]

Strategy = Callable[[Profile, Budget, Context | None], Plan]

STRATEGIES: dict[str, Strategy] = {
    "uniform": SingleOption(),
    "greedy": Solved("greedy"),
    "lagrangian": Solved("lagrangian"),
    "dp": Solved("dp"),
    "exact": Solved("exact"),
    "kl": Sensitivity(),
    "auto": Auto(),
}


class StrategyError(AutocompressError, ValueError):
    """A name that is not a strategy's."""


def plan(
    profile: Profile,
    budget: Budget | str | int,
    strategy: str | Strategy = "exact",
    context: Context | None = None,
) -> Plan:
    """Choose one option per layer so that the file is within the budget.

    With a context the plan is measured: its KL to the dense model on a slice of calibration data that the Hessians
    never saw stands in `plan.measured`, and where the best fitting single-option plan does better there, that one is
    handed out instead. Without one it is marked unmeasured. Raises InfeasibleError, with the smallest feasible size,
    where nothing fits; StrategyError for an unknown name; BudgetError for a budget that is not one.
    """
    wanted = Budget.of(budget)
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise StrategyError(f"there is no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
        strategy = STRATEGIES[strategy]
    if context is not None:
        context.check(profile)
    found = strategy(profile, wanted, context)
    if context is None or not context.held:
        return found
    return never_worse(found, profile, wanted, context)


def never_worse(found: Plan, profile: Profile, budget: Budget, context: Context) -> Plan:
    """The plan with its measured KL, or the best single-option plan where that one's is smaller.

    Single-option plans that another one beats in every layer need no measurement (`single_options`).
    """
    kl = found.measured.get("kl", context.measure(profile, found.layers))
    rivals = [
        {n: row.option for n, row in rows.items()} for rows in single_options(profile, budget_bytes(budget, profile))
    ]
    measured = [context.measure(profile, layers) for layers in rivals]
    best = min(range(len(rivals)), key=lambda i: (measured[i], i), default=None)
    figures = {"kl": kl, "samples": float(context.held_samples), "single_options": float(len(rivals))}
    if best is None:
        return found.replace(measured={**found.measured, **figures})
    figures["single_option_kl"] = measured[best]
    if measured[best] >= kl:
        return found.replace(measured={**found.measured, **figures})
    rows = {n: profile.layers[n].row(o) for n, o in rivals[best].items()}
    size = profile.template.file_bytes(rows)
    option = next(iter(rivals[best].values()))
    note = f"{found.strategy} measured {kl:.6g}, the single option {option} {measured[best]:.6g}: that one is used"
    return found.replace(
        layers=rivals[best],
        strategy="uniform",
        predicted_loss=float(sum(row.error / max(profile.layers[n].energy, 1e-300) for n, row in rows.items())),
        predicted_bytes=size,
        fixed_bytes=size - sum(row.bytes for row in rows.values()),
        bound=-float("inf"),
        gap=float("inf"),
        measured={**figures, "kl": measured[best]},
        notes=(*found.notes, note),
    )
