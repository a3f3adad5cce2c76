"""Rules that set a rank for every layer, and what they choose from: `svd`, `svd_energy`, `pca`, `lrank`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.compressors import Measured
from autocompress.errors import MismatchError
from autocompress.measuring import Context
from autocompress.planning import energy_losses, limits_of, within_limits
from autocompress.profiling import Profile
from autocompress.strategies.base import Choice, chosen_plan, largest_that_fits, refused, weights_of
from autocompress.types import Budget, Option, Plan

__all__ = ["Ladder", "RankFamily", "RankRule", "best_of_families", "lrank", "pca", "rank_families", "svd", "svd_energy"]


@dataclass(frozen=True)
class Ladder:
    """One layer's low-rank options that differ in rank and runs of channels alone: `rows` by number of runs, ranks
    rising; `whole` is the layer as one, its values stored in the same way.
    """

    whole: Measured
    rows: Mapping[int, Sequence[Measured]]

    def at_least(self, rank: int, groups: int = 1) -> Measured:
        """The row of the least rank that is not below; the whole layer where there is none."""
        return next((r for r in self.rows.get(groups, ()) if (r.option.rank or 0) >= rank), self.whole)


@dataclass(frozen=True)
class RankFamily:
    """One way to store values and to find factors, and every layer's ladder."""

    value: Option
    ladders: Mapping[str, Ladder]


def rank_families(profile: Profile, strategy: str) -> list[RankFamily]:
    """Every way to store values that has low-rank options in some layer, in the order of the profile.

    A layer without such options stays whole, and one that calibration never reached has its smallest row. Raises
    MismatchError where no layer has any.
    """
    values: dict[Option, None] = {}
    for layer in profile.layers.values():
        values |= dict.fromkeys(_value(row.option) for row in layer.rows if _is_low_rank(row.option))
    if not values:
        raise MismatchError(
            f"strategy {strategy!r} sets a rank for every layer, and this profile has no low-rank options, such as "
            "rank8w8: profile with --options default,lowrank"
        )
    return [RankFamily(value, {name: _ladder(profile, name, value) for name in profile.layers}) for value in values]


def _is_low_rank(option: Option) -> bool:
    """Whether a rank is all that the layer keeps: no rule knows of a third layer beside the two."""
    return option.rank is not None and option.residual is None


def _value(option: Option) -> Option:
    """What low-rank options have in common: rank 1 stands for any, plain or not."""
    return dataclasses.replace(option, rank=1, groups=None)


def _ladder(profile: Profile, name: str, value: Option) -> Ladder:
    layer = profile.layers[name]
    if not layer.reached:
        return Ladder(min(layer.rows, key=lambda row: row.bytes), {})
    kept = Option(bits=value.bits, half=value.half)
    whole = next((row for row in layer.rows if row.option == kept), None) or layer.row(Option())
    rows: dict[int, list[Measured]] = {}
    for row in layer.rows:
        if _is_low_rank(row.option) and _value(row.option) == value and row.bytes < whole.bytes:
            rows.setdefault(row.option.groups or 1, []).append(row)
    return Ladder(whole, {k: sorted(r, key=lambda row: row.option.rank or 0) for k, r in sorted(rows.items())})


def best_of_families(
    profile: Profile,
    budget: Budget,
    name: str,
    smallest: Callable[[RankFamily], Choice],
    choose: Callable[[RankFamily], Choice],
) -> Plan:
    """The plan of the rule's choice in the family where that has the least sum of error / layer energy.

    smallest: what the rule makes at its least; families whose least is not within the budget are left out. The plan's
    name says which family it is, as in `svd(rank1w8)`. Raises MismatchError without low-rank options, InfeasibleError
    where no family fits.
    """
    families, limits, losses = rank_families(profile, name), limits_of(budget, profile), energy_losses(profile)
    least = [smallest(family) for family in families]
    found: list[tuple[float, int, Choice]] = []
    for i, (family, rows) in enumerate(zip(families, least, strict=True)):
        if within_limits(profile, limits, rows):
            chosen = choose(family)
            loss = sum(losses[n][profile.layers[n].rows.index(row)] for n, row in chosen.items())
            found.append((float(loss), i, chosen))
    if not found:
        raise refused(profile, budget, least, f"no choice of strategy {name!r}")
    _, i, chosen = min(found, key=lambda each: each[:2])
    return chosen_plan(profile, budget, chosen, f"{name}({families[i].value})")


class RankRule:
    """A rule with one parameter: ranks(profile, context) gives, for t in [0, 1], every layer's rank, rising with t.

    Each layer takes the least rank on offer, in one run of channels, that is not below its own, or stays whole where
    there is none; t is the largest that fits. Every way to store values is tried (see `best_of_families`).
    """

    needs = "weights"

    def __init__(
        self, name: str, ranks: Callable[[Profile, Context | None], Callable[[float], Mapping[str, int]]]
    ) -> None:
        self.name, self.ranks = name, ranks

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        rank_families(profile, self.name)  # before the work
        at = self.ranks(profile, context)

        def propose(family: RankFamily, t: float) -> Choice:
            ranks = at(t)
            return {n: ladder.at_least(ranks.get(n, 0)) for n, ladder in family.ladders.items()}

        return best_of_families(
            profile,
            budget,
            self.name,
            lambda family: propose(family, 0.0),
            lambda family: largest_that_fits(profile, budget, lambda t: propose(family, t), self.name),
        )


def _squares(profile: Profile, context: Context | None, name: str) -> dict[str, np.ndarray]:
    """Squared singular values of every layer of one group, largest first."""
    return {
        n: np.linalg.svd(weight[0], compute_uv=False) ** 2
        for n, weight in weights_of(profile, context, name).items()
        if len(weight) == 1
    }


def _constant_share(profile: Profile, context: Context | None) -> Callable[[float], Mapping[str, int]]:
    """Rank t · m of m in every layer (SVDNet's constant relative rank; torchprune, arXiv 2107.11442)."""
    squares = _squares(profile, context, "svd")
    return lambda t: {n: max(1, round(t * len(s))) if t < 1.0 else len(s) + 1 for n, s in squares.items()}


def _equal_energy(profile: Profile, context: Context | None) -> Callable[[float], Mapping[str, int]]:
    """The least rank that keeps the part t of Σσ² in every layer (Alvarez and Salzmann 2017; torchprune)."""
    squares = _squares(profile, context, "svd_energy")
    kept = {n: np.cumsum(s) / max(float(s.sum()), 1e-300) for n, s in squares.items()}
    return lambda t: {n: len(k) + 1 if t >= 1.0 else int(np.searchsorted(k, t - 1e-15)) + 1 for n, k in kept.items()}


def _output_components(profile: Profile, context: Context | None) -> Callable[[float], Mapping[str, int]]:
    """Principal components of the outputs: those whose variance is above τ times the MACs of a rank (Zhang et al.,
    arXiv 1505.06798; torchprune). Variances are eigenvalues of W H Wᵀ.
    """
    ratios: dict[str, np.ndarray] = {}
    for name, weight in weights_of(profile, context, "pca").items():
        hessian = profile.statistics.layers[name].hessian
        if len(weight) == 1 and hessian is not None and hessian.shape[0] == 1:
            columns, _ = profile.cut(name)
            values = np.linalg.eigvalsh(weight[0] @ hessian[0][np.ix_(columns, columns)] @ weight[0].T)[::-1]
            per_rank = sum(weight[0].shape) * max(profile.positions(name), 1)
            ratios[name] = np.maximum(values, 0.0) / per_rank
    at = _levels(list(ratios.values()))
    return lambda t: {n: len(r) + 1 if t >= 1.0 else max(1, int((r > at(t)).sum())) for n, r in ratios.items()}


def _penalised(profile: Profile, context: Context | None) -> Callable[[float], Mapping[str, int]]:
    """argmin_r λ MACs(r) + Σ_{i > r} σ_i², the whole layer among them (L-Rank's C step, Idelbayev and Carreira-Perpiñán
    2020, once instead of in turns with training).
    """
    squares = _squares(profile, context, "lrank")
    weights = weights_of(profile, context, "lrank")
    tails, macs = {}, {}
    for name, s in squares.items():
        f, d = weights[name][0].shape
        ranks = np.arange(1, len(s) + 1)
        tails[name] = np.append(s[::-1].cumsum()[::-1][1:], [0.0, 0.0])
        macs[name] = np.append(np.minimum(ranks * (f + d), f * d), f * d) * float(max(profile.positions(name), 1))
    prices = [s / sum(weights[n][0].shape) / max(profile.positions(n), 1) for n, s in squares.items()]
    at = _levels(prices)

    def ranks_at(t: float) -> dict[str, int]:
        price = 0.0 if t >= 1.0 else at(t)
        found = {}
        for name, tail in tails.items():
            total = tail + price * macs[name]
            # Of equal ones the cheapest, but the whole layer, which is last, where nothing has a price.
            found[name] = len(total) if price == 0.0 else int(np.argmin(total)) + 1
        return found

    return ranks_at


def _levels(values: Sequence[np.ndarray]) -> Callable[[float], float]:
    """t in [0, 1) -> a threshold, from above the largest of the values down to below the least that is not zero."""
    every = np.concatenate([np.zeros(0), *values])
    some = every[every > 0.0]
    high, low = (float(some.max()) * 1e3, float(some.min()) * 1e-3) if some.size else (1.0, 1.0)
    return lambda t: high * (low / high) ** t


svd = RankRule("svd", _constant_share)
svd_energy = RankRule("svd_energy", _equal_energy)
pca = RankRule("pca", _output_components)
lrank = RankRule("lrank", _penalised)
