"""What rules share that set a density for every layer: one way to store values for all of them, and in each the
sparsity on offer that is nearest to its density.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from autocompress.compressors import Measured
from autocompress.errors import MismatchError
from autocompress.measuring import Context
from autocompress.planning import energy_losses, limits_of, within_limits
from autocompress.profiling import Profile
from autocompress.strategies.base import Choice, chosen_plan, largest_that_fits, refused
from autocompress.types import DENSE, Budget, Option, Plan

__all__ = ["DensityRule", "SparseFamily", "above_one_threshold", "integer_families", "sparse_families"]

Densities = Mapping[str, float]
STEPS = 24  # of the bisection for t: to a weight, in a network of ten million
LEAST_DENSITY = 1e-9  # stands for none at all, so that it has a logarithm


@dataclass(frozen=True)
class SparseFamily:
    """Options that differ in their sparsity alone: `value` is what they have in common; `rows` of every layer, densest
    first. Layers that calibration never reached have their smallest row only.
    """

    value: Option
    rows: Mapping[str, Sequence[Measured]]

    def nearest(self, densities: Densities) -> dict[str, Measured]:
        """`nearest_row` of every layer; a layer without a density keeps all that it can."""
        return {name: self.nearest_row(name, densities.get(name, 1.0)) for name in self.rows}

    def nearest_row(self, name: str, density: float) -> Measured:
        """The row of a layer whose density has the nearest logarithm."""
        offered = [np.log(max(1.0 - row.option.sparsity / 100.0, LEAST_DENSITY)) for row in self.rows[name]]
        return self.rows[name][int(np.argmin(np.abs(np.array(offered) - np.log(max(density, LEAST_DENSITY)))))]


def sparse_families(profile: Profile, strategy: str) -> list[SparseFamily]:
    """Every way to store values that has two sparsities or more (0 is one) in all layers that calibration reached, in
    the order of the profile: plain integers (w4, s60w4), which the rules' papers have, or others where there are none.
    Raises MismatchError where there is nothing of the kind.
    """
    reached = {name: layer for name, layer in profile.layers.items() if layer.reached}
    by_value: dict[Option, dict[str, list[Measured]]] = {}
    for name, layer in reached.items():
        for row in layer.rows:
            if row.option.structure == Option(sparsity=row.option.sparsity):
                value = dataclasses.replace(row.option.inner, sparsity=0.0)
                by_value.setdefault(value, {}).setdefault(name, []).append(row)
    smallest = {name: min(layer.rows, key=lambda row: row.bytes) for name, layer in profile.layers.items()}
    found = []
    for value, rows in by_value.items():
        if len(rows) == len(reached) and all(len(each) > 1 for each in rows.values()):
            rows = {n: rows.get(n, [least]) for n, least in smallest.items()}
            by_density = {n: sorted(each, key=lambda r: r.option.sparsity) for n, each in rows.items()}
            found.append(SparseFamily(value, by_density))
    if not found:
        raise MismatchError(
            f"strategy {strategy!r} sets a sparsity for every layer, and this profile has no options that differ in "
            "theirs alone, such as w4 and s60w4, in all of them: profile with --options default,surface"
        )
    return [family for family in found if _plain(family)] or found


def _plain(family: SparseFamily) -> bool:
    return family.value.bits is not None and family.value == Option(bits=family.value.bits)


def integer_families(profile: Profile, strategy: str) -> dict[int, SparseFamily]:
    """The sparse options of every width of a plain grid (s60w4), by width. Raises MismatchError if there are none."""
    widths = {f.value.bits or 0: f for f in sparse_families(profile, strategy) if _plain(f)}
    if not widths:
        raise MismatchError(
            f"strategy {strategy!r} sets a sparsity and a width for every layer, and this profile has no options such "
            "as s60w4: profile with --options default,surface"
        )
    return dict(sorted(widths.items()))


class DensityRule:
    """A rule that sets densities, with values stored the same way in all layers.

    at = densities(profile, context) gives every layer's density for t in [0, 1], rising with t from the sparsest to all
    dense. Each layer takes the sparsity on offer that is nearest in the logarithm of its density; t is the largest that
    fits. Rules say nothing of widths: every one that has sparse options in all layers is tried (`sparse_families`), and
    the plan with the least sum of error / layer energy stays; its name says which it is, as in `erk(w4)`.
    """

    def __init__(
        self,
        name: str,
        densities: Callable[[Profile, Context | None], Callable[[float], Densities]],
        needs: str = "weights",
    ) -> None:
        self.name = name
        self.densities = densities
        self.needs = needs

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        """Raises MismatchError where no options are sparse, InfeasibleError where no width fits."""
        found, at = sparse_families(profile, self.name), self.densities(profile, context)
        limits, losses = limits_of(budget, profile), energy_losses(profile)
        sparsest = [family.nearest(at(0.0)) for family in found]
        plans: list[tuple[float, str, Choice]] = []
        for family, least in zip(found, sparsest, strict=True):
            if within_limits(profile, limits, least):
                rows = largest_that_fits(profile, budget, partial(_at, family, at), self.name, STEPS)
                loss = float(sum(losses[n][profile.layers[n].rows.index(row)] for n, row in rows.items()))
                plans.append((loss, "fp32" if family.value == DENSE else str(family.value), rows))
        if not plans:
            raise refused(profile, budget, sparsest, f"no choice of strategy {self.name!r}")
        _, value, rows = min(plans, key=lambda plan: plan[0])
        return chosen_plan(profile, budget, rows, f"{self.name}({value})")


def _at(family: SparseFamily, densities: Callable[[float], Densities], t: float) -> Choice:
    return family.nearest(densities(t))


def above_one_threshold(scores: Mapping[str, np.ndarray]) -> Callable[[float], Densities]:
    """Densities if the t-th part of all weights, those of the largest scores, is kept: {layer: scores of any shape}."""
    ordered = np.sort(np.concatenate([each.ravel() for each in scores.values()])) if scores else np.zeros(0)
    rising = {name: np.sort(each, axis=None) for name, each in scores.items()}

    def densities(t: float) -> Densities:
        kept = round(t * ordered.size)
        threshold = ordered[-kept] if kept else np.inf
        return {n: 1.0 - float(np.searchsorted(each, threshold)) / each.size for n, each in rising.items()}

    return densities
