"""Strategies: each turns (profile, budget, context) into a plan. `plan` asks one, under the never-worse rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocompress.compressors import Measured
from autocompress.coupling import is_coupled
from autocompress.errors import AutocompressError
from autocompress.measuring import Context, Trial
from autocompress.planning import (
    allocate,
    budget_bytes,
    energy_losses,
    limits_of,
    relative_error,
    single_options,
    within,
)
from autocompress.planning import paper_bytes as paper_counted
from autocompress.profiling import Profile
from autocompress.strategies.ajpq import Ajpq
from autocompress.strategies.alds import Alds
from autocompress.strategies.alds_minimax import AldsMinimax
from autocompress.strategies.auto import Auto
from autocompress.strategies.base import NEEDS, Strategy, chosen_plan, needs_of, no_worse_than
from autocompress.strategies.baselines import uniform_bits, uniform_sparsity
from autocompress.strategies.cc import cc
from autocompress.strategies.erk import erk
from autocompress.strategies.evopress import EvoPress
from autocompress.strategies.fisher import Fisher
from autocompress.strategies.ft import ft, ft_global
from autocompress.strategies.galen import Galen
from autocompress.strategies.hawq import Hawq
from autocompress.strategies.itpruner import ItPruner
from autocompress.strategies.lamp import lamp
from autocompress.strategies.loss import LayerLoss
from autocompress.strategies.magnitude import magnitude
from autocompress.strategies.nsga2 import Nsga2
from autocompress.strategies.opq import opq, opq_energy
from autocompress.strategies.pfp import pfp
from autocompress.strategies.ranks import lrank, pca, svd, svd_energy
from autocompress.strategies.solved import RawError, Sensitivity, SingleOption, Solved
from autocompress.strategies.spdy import Spdy
from autocompress.strategies.tpe import Tpe
from autocompress.strategies.yang import Yang
from autocompress.types import Budget, Option, Plan

__all__ = ["NEEDS", "STRATEGIES", "Strategy", "StrategyError", "needs_of", "offered_to", "paper_counted", "plan"]

STRATEGIES: dict[str, Strategy] = {
    "uniform": SingleOption(),
    "greedy": Solved("greedy"),
    "lagrangian": Solved("lagrangian"),
    "dp": Solved("dp"),
    "exact": Solved("exact"),
    "uniform_bits": uniform_bits,
    "uniform_sparsity": uniform_sparsity,
    "magnitude": magnitude,
    "erk": erk,
    "lamp": lamp,
    "yang": Yang(),
    "opq": opq,
    "opq_energy": opq_energy,
    "raw": RawError(),
    "kl": Sensitivity(),
    "loss": LayerLoss(),
    "fisher": Fisher(),
    "hawq": Hawq(),
    "spdy": Spdy(),
    "evopress": EvoPress(),
    "tpe": Tpe(),
    "nsga2": Nsga2(),
    "alds_minimax": AldsMinimax(),
    "alds": Alds(),
    "alds_paper": Alds("paper"),
    "alds_norm": Alds("norm"),
    "svd": svd,
    "svd_energy": svd_energy,
    "pca": pca,
    "lrank": lrank,
    "ft": ft,
    "ft_global": ft_global,
    "pfp": pfp,
    "cc": cc,
    "itpruner": ItPruner(),
    "itpruner_quadratic": ItPruner(quadratic=True),
    "ajpq": Ajpq(),
    "galen": Galen(),
    "auto": Auto(),
}


# A single option that another one beats in every layer can still have the smaller KL, by chance of the slice. Measuring
# all that fit would take minutes, so those are measured whose predicted loss is within this factor of the plan's: what
# is left out would have to turn around a prediction twice as bad.
RIVALS = 2.0
LEAST_RIVALS = 16  # measured at least, where so many fit: all of them in a small profile
FAR = 3  # of those that another one beats in every layer, in a row and far behind: then no more of them are measured
TOGETHER = 4  # singles whose weights are made at once: more would only be thrown away where far ones end the search
NOISE = 1e-6  # summed relative errors below this are rounding, and so is their order


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
    profile = offered_to(strategy, profile, wanted)
    seen = 0 if context is None else len(context.log)
    found = strategy(profile, wanted, context)
    if context is None or not context.held:
        return found
    return never_worse(found, profile, wanted, context, context.log[seen:])


def offered_to(strategy: Strategy, profile: Profile, budget: Budget) -> Profile:
    """The profile as a strategy gets it for a budget: norms and biases in the bits that a file of that size has them
    in, and narrower layers beside the others where the strategy makes layers agree on their channels (`couples`).
    """
    profile = within(profile, budget_bytes(budget, profile))
    couples = getattr(strategy, "couples", False) and budget.latency_ms is None  # narrower layers have no times
    return profile.joint() if couples else profile


def never_worse(found: Plan, profile: Profile, budget: Budget, context: Context, tried: Sequence[Trial] = ()) -> Plan:
    """The plan with its measured KL, or the best single-option plan where that one's is smaller.

    tried: what the strategy measured on the way. Where the single option beats its choice, but not every plan that it
    would hand out, the one of these with the smallest KL on all of the data is: on the held-out slice alone the least
    of many single options is small by chance too.

    Measured are the single-option plans that no other one beats in every layer, and, as a larger error in every layer
    now and then comes with a smaller KL, all others whose relative errors sum to at most `RIVALS` times the plan's, or
    that are among the `LEAST_RIVALS` smallest, until `FAR` of these in a row have `RIVALS` times the least KL.
    What a single option leaves of the budget is spent where no layer gets worse, if that measures no worse either.
    """
    kl = found.measured["kl"] if "kl" in found.measured else context.measure(profile, found.layers, found.strategy)

    def loss(rows: Mapping[str, Measured]) -> float:
        return relative_error(profile, {n: row.option for n, row in rows.items()})

    # Of a profile that leaves widths open, a single option is one of the whole network.
    limits, offered = limits_of(budget, profile), profile.whole() if is_coupled(profile) else profile
    near = RIVALS * max(relative_error(profile, found.layers), NOISE)
    best_of_all = single_options(offered, limits)
    chosen = best_of_all + [
        rows
        for i, rows in enumerate(single_options(offered, limits, undominated=False))  # smallest loss first
        if rows not in best_of_all and (i < LEAST_RIVALS or loss(rows) <= near)
    ]
    rivals = [{n: row.option for n, row in rows.items()} for rows in chosen]
    measured: list[float] = []
    for number, (rows, layers) in enumerate(zip(chosen, rivals, strict=True)):
        last = measured[len(best_of_all) :][-FAR:]
        if len(last) == FAR and min(last) > RIVALS * min(kl, *measured) and loss(rows) > near:
            break
        if number % TOGETHER == 0:
            together = rivals[number : number + TOGETHER]
            context.prepare(profile, {n: list(dict.fromkeys(other[n] for other in together)) for n in layers})
        measured.append(context.measure(profile, layers, f"single {_shared_option(profile, layers)}"))
    rivals = rivals[: len(measured)]
    best = min(range(len(rivals)), key=lambda i: (measured[i], i), default=None)
    figures = {"kl": kl, "samples": float(context.held_samples), "single_options": float(len(rivals))}
    if best is None:
        return found.replace(measured={**found.measured, **figures})
    figures["single_option_kl"] = measured[best]
    if measured[best] >= kl:
        return found.replace(measured={**found.measured, **figures})
    single = {n: profile.layers[n].row(o) for n, o in rivals[best].items()}
    option = _shared_option(profile, rivals[best])
    others = [t for t in tried if t.plan is not None and t.kl_all is not None and t.kl <= measured[best]]
    if others:
        other = min(others, key=lambda t: (t.kl_all, t.kl))
        assert other.plan is not None
        note = f"{found.strategy} measured {kl:.6g}, the single option {option} {measured[best]:.6g}: {other.label}, "
        note += f"of the plans that measured no more the best on all data, is used ({other.kl:.6g})"
        own = {**other.plan.measured, **figures, "kl": other.kl}
        return other.plan.replace(seed=found.seed, measured=own, notes=(*found.notes, note))
    note = f"{found.strategy} measured {kl:.6g}, the single option {option} {measured[best]:.6g}: that one is used"
    # A single option rarely fills the budget: what it leaves goes to layers that a smaller error can be bought for.
    smaller = no_worse_than(offered, single)
    better = allocate(smaller, limits, energy_losses(smaller))
    better_kl = context.measure(profile, better.options, f"single {option}, topped up")
    if better_kl <= measured[best]:
        rows, name, final = dict(better.rows), "uniform, topped up", better_kl
        note += f", topped up ({better_kl:.6g})"
    else:
        rows, name, final = single, "uniform", measured[best]
    plan = chosen_plan(profile, budget, rows, name)
    return plan.replace(seed=found.seed, measured={**figures, "kl": final}, notes=(*found.notes, note))


def _shared_option(profile: Profile, layers: Mapping[str, Option]) -> Option:
    """What a single-option plan gives every layer that has it: those that calibration reached."""
    return next((o for n, o in layers.items() if profile.layers[n].reached), next(iter(layers.values())))
