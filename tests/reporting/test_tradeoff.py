"""What the page draws: the frontier is certified at every budget, curves are undominated, thin, and of the profile."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest
from networks import grid_profile, small_profile

from autocompress.planning import allocate, energy_losses, size_range, within
from autocompress.reporting.curves import FAMILIES, POINTS, family_of, layer_curves
from autocompress.reporting.judging import frontier_section
from autocompress.reporting.rows import layer_rows
from autocompress.reporting.svg import Axis
from autocompress.reporting.tradeoff import Tradeoff
from autocompress.strategies import plan
from autocompress.types import Option


@pytest.fixture(scope="module")
def line() -> Tradeoff:
    return Tradeoff(small_profile()[2])


@pytest.mark.parametrize("part", [0.15, 0.2, 0.3, 0.6])
def test_the_optimum_lies_on_the_gap_bar_of_every_budget(line: Tradeoff, part: float) -> None:
    profile = line.profile
    budget = int(part * size_range(profile)[1])
    best = allocate(within(profile, budget), budget, energy_losses(profile))
    found = line.at(budget)
    assert found is not None
    assert found.bytes <= budget
    assert found.bound * (1 - 1e-9) <= best.loss <= found.loss * (1 + 1e-9)
    assert line.below(sum(row.bytes for row in best.rows.values())) <= best.loss * (1 + 1e-9)
    assert line.below(0) == pytest.approx(line.points[0].bound), "below the smallest payload there is nothing"


def test_points_of_the_line_are_optimal_for_their_bytes(line: Tradeoff) -> None:
    points = line.points
    assert len(points) > 5
    assert all(a.bytes < b.bytes and a.loss > b.loss for a, b in itertools.pairwise(points))
    for point in points:
        assert point.bound <= point.loss
        assert point.gap <= 1e-9
        again = line.at(point.bytes)
        assert again is not None
        assert again.loss <= point.loss, "a breakpoint that is not drawn may have a shorter header"


def test_below_the_smallest_file_there_is_no_point(line: Tradeoff) -> None:
    least = line.points[0].bytes
    assert line.at(least) is not None
    assert line.at(least - 1) is None
    assert line.more(least - 1) == (0.0, [])


def test_more_bytes_take_away_error_from_the_layers_that_get_them(line: Tradeoff) -> None:
    size = line.points[2].bytes
    little, few = line.more(size, 1)
    much, many = line.more(size, 300)
    assert 0.0 < little < much < 1.0
    assert set(few) <= set(many) <= set(line.profile.layers)
    assert len(few) == 1, "one byte goes to one layer"


def test_curves_are_undominated_points_of_the_profile() -> None:
    profile = small_profile()[2]
    chosen = plan(profile, "6x", "exact")
    name, layer = next(iter(profile.layers.items()))
    row = layer.row(Option.parse("rd(0.5,0.3)"))
    worse = dataclasses.replace(row, option=Option.parse("rd(0.6,0.3)"), bytes=row.bytes + 1, error=1.5 * row.error)
    with_worse = dataclasses.replace(layer, rows=(*layer.rows, worse))
    profile = dataclasses.replace(profile, layers={**profile.layers, name: with_worse})
    curves = layer_curves(chosen, profile)
    assert [curve.name for curve in curves] == list(profile.layers)
    for curve in curves:
        layer = profile.layers[curve.name]
        assert (curve.bytes, curve.chosen) == (layer.row(curve.chosen).bytes, chosen.layers[curve.name])
        known = {(family_of(r.option), r.bytes, r.error / layer.energy) for r in layer.rows}
        for family, front in curve.fronts.items():
            assert {(family, *point) for point in front} <= known
            assert len(front) <= POINTS
            assert all(np.diff([size for size, _ in front]) > 0)
            assert all(np.diff([error for _, error in front]) < 0)
        beaten = min(error for _, error in curve.fronts["rd"])
        assert beaten == min(e for f, _, e in known if f == "rd")


def test_families_of_options() -> None:
    named = {"trellis": "tcq(0.3,0.2)", "rd": "rd(0.3,0.2)", "pruned": "rd(0.3,0.2)s60", "widths": "w4g128"}
    named |= {"structured": "2:4w8", "floats": "fp16"}
    assert {family_of(Option.parse(text)): text for text in named.values()} == named
    assert set(named) == set(FAMILIES)
    assert family_of(Option.parse("mix25/0/25/50/0")) == "widths"
    assert family_of(Option.parse("kq64@2w4")) == family_of(Option.parse("rank8w8")) == "structured"


@pytest.mark.parametrize(("low", "high"), [(1.0, 1e9), (3.0, 200.0), (0.9, 1.1), (15_000, 21_000), (1e-9, 1e-8)])
def test_a_logarithmic_axis_has_a_few_ticks_on_it(low: float, high: float) -> None:
    axis = Axis(low, high, 0.0, 100.0)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(axis.holds(tick) for tick in ticks)
    assert axis(low) == 0.0
    assert axis(high) == 100.0
    assert axis((low * high) ** 0.5) == pytest.approx(50.0)


def test_the_frontier_of_a_narrower_network_is_that_of_its_widths() -> None:
    """The line of the whole network would lie far above the result, and be called a proof."""
    _, _, profile = grid_profile()
    found = plan(profile, "300", "exact")
    rows = layer_rows(found, profile)
    assert any(option.width is not None for option in found.layers.values())
    text = frontier_section(found, profile, {"bytes": found.predicted_bytes, "measured_plans": []}, rows)
    assert "networks as wide as this result" in text
    loss = sum(row.error or 0.0 for row in rows)
    assert Tradeoff(profile).below(sum(row.bytes for row in rows)) > 2.0 * loss  # what no page may say
    proven = [float(x) for x in re.findall(r"[\d,]+ bytes, (\S+), gap", text)]
    assert proven
    assert min(proven) <= loss * 1.01
