"""What rules share that set a width for every group of channels: one way to store values for all layers, and of each
group the level on offer that is nearest to its share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from autocompress.compressors import Measured
from autocompress.errors import MismatchError
from autocompress.measuring import Context
from autocompress.narrowing import WHOLE, Widths
from autocompress.planning import limits_of, relative_error, within_limits
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, no_times, refused
from autocompress.types import DENSE, Budget, Option, Plan

__all__ = ["Shares", "WidthRule", "narrower_values", "rows_of", "widths_of"]

Shares = Mapping[str, float]
STEPS = 24  # of the bisection for t


def widths_of(profile: Profile, strategy: str) -> Widths:
    """The groups of channels of a profile, and what stays of them. Raises MismatchError where it has none."""
    if profile.widths is None or not any(layer.narrowed for layer in profile.layers.values()):
        raise MismatchError(
            f"strategy {strategy!r} sets a width for every group of channels, and this profile has no narrower layers, "
            "such as n75/50w4: profile with --options default,channels"
        )
    return profile.widths


def narrower_values(profile: Profile, strategy: str) -> list[Option]:
    """Every way to store values that all layers have at all of their widths, in the order of the profile. Raises
    MismatchError where there is none.
    """
    widths_of(profile, strategy)
    links = profile.links()
    shared: dict[Option, None] | None = None
    for name, layer in profile.layers.items():
        if layer.reached:
            rows = [*layer.rows, *layer.narrowed]
            found: dict[Option, set[object]] = {}
            for row, link in zip(rows, links[name], strict=True):
                found.setdefault(row.option.inner, set()).add(link)
            own = [value for value, at in found.items() if at == set(links[name])]
            shared = dict.fromkeys(v for v in own if shared is None or v in shared)
    if not shared:
        raise MismatchError(
            f"strategy {strategy!r} stores the values of all layers in the same way at any width, and this profile has "
            "no value, such as w4, that every layer has at all of its widths: profile with --options default,channels"
        )
    return list(shared)


def rows_of(shaped: Profile, value: Option) -> dict[str, Measured]:
    """That value in every layer of the profile of one structure; the smallest row where calibration never reached."""
    return {
        name: next(row for row in layer.rows if row.option.inner == value)
        if layer.reached
        else min(layer.rows, key=lambda row: row.bytes)
        for name, layer in shaped.layers.items()
    }


class WidthRule:
    """A rule that sets widths, with values stored the same way in all layers.

    at = shares(profile, context) gives, for t in [0, 1], the part of its channels that every group keeps, rising with
    t. Each group takes the level on offer whose part of its units has the nearest logarithm; t is the largest found
    that fits. Which channels stay at a level is the profile's (`salience.widths`), and so is the refit of the rest.
    Every way to store values is tried, and the plan with the least sum of error / layer energy stays; its name says
    which it is, as in `ft(w4)`. The bound is over the options of layers of these widths.
    """

    def __init__(
        self,
        name: str,
        shares: Callable[[Profile, Context | None], Callable[[float], Shares]],
        needs: str = "weights",
    ) -> None:
        self.name, self.shares, self.needs = name, shares, needs

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        """Raises MismatchError where no layer can be narrower, BudgetError for a budget in milliseconds,
        InfeasibleError where no value fits.
        """
        no_times(budget, self.name)
        values, widths = narrower_values(profile, self.name), widths_of(profile, self.name)
        at, limits, known = self.shares(profile, context), limits_of(budget, profile), dict[object, Profile]()

        def shaped(t: float) -> Profile:
            structure = nearest_levels(widths, at(t))
            key = tuple(structure.values())
            if key not in known:
                known[key] = profile.at(structure)
            return known[key]

        def fits(value: Option, t: float) -> bool:
            return within_limits(shaped(t), limits, rows_of(shaped(t), value))

        found: list[tuple[float, Option, float]] = []
        for value in values:
            if fits(value, 0.0):
                best, low, high = 0.0, 0.0, 1.0
                if fits(value, 1.0):
                    best = 1.0
                else:
                    for _ in range(STEPS):
                        middle = 0.5 * (low + high)
                        if fits(value, middle):
                            low = best = middle
                        else:
                            high = middle
                options = {n: row.option for n, row in rows_of(shaped(best), value).items()}
                found.append((relative_error(shaped(best), options), value, best))
        if not found:
            least = [rows_of(shaped(0.0), value) for value in values]
            raise refused(shaped(0.0), budget, least, f"no choice of strategy {self.name!r}")
        _, value, t = min(found, key=lambda each: each[0])
        name = f"{self.name}({'fp32' if value == DENSE else value})"
        # The largest file that there is, where the size is not limited, is that of the whole network.
        return chosen_plan(shaped(t), budget, rows_of(shaped(t), value), name).replace(budget_bytes=limits.bytes)


def nearest_levels(widths: Widths, shares: Shares) -> dict[str, float]:
    """Of each group the level whose part of its units is nearest, in the logarithm, to its share; the whole without."""
    found = {}
    for name, kept in widths.kept.items():
        size = widths.groups[name].size
        parts = {WHOLE: 1.0, **{level: len(units) / size for level, units in kept.items()}}
        wanted = math.log(max(shares.get(name, 1.0), 1e-9))
        # Of levels with equal parts the largest, as it is the plainer name.
        found[name] = min(sorted(parts, reverse=True), key=lambda level: abs(math.log(parts[level]) - wanted))
    return found
