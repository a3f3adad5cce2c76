"""CC: channels and singular values together, by curves of normalised loss that are fitted to every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.batches import batch_digest, join_batches
from autocompress.compressors import Measured
from autocompress.errors import MismatchError
from autocompress.measuring import Context
from autocompress.narrowing import WHOLE
from autocompress.planning import limits_of, relative_error, within_limits
from autocompress.profiling import Profile
from autocompress.strategies.base import Choice, chosen_plan, largest_that_fits, no_times, refused, with_context
from autocompress.strategies.fisher import squared_gradients
from autocompress.strategies.weighing import kept, losses_of_changes
from autocompress.types import DENSE, Budget, Option, Plan

__all__ = ["Curve", "allocated", "cc", "fitted"]

VERSION = 2
MOST = 0.95  # of a layer's weights that may go
SAMPLES = 128
SWEEPS = 2  # over the groups of channels: a level can only change what layers beside its own group choose


@dataclass(frozen=True)
class Curve:
    """Normalised loss of a layer ≈ p1 exp(p2 c), c the part of its multiplications that is gone."""

    p1: float
    p2: float


def fitted(gone: np.ndarray, loss: np.ndarray) -> Curve | None:
    """The curve of points (n,) by log-linear regression, each weighted by the root of its loss; None where the loss
    does not rise. Losses are divided by the largest first. Source: CC, arXiv 2105.11228, as its code does it.
    """
    some = loss > 0.0
    if np.unique(gone[some]).size < 2:
        return None
    scaled = loss[some] / loss.max()
    # polyfit squares its weights.
    slope, offset = np.polyfit(gone[some], np.log(scaled), 1, w=scaled**0.25)
    return Curve(math.exp(offset), float(slope)) if slope > 1e-9 else None


def allocated(curves: Mapping[str, Curve], level: float) -> dict[str, float]:
    """The part of every layer that goes where the slope p1 p2 exp(p2 c) of each is one λ = exp(level): c = ln(λ / (p1
    p2)) / p2, cut to [0, .95].
    """
    return {n: min(max((level - math.log(x.p1 * x.p2)) / x.p2, 0.0), MOST) for n, x in curves.items()}


@dataclass(frozen=True)
class _Row:
    """A row that a layer may have: the channel groups that it needs, the part that is gone, and its loss."""

    row: Measured
    link: tuple[str, float, str, float]
    gone: float
    loss: float


class Cc:
    """Collaborative compression: how much goes of each layer by fitted curves, then as channels or as singular values.

    A layer's loss at an option is Σ F (w - ŵ)², F the mean squared gradients of the task's loss or of the model's own
    predictions (the paper's mean gradients vanish where training ends). The least loss by part of the multiplications
    that is gone is fitted (`fitted`), every layer gets its part from one λ (`allocated`), and of what it has with at
    least so much gone, it takes the least loss: fewer singular values, or fewer input channels with the rest refitted.
    A group of channels has one level for all of its layers: the one at which they miss their parts by least, and of
    those the one of least loss, group after group; layers whose outputs go lose nothing by it. λ is the largest that
    fits. Values are stored the same way in all layers, and every way on offer is tried, as for ranks.

    Thinner than the paper: a layer has fewer channels or fewer singular values, not both, as no option here has; units
    go in one step to a level on offer, not one in a hundred at a time with a look ahead. Source: CC, arXiv 2105.11228.
    Raises MismatchError without a context, or where there are neither narrower nor low-rank layers; BudgetError for a
    budget in milliseconds, of which there is no table for either.
    """

    needs = "gradients"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        no_times(budget, "cc")
        values = _values(profile)
        losses = self._losses(profile, with_context(context, "cc", "needs gradients of the model"))
        found: list[tuple[float, int, Choice]] = []
        least: list[Choice] = []
        limits = limits_of(budget, profile)
        for i, value in enumerate(values):
            tables = {name: _table(profile, name, value, losses[name]) for name in profile.layers}
            curves = {name: curve for name, table in tables.items() if (curve := _curve(table)) is not None}
            starts = [math.log(x.p1 * x.p2) for x in curves.values()] or [0.0]
            ends = [math.log(x.p1 * x.p2) + MOST * x.p2 for x in curves.values()] or [0.0]

            def propose(
                t: float, tables=tables, curves=curves, low: float = min(starts), high: float = max(ends)
            ) -> Choice:
                return chosen_rows(profile, tables, allocated(curves, high + t * (low - high)))

            least.append(propose(0.0))
            if within_limits(profile, limits, least[-1]):
                rows = largest_that_fits(profile, budget, propose, "cc")
                found.append((relative_error(profile, {n: row.option for n, row in rows.items()}), i, rows))
        if not found:
            raise refused(profile, budget, least, "no choice of strategy 'cc'")
        _, i, rows = min(found, key=lambda each: each[:2])
        layers = {n: row.option for n, row in rows.items()}
        shaped = profile if profile.widths is None else profile.at(profile.widths.structure_of(layers))
        name = f"cc({'fp32' if values[i] == DENSE else values[i]})"
        return chosen_plan(shaped, budget, rows, name).replace(budget_bytes=limits.bytes)

    def _losses(self, profile: Profile, context: Context) -> dict[str, list[float]]:
        """Σ F (w - ŵ)² of every row of every layer, narrower ones behind the others."""
        labelled = context.labelled(SAMPLES)
        batch = join_batches(labelled or context.fit, SAMPLES)

        def make() -> dict[str, list[float]]:
            weight = squared_gradients(context, profile, batch, bool(labelled))
            return losses_of_changes(
                context.model, profile, lambda name, change: float(np.sum(weight[name] * change**2)), narrowed=True
            )

        key = [VERSION, batch_digest(batch), *context.loss_key(labelled), context.seed]
        return kept(context, profile, "cc", key, make)


cc = Cc()


def _value(option: Option) -> Option:
    """How an option of whole, narrower or low-rank layers stores its values."""
    return dataclasses.replace(option.inner, rank=None, groups=None, plain=False)


def _is_smaller(option: Option) -> bool:
    """Whether a layer of that option computes less."""
    return option.width is not None or (option.rank is not None and option.residual is None)


def _values(profile: Profile) -> list[Option]:
    """Ways to store values, unstructured, that every layer has at its full width, and that some layer has with fewer
    singular values or channels.
    """
    reached = [layer for layer in profile.layers.values() if layer.reached]
    smaller = {_value(r.option) for x in reached for r in (*x.rows, *x.narrowed) if _is_smaller(r.option)}
    shared = [r.option for r in reached[0].rows if r.option in smaller] if reached else []
    if DENSE in smaller and DENSE not in shared:
        shared.insert(0, DENSE)
    shared = [value for value in shared if all(any(r.option == value for r in x.rows) for x in reached)]
    if not shared:
        raise MismatchError(
            "strategy 'cc' removes channels and singular values, and this profile has neither in a way of storing "
            "values that every layer has whole too, such as w4 beside rank8w4: profile with --options "
            "default,channels,lowrank"
        )
    return shared


def _table(profile: Profile, name: str, value: Option, losses: Sequence[float]) -> list[_Row]:
    layer = profile.layers[name]
    rows = [*layer.rows, *layer.narrowed]
    if not layer.reached:
        least = min(layer.rows, key=lambda row: row.bytes)
        return [_Row(least, profile.links()[name][rows.index(least)], 0.0, 0.0)]
    return [
        _Row(row, link, 1.0 - (layer.layer.size if row.multiplied is None else row.multiplied) / layer.layer.size, loss)
        for row, link, loss in zip(rows, profile.links()[name], losses, strict=True)
        if _value(row.option) == value
    ]


def _curve(table: Sequence[_Row]) -> Curve | None:
    """The fit to those rows with all outputs that no row with as much gone has less loss than."""
    own = sorted((r for r in table if r.link[3] == WHOLE), key=lambda r: (-r.gone, r.loss))
    best, points = math.inf, []
    for row in own:
        if row.loss < best:
            best = row.loss
            points.append((row.gone, row.loss))
    gone, loss = np.array(points).reshape(-1, 2).T
    return fitted(gone, loss)


def chosen_rows(
    profile: Profile, tables: Mapping[str, Sequence[_Row]], parts: Mapping[str, float]
) -> dict[str, Measured]:
    """For every layer a row with at least its part gone, of least loss, at levels of the groups that fit together."""
    levels = profile.levels()
    structure = dict.fromkeys(levels, WHOLE)

    def best(name: str) -> tuple[float, float, Measured] | None:
        """How much of its part is missing, the loss, and the row of a layer, at the levels that the groups have."""
        fitting = [
            (max(parts.get(name, 0.0) - r.gone, 0.0), r.loss, i)
            for i, r in enumerate(tables[name])
            if structure.get(r.link[0], WHOLE) == r.link[1] and structure.get(r.link[2], WHOLE) == r.link[3]
        ]
        if not fitting:
            return None
        missing, loss, i = min(fitting)
        return missing * profile.layers[name].layer.size * max(profile.positions(name), 1), loss, tables[name][i].row

    beside = {g: [n for n, table in tables.items() if any(g in (r.link[0], r.link[2]) for r in table)] for g in levels}
    for _ in range(SWEEPS):
        for group in levels:
            scores = []
            for level in levels[group]:
                structure[group] = level
                own = [best(name) for name in beside[group]]
                if all(own):
                    scores.append((sum(x[0] for x in own if x), sum(x[1] for x in own if x), -level))
            structure[group] = -min(scores)[2]
    found = {name: best(name) for name in tables}
    return {name: x[2] for name, x in found.items() if x is not None}
