"""Exact file lengths, budgets kept, and single-option plans that no other one beats."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import OPTIONS, convnet, images, profiled, small_profile

import autocompress as ac
from autocompress.compressors import Measured
from autocompress.errors import BudgetError, InfeasibleError
from autocompress.layers import dense_file_bytes
from autocompress.planning import allocate, budget_bytes, energy_losses, make_plan, single_options
from autocompress.profiling import Profile
from autocompress.types import Budget

SOLVERS = ("exact", "dp", "greedy", "lagrangian")


def choices(profile: Profile) -> list[dict[str, Measured]]:
    """Every plan that a profile allows."""
    names = list(profile.layers)
    return [
        dict(zip(names, rows, strict=True)) for rows in itertools.product(*(x.rows for x in profile.layers.values()))
    ]


@functools.cache
def everything() -> list[tuple[int, float, dict[str, Measured]]]:
    """(file bytes, loss, choice) of all 1,296 plans of the small profile."""
    profile = small_profile()[2]
    losses = energy_losses(profile)

    def loss(choice: dict[str, Measured]) -> float:
        return float(sum(losses[n][profile.layers[n].rows.index(row)] for n, row in choice.items()))

    return [(profile.template.file_bytes(c), loss(c), c) for c in choices(profile)]


def payload(choice: Mapping[str, Measured]) -> int:
    return sum(row.bytes for row in choice.values())


@settings(max_examples=15)
@given(picks=st.tuples(*[st.integers(0, len(OPTIONS))] * 4), corrected=st.booleans())
def test_the_template_knows_the_length_of_every_file(picks: tuple[int, ...], corrected: bool) -> None:
    model, data, profile = small_profile()
    rows = {name: layer.rows[i] for i, (name, layer) in zip(picks, profile.layers.items(), strict=True)}
    size = profile.template.file_bytes(rows)
    plan = ac.plan(profile, size, _Fixed(rows))
    small = ac.apply(model, plan, profile, data if corrected else None)
    path = Path(_folder(), "model.acz")
    info = ac.save(small, plan, path)
    assert path.stat().st_size == info.bytes == size == plan.predicted_bytes
    assert plan.fixed_bytes == size - sum(row.bytes for row in rows.values())


@functools.cache
def _folder() -> str:
    import tempfile

    return tempfile.mkdtemp()


class _Fixed:
    """A strategy that was told the answer."""

    def __init__(self, rows: dict[str, Measured]) -> None:
        self.rows = rows

    def __call__(self, profile: Profile, budget: Budget, context: Any) -> ac.Plan:
        from autocompress.planning import Allocation

        size = profile.template.file_bytes(self.rows)
        return make_plan(profile, budget, Allocation(self.rows, 0.0, 0.0, 0.0, size, 0), "fixed")


def test_the_ratio_counts_the_dense_file() -> None:
    model, _, profile = small_profile()
    assert profile.template.dense_bytes == dense_file_bytes(model)
    assert budget_bytes(Budget.parse("7x"), profile) == dense_file_bytes(model) // 7
    floats = sum(t.numel() for n, t in model.state_dict().items() if t.is_floating_point())
    assert profile.template.parameters == floats
    assert budget_bytes(Budget.parse("3.2bpw"), profile) == int(3.2 * floats / 8)


@pytest.mark.parametrize("text", ["macs=1e6", "64 kB,latency_ms=3"])
def test_limits_on_other_costs_are_refused_by_name(text: str) -> None:
    with pytest.raises(BudgetError, match=r"limits .*; this version allocates the file's size only"):
        budget_bytes(Budget.parse(text), small_profile()[2])


@pytest.mark.parametrize("solver", SOLVERS)
def test_allocations_fit_and_get_no_worse_with_more_room(solver: str) -> None:
    profile = small_profile()[2]
    losses = energy_losses(profile)
    smallest = min(size for size, _, _ in everything())
    frontier, least = [], np.inf
    for size, loss, _ in sorted(everything(), key=lambda plan: (payload(plan[2]), plan[1])):
        if loss < least - 1e-15:
            frontier.append((size, loss))
            least = loss
    before = np.inf
    for budget in [*range(smallest + 12, smallest + 200, 3), *range(smallest + 200, 2200, 50), 10**6]:
        found = allocate(profile, budget, losses, solver)
        assert found.file_bytes == profile.template.file_bytes(found.rows) <= budget
        assert found.payload_bytes == budget - (found.file_bytes - payload(found.rows))
        assert found.bound <= min(loss for _, loss, c in everything() if payload(c) <= found.payload_bytes) + 1e-12
        assert found.loss >= min(loss for size, loss, _ in everything() if size <= budget) - 1e-12
        assert found.gap >= 0
        if solver in ("exact", "dp"):
            assert found.loss <= before + 1e-12, f"{budget} bytes do worse than fewer"
            before = found.loss
            # The best of the plans that are the best for their payload, and fit with their header.
            assert abs(found.loss - min(loss for size, loss in frontier if size <= budget)) <= 1e-12
    assert found.loss == min(loss for _, loss, _ in everything())


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_infeasible_budget_names_the_smallest_that_is_not(solver: str) -> None:
    profile = small_profile()[2]
    losses = energy_losses(profile)
    smallest = min(size for size, _, _ in everything())
    with pytest.raises(InfeasibleError, match="no allocation fits in 10 bytes: the smallest file has") as caught:
        allocate(profile, 10, losses, solver)
    assert caught.value.smallest_bytes == smallest
    assert f"{smallest:,} bytes" in str(caught.value)
    assert caught.value.exit_code == 3
    assert allocate(profile, smallest, losses, solver).file_bytes == smallest
    with pytest.raises(InfeasibleError):
        allocate(profile, smallest - 1, losses, solver)


@pytest.mark.parametrize("budget", [150, 300, 380, 450, 700, 1300, 10**6])
def test_single_options_are_the_ones_that_no_other_beats(budget: int) -> None:
    """Against brute force over every option of the profile."""
    profile = small_profile()[2]
    every = []
    for option in ("dense", *OPTIONS):
        rows = {n: x.row(ac.Option.parse(option)) for n, x in profile.layers.items()}
        if profile.template.file_bytes(rows) <= budget:
            every.append(rows)
    all_of_them = single_options(profile, budget, undominated=False)
    assert {str(r["conv1"].option) for r in all_of_them} == {str(r["conv1"].option) for r in every}
    kept = single_options(profile, budget)
    assert [r for r in all_of_them if r in kept] == kept, "both are in the order of their predicted loss"
    for rows in every:
        beaten = [o for o in kept if all(o[n].error <= rows[n].error for n in rows)]
        assert beaten, "what is left out is at or above something that is kept, in every layer"
    for a, b in itertools.permutations(kept, 2):
        assert any(a[n].error < b[n].error for n in a)


def test_equal_single_options_are_kept_once() -> None:
    profile = small_profile()[2]
    layers = {}
    for name, layer in profile.layers.items():
        twin = dataclasses.replace(layer.rows[2], option=ac.Option(bits=7))
        layers[name] = dataclasses.replace(layer, rows=(*layer.rows[2:3], twin))
    doubled = dataclasses.replace(profile, layers=layers)
    assert [str(r["conv1"].option) for r in single_options(doubled, 10**6)] == ["w4"]
    assert len(single_options(doubled, 10**6, undominated=False)) == 2


def test_an_option_that_one_layer_cannot_have_is_no_single_option() -> None:
    profile = small_profile()[2]
    layer = profile.layers["conv2"]
    rows = tuple(row for row in layer.rows if str(row.option) != "w4")
    partial = dataclasses.replace(profile, layers={**profile.layers, "conv2": dataclasses.replace(layer, rows=rows)})
    assert "w4" not in {str(r["conv1"].option) for r in single_options(partial, 10**6, undominated=False)}


def test_a_layer_of_no_energy_costs_nothing_to_lose() -> None:
    model: Any = convnet()
    model.conv2.weight.data.zero_()
    profile = profiled(model, images(), options=("w4", "rd(0.9,0.3)s60"))
    assert profile.layers["conv2"].energy == 0.0
    assert energy_losses(profile)["conv2"].tolist() == [0.0, 0.0, 0.0]
    found = allocate(profile, 700, energy_losses(profile))
    assert np.isfinite(found.loss)
    assert found.rows["conv2"].bytes < 150
    assert np.isfinite(ac.plan(profile, 700, "uniform").predicted_loss)
