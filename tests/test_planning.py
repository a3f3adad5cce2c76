"""Exact file lengths, budgets kept, and single-option plans that no other one beats."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import OPTIONS, convnet, images, profiled, small_profile

import autocompress as ac
from autocompress.compressors import Measured, realise
from autocompress.costs import Latency
from autocompress.errors import BudgetError, InfeasibleError
from autocompress.layers import dense_file_bytes
from autocompress.planning import (
    allocate,
    budget_bytes,
    coarsest,
    dense_cost,
    energy_losses,
    fixed_cost,
    limits_of,
    make_plan,
    row_costs,
    running_cost,
    single_options,
)
from autocompress.profiling import Profile
from autocompress.types import Budget
from solvers import solve

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


def with_times(profile: Profile, dense_ms: float = 2.0) -> Profile:
    """The small profile with a table of times: four-bit codes and half precision are fast, other codes slow."""
    extra = {
        name: {
            row.option: dense_ms * layer.layer.size / 1000 * (-0.25 if str(row.option) in ("w4", "fp16") else 0.5)
            if not row.option.is_dense
            else 0.0
            for row in layer.rows
        }
        for name, layer in profile.layers.items()
    }
    return dataclasses.replace(profile, latency=Latency(dense_ms, extra, (), {}))


def taken(profile: Profile, choice: Mapping[str, Measured]) -> dict[str, float]:
    """The running costs of a choice, added up here: BOPs from the weights themselves."""
    model = small_profile()[0]
    assert profile.latency is not None
    bops, macs = 0, 0
    for name, row in choice.items():
        layer = profile.layers[name]
        weight = realise(profile.problem(name, model.get_parameter(layer.layer.key)), row.option)
        width = {"dense": 32, "fp16": 16}.get(str(row.option))
        if width is None:
            assert weight.codes is not None
            width = next(
                b for b in range(1, 33) if -(2 ** (b - 1)) <= weight.codes.min() <= weight.codes.max() < 2 ** (b - 1)
            )
        positions = 1 if name == "linear" else 36
        macs += layer.layer.size * positions
        bops += 32 * width * positions * int((weight.weight() != 0).sum())
    ms = profile.latency.dense_ms + sum(profile.latency.extra_ms[n][row.option] for n, row in choice.items())
    return {"macs": macs, "bops": bops, "latency_ms": ms}


def test_costs_of_a_choice_are_what_its_weights_say() -> None:
    profile = with_times(small_profile()[2])
    for _, _, choice in everything()[::97]:
        layers = {name: row.option for name, row in choice.items()}
        for name, value in taken(profile, choice).items():
            assert running_cost(profile, name, layers) == pytest.approx(value, abs=4e-6), name
    dense = {name: ac.Option() for name in profile.layers}
    assert running_cost(profile, "bops", dense) == 32 * 32 * dense_cost(profile, "macs") == dense_cost(profile, "bops")


def test_percentages_are_of_the_dense_model() -> None:
    profile = with_times(small_profile()[2])
    limits = limits_of(Budget.parse("700,macs=50%,bops=10%,latency_ms=50%"), profile)
    assert limits.bytes == 700
    macs = dense_cost(profile, "macs")
    assert limits.running == {"macs": macs / 2, "bops": macs * 1024 / 10, "latency_ms": 1.0}
    assert limits_of(Budget.parse("macs=1e9"), profile).bytes == max(size for size, _, _ in everything())


@pytest.mark.parametrize(
    "budget", ["600,bops=10%", "600,bops=9%,latency_ms=2.1", "latency_ms=1.85,macs=100%", "bops=3e6"]
)
def test_several_limits_against_every_plan_there_is(budget: str) -> None:
    profile = with_times(small_profile()[2])
    limits = limits_of(Budget.parse(budget), profile)
    losses = energy_losses(profile)
    found = allocate(profile, limits, losses)
    assert found.solution is not None
    assert found.solution.solver == "milp"
    assert found.file_bytes <= limits.bytes

    names, tables = list(limits.running), [row_costs(profile, name) for name in limits.running]
    fixed = [fixed_cost(profile, name) for name in names]

    def fits(choice: Mapping[str, Measured], room: int) -> bool:
        at = {n: profile.layers[n].rows.index(row) for n, row in choice.items()}
        used = [base + sum(int(t[n][i]) for n, i in at.items()) for base, t in zip(fixed, tables, strict=True)]
        units = [1e6 if name == "latency_ms" else 1 for name in names]
        within = all(u <= limits.running[n] * unit for n, u, unit in zip(names, used, units, strict=True))
        return within and payload(choice) <= room

    assert fits(found.rows, found.payload_bytes)
    best = min(loss for _, loss, choice in everything() if fits(choice, found.payload_bytes))
    assert found.bound <= best + 1e-12
    assert best <= found.loss + 1e-12
    least = min(loss for size, loss, choice in everything() if size <= limits.bytes and fits(choice, size))
    assert found.loss == pytest.approx(least, rel=1e-4), "the gap that milp proves by default"
    assert found.loss > allocate(profile, limits.bytes, losses).loss, "the other limits do bind"


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("700,macs=60%", r"no allocation is within 9,183 MACs: the least possible is 15,304 MACs \(zeros count"),
        ("700,latency_ms=0.3", r"no allocation is within 0.300000 ms: the least possible is 1.768000 ms$"),
        (
            "380,latency_ms=1.9",
            r"within 380 bytes and 1.900000 ms: with the other limits as they are, \S+ bytes or \S+ ms",
        ),
        (
            "700,bops=2%,latency_ms=1.8,macs=100%",
            r"and 1.800000 ms: with the other limits as they are, \S+ BOPs or \S+ ms would do",
        ),
        ("700,bops=1,latency_ms=0.1", r"within 1 BOPs and 0.100000 ms: the least possible is \S+ BOPs and \S+ ms"),
    ],
)
def test_infeasible_limits_name_the_least_that_can_be_met(budget: str, words: str) -> None:
    profile = with_times(small_profile()[2])
    with pytest.raises(InfeasibleError, match=words) as caught:
        ac.plan(profile, budget)
    assert caught.value.exit_code == 3
    numbers = {
        unit: text for text, unit in re.findall(r"([\d.,]+) (bytes|MACs|BOPs|ms)", str(caught.value).split(": ")[1])
    }
    for unit, text in numbers.items():
        key = {"bytes": "size", "MACs": "macs", "BOPs": "bops", "ms": "latency_ms"}[unit]
        number = float(text.replace(",", ""))
        change: Any = {key: int(number) if key == "size" else number}
        asked = dataclasses.replace(Budget.parse(budget), **change)
        if len(numbers) == 1 or "or" in str(caught.value).split(": ")[1]:
            plan = ac.plan(profile, asked)  # it would do, as said
            assert key != "size" or plan.predicted_bytes <= number


def test_single_options_keep_every_limit() -> None:
    profile = with_times(small_profile()[2])
    names = {str(r["conv1"].option) for r in single_options(profile, 10**6, undominated=False)}
    limits = limits_of(Budget.parse("latency_ms=2"), profile)
    kept = {str(r["conv1"].option) for r in single_options(profile, limits, undominated=False)}
    assert names == {"dense", *OPTIONS}
    assert kept == {"dense", "fp16", "w4"}
    plan = ac.plan(profile, "600,latency_ms=100%", "uniform")
    assert {str(o) for o in plan.layers.values()} == {"w4"}
    with pytest.raises(InfeasibleError, match=r"no single option .* takes is 300 bytes and 2\.\d+ ms"):
        ac.plan(profile, "300,latency_ms=2", "uniform")


def test_a_limit_of_exactly_what_is_taken_can_be_met() -> None:
    """A number is taken as it is written: 0.000057 ms are 57 ns, though the product of the floats is less."""
    awkward = [ns for ns in range(1, 10**5) if math.floor(ns / 1e6 * 1e6) < ns][::200]
    assert awkward
    for ns in awkward:
        profile = with_times(small_profile()[2], dense_ms=0.0)
        assert profile.latency is not None
        profile = dataclasses.replace(profile, latency=dataclasses.replace(profile.latency, dense_ms=ns / 1e6))
        assert ac.plan(profile, f"latency_ms={ns / 1e6!r}").predicted_loss == 0.0


def test_milliseconds_need_a_table() -> None:
    with pytest.raises(BudgetError, match="needs a measured table of times: compress makes one, plan with --task too"):
        ac.plan(small_profile()[2], "700,latency_ms=3")


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


@pytest.mark.parametrize("budget", ["2x", "4x", "5x,bops=12%"])
def test_the_problem_of_a_budget_has_the_answer_of_its_plan(budget: str) -> None:
    profile = small_profile()[2]
    problem, plan = ac.problem(profile, budget), ac.plan(profile, budget)
    found = solve(problem, "milp" if "bops" in budget else "exact")
    assert problem.resources == (("bytes", "bops") if "bops" in budget else ("bytes",))
    assert problem.names == tuple(profile.layers)
    assert problem.options is not None
    assert [o[j] for o, j in zip(problem.options, found.choice, strict=True)] == [str(o) for o in plan.layers.values()]
    assert found.loss == plan.predicted_loss
    assert problem.budget[0] == plan.budget_bytes - plan.fixed_bytes
    assert found.cost[0] == plan.predicted_bytes - plan.fixed_bytes


def test_a_problem_takes_losses_of_its_own_and_refuses_what_plans_refuse() -> None:
    profile = small_profile()[2]
    losses = {n: np.arange(len(x.rows), dtype=float) for n, x in profile.layers.items()}
    problem = ac.problem(profile, "4x", losses)
    assert all((a == losses[n]).all() for a, n in zip(problem.loss, losses, strict=True))
    with pytest.raises(InfeasibleError, match="the smallest file has"):
        ac.problem(profile, 200)


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


def test_the_coarsest_options_are_those_that_no_other_is_coarser_than() -> None:
    names = "dense w2 w4 rd(0.5,0.1) rd(1,0.1) mix50/50/0/0/0 mix25/75/0/0/0 mix50/0/50/0/0 mix75/0/0/0/25".split()
    kept = coarsest([ac.Option.parse(name) for name in names])
    assert [str(option) for option in kept] == ["w2", "rd(1,0.1)", "mix50/50/0/0/0", "mix75/0/0/0/25"]
    names = "w2 kq16w4 kq8w4 kq8@2w4 kq4w6 pq4x8w4 pq4x8w6 pq8x8w4".split()
    kept = coarsest([ac.Option.parse(name) for name in names])
    assert [str(option) for option in kept] == ["w2", "kq8@2w4", "kq4w6", "pq4x8w4", "pq8x8w4"]
