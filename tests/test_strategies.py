"""Conformance: every strategy of the registry keeps the budget, repeats itself, and never loses to a single option."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import convnet, grid_profile, images, profiled, small_profile
from torch import nn

import autocompress as ac
from autocompress import digits
from autocompress.applying import encoded_of
from autocompress.calibration import calibrate
from autocompress.errors import InfeasibleError, MismatchError
from autocompress.measuring import Trial
from autocompress.planning import budget_bytes, limits_of, make_plan, running_cost, single_options, within
from autocompress.profiling import Profile, profile
from autocompress.strategies import STRATEGIES, StrategyError, needs_of, never_worse
from autocompress.strategies.base import chosen_plan
from autocompress.types import Budget, Plan

BUDGETS = ["3x", "6x", "9x", "420", "5bpw", "6x,bops=9%", "bops=40%,macs=100%"]


def context(model: nn.Module | None = None) -> ac.Context:
    given, data, _ = small_profile()
    return ac.Context(model or given, data, effort="fast")


@functools.cache
def smallest_of(strategy: str) -> int:
    """The smallest budget that a strategy says it can keep: rules that have few options cannot keep all."""
    with pytest.raises(InfeasibleError) as caught:
        ac.plan(grid_profile()[2], 100, strategy, context())
    return caught.value.smallest_bytes


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_plan_keeps_its_budget_and_says_how_good_it_is(strategy: str, budget: str, tmp_path: Path) -> None:
    model, data, found = grid_profile()
    measuring = context()
    if budget_bytes(Budget.parse(budget), found) < smallest_of(strategy) <= budget_bytes(Budget.parse("6x"), found):
        with pytest.raises(InfeasibleError):
            ac.plan(found, budget, strategy, measuring)
        return
    plan = ac.plan(found, budget, strategy, measuring)
    assert plan.budget_bytes == budget_bytes(Budget.parse(budget), found)
    small = ac.apply(model, plan, found, data)
    info = ac.save(small, plan, tmp_path / "model.acz")
    assert info.bytes == plan.predicted_bytes == (tmp_path / "model.acz").stat().st_size <= plan.budget_bytes
    for name, limit in limits_of(Budget.parse(budget), found).running.items():
        assert running_cost(found, name, plan.layers) <= limit
    assert plan.bound <= plan.predicted_loss * (1 + 1e-12)
    assert plan.gap >= 0
    assert plan.fingerprint == found.fingerprint
    assert list(plan.layers) == list(found.layers)
    # The figure in the plan is that of the model that is handed out.
    assert plan.is_measured
    assert plan.measured["kl"] == measuring.divergence_of(small)
    assert plan.measured["samples"] == measuring.held_samples == 12
    assert plan.measured["kl"] <= plan.measured["single_option_kl"]
    # It repeats, in a context that has measured other plans, too.
    assert ac.plan(found, budget, strategy, measuring) == plan
    assert ac.plan(found, budget, strategy, context()) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert str(Path(__file__).parent) not in plan.to_json()


@pytest.mark.parametrize("strategy", [name for name, found in STRATEGIES.items() if needs_of(found) == "curves"])
def test_without_a_context_a_plan_is_marked_unmeasured(strategy: str) -> None:
    plan = ac.plan(grid_profile()[2], "6x", strategy)
    assert not plan.is_measured
    assert plan.predicted_bytes <= plan.budget_bytes
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_too_little_room_is_refused_with_the_least_that_would_do(strategy: str) -> None:
    found, enough = grid_profile()[2], smallest_of(strategy)
    assert ac.plan(found, enough, strategy, context()).predicted_bytes <= enough
    with pytest.raises(InfeasibleError):
        ac.plan(found, enough - 1, strategy, context())


def test_the_page_names_every_strategy_and_what_it_needs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "strategies.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    said = {name: cells[-2].strip() for cells in rows for name in re.findall(r"`(\w+)`", cells[1])}
    assert said == {name: "evaluations" if name == "auto" else needs_of(s) for name, s in STRATEGIES.items()}


def test_every_single_option_loses_to_strategies_on_every_budget() -> None:
    """Rule 1 by brute force, over all options and not only those that no other beats."""
    found = grid_profile()[2]
    measuring = context()
    singles = [
        (found.template.file_bytes(rows), measuring.measure(found, {n: r.option for n, r in rows.items()}))
        for rows in single_options(found, 1 << 40, undominated=False)
    ]
    assert len(singles) == len(found.layers["conv2"].rows)  # a grouped convolution: it has no ranks
    for budget in (350, 420, 600, 900, 10**6):
        best = min((kl for size, kl in singles if size <= budget), default=float("inf"))
        # The rule is the same for all; those that search would take a minute here.
        for strategy in (name for name, s in STRATEGIES.items() if needs_of(s) == "curves"):
            if budget >= smallest_of(strategy):
                assert ac.plan(found, budget, strategy, measuring).measured["kl"] <= best, (strategy, budget)


@functools.cache
def digits_profile() -> tuple[nn.Module, list[torch.Tensor], Profile]:
    model, data = digits.model(), digits.calibration()[:5]
    options = ["fp16", "w4", "w8", *(f"rd({step},{lam})s35" for step in (0.566, 1.131) for lam in (0.1, 0.7))]
    options += [f"rd({step},{lam})" for step in (0.4, 0.8) for lam in (0.1, 0.7)]
    return model, data, profiled(model, data, options, workers=2)


@pytest.mark.parametrize("budget", ["6x", "10x", "14x"])
def test_no_single_option_beats_the_plan_on_the_digits_network(budget: str) -> None:
    found = digits_profile()[2]
    measuring = digits_context()
    limit = budget_bytes(Budget.parse(budget), found)
    rivals = single_options(within(found, limit), limit, undominated=False)
    assert len(rivals) > 2
    best = min(measured_single(str(rows["conv1"].option), limit) for rows in rivals)
    for strategy in ("exact", "auto", "uniform"):
        plan = ac.plan(found, budget, strategy, measuring)
        assert plan.measured["kl"] <= best, strategy


@functools.cache
def digits_context() -> ac.Context:
    model, data, _ = digits_profile()
    return ac.Context(model, data)


@functools.cache
def measured_single(option: str, limit: int) -> float:
    found = within(digits_profile()[2], limit)  # with norms and biases as a file of that size has them
    return digits_context().measure(found, {name: ac.Option.parse(option) for name in found.layers})


def test_a_bad_strategy_is_replaced_by_the_best_single_option() -> None:
    """A callable stands for a strategy; this one takes the smallest of everything."""

    def worst(found: Profile, budget: Budget, context: Any) -> Plan:
        from autocompress.planning import Allocation

        rows = {n: min(x.rows, key=lambda row: row.bytes) for n, x in found.layers.items()}
        return make_plan(found, budget, Allocation(rows, 9.0, 1.0, 8.0, found.template.file_bytes(rows), 0), "worst")

    found = small_profile()[2]
    plan = ac.plan(found, "4x", worst, context())
    single = ac.plan(found, "4x", "uniform")
    assert plan.strategy in ("uniform", "uniform, topped up")
    assert plan.measured["kl"] <= plan.measured["single_option_kl"]
    assert plan.predicted_bytes <= plan.budget_bytes
    assert 0.0 < plan.bound <= plan.predicted_loss <= single.predicted_loss * (1 + 1e-12)
    if plan.strategy == "uniform":
        assert len({str(option) for option in plan.layers.values()}) == 1
    else:
        assert plan.predicted_bytes > single.predicted_bytes
    noted = re.search(r"the single option (\S+) [\d.e-]+: that one is used", plan.notes[-1])
    assert noted is not None
    used = ac.Option.parse(noted[1])  # topped up, some layers have more
    assert any(option == used for option in plan.layers.values())
    assert plan.notes[-1].startswith("worst measured ")
    assert ac.plan(found, "4x", worst).strategy == "worst"
    assert plan.predicted_bytes <= plan.budget_bytes


def test_a_plan_of_the_strategy_that_no_single_option_beats_is_used_before_a_single_option() -> None:
    """What a strategy measured on the way may be handed out; of several the best on all of the data."""
    found = small_profile()[2]
    measuring = context()

    def second_thoughts(profile: Profile, budget: Budget, context: Any) -> Plan:
        good = [ac.plan(profile, budget, name) for name in ("exact", "greedy")]
        for kl_all, plan in ((0.5, good[0]), (0.25, good[1])):
            kl = context.measure(profile, plan.layers)
            plan = plan.replace(measured={"kl": kl, "kl_all": kl_all})
            context.log.append(Trial(plan.strategy, plan.layers, kl if allowed else 9.0, kl_all, plan))
        rows = {n: min(x.rows, key=lambda row: row.bytes) for n, x in profile.layers.items()}
        return chosen_plan(profile, budget, rows, "worst")

    allowed = True
    plan = ac.plan(found, "4x", second_thoughts, measuring)
    assert plan.strategy == "greedy"
    assert plan.measured["kl"] <= plan.measured["single_option_kl"]
    assert plan.measured["kl_all"] == 0.25
    assert "greedy, of the plans that measured no more the best on all data, is used" in plan.notes[-1]
    allowed = False
    assert ac.plan(found, "4x", second_thoughts, measuring).strategy in ("uniform", "uniform, topped up")


@pytest.mark.parametrize(
    ("calibrated", "measured"),
    [
        ({"holdout": 0}, {}),
        ({"seed": 1}, {"seed": 0}),
        ({"holdout": 0, "resize": 60}, {}),
        ({"holdout": 0}, {"resize": 20}),
        ({"holdout": 0}, {"labels": True}),
    ],
    ids=["nothing held out", "another seed", "one batch", "other batches", "with labels"],
)
def test_data_that_the_hessians_saw_is_no_measure(calibrated: dict[str, Any], measured: dict[str, Any]) -> None:
    model, data = convnet(), images()

    def again(changes: dict[str, Any]) -> list[Any]:
        size = changes.pop("resize", None)
        out: list[Any] = list(torch.cat(data).split(size)) if size else list(data)
        return [[x, torch.zeros(len(x))] for x in out] if changes.pop("labels", False) else out

    seen, held = dict(calibrated), dict(measured)
    seen_data, held_data = again(seen), again(held)
    found = profile(model, calibrate(model, seen_data, **seen), options=["w4"], workers=1)
    with pytest.raises(MismatchError, match="field 'data': the Hessians saw the slice that plans are measured on"):
        ac.plan(found, "3x", "exact", ac.Context(model, held_data, **held))


def test_data_that_holds_a_sample_twice_can_be_used() -> None:
    model = convnet()
    data = [images()[0]] * 6
    found = profiled(model, data, ["w4"])
    assert ac.plan(found, "3x", "exact", ac.Context(model, data)).is_measured


def test_a_context_of_another_model_is_refused() -> None:
    found = small_profile()[2]
    with pytest.raises(MismatchError, match="field 'model': the context holds another model"):
        ac.plan(found, "3x", "exact", context(convnet(seed=1)))


def test_a_single_sample_leaves_a_plan_unmeasured() -> None:
    model, data = convnet(), [images()[0][:1]]
    found = profiled(model, data, ["w4"])
    assert not ac.plan(found, "3x", "exact", ac.Context(model, data)).is_measured


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(StrategyError, match=r"there is no strategy 'best'; there are uniform, greedy, .*, auto"):
        ac.plan(small_profile()[2], "3x", "best")
    with pytest.raises(MismatchError, match="strategy 'kl' measures the model: give a context"):
        ac.plan(small_profile()[2], "3x", "kl")


def test_measured_slopes_are_kept_in_the_store(tmp_path: Path) -> None:
    model, data, _ = small_profile()
    found = profiled(model, data, store=tmp_path)
    first, second = ac.Context(model, data), ac.Context(model, data)
    assert first.sensitivities(found) == second.sensitivities(found)
    assert first.evaluations > 0
    assert second.evaluations == 0
    assert ac.plan(found, "5x", "kl", second) == ac.plan(small_profile()[2], "5x", "kl", context())


def test_the_context_builds_what_apply_makes() -> None:
    model, data, found = small_profile()
    plan = ac.plan(found, "5x")
    built, applied = context().build(found, plan.layers), ac.apply(model, plan, found, data)
    for key, tensor in applied.state_dict().items():
        assert torch.equal(built.state_dict()[key], tensor), key
    assert encoded_of(applied).plan == plan


def test_singles_far_behind_end_the_measuring_of_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, _ = small_profile()
    found = profiled(model, data, [f"s{10 * share}w{bits}" for share in range(1, 8) for bits in (2, 3, 4)])
    exact = ac.plan(found, "6x", "exact")
    limits = limits_of(Budget.parse("6x"), found)
    order = [
        {n: row.option for n, row in rows.items()}
        for rows in single_options(within(found, limits.bytes), limits, undominated=False)
    ]
    best = len(single_options(within(found, limits.bytes), limits))
    assert len(order) > best + 4

    def measured_with(kl_of: Any) -> list[str]:
        measuring = context()
        monkeypatch.setattr(measuring, "measure", lambda profile_, layers, label="": log(layers, label))
        labels: list[str] = []

        def log(layers: Any, label: str) -> float:
            if not label.startswith("single"):
                return 1.0
            labels.append(label)
            return float(kl_of(len(labels)))

        never_worse(exact, found, Budget.parse("6x"), measuring)
        return labels

    every = min(len(order), 16)
    assert len(measured_with(lambda number: 1.9)) >= every, "near ones are all measured"
    assert len(measured_with(lambda number: 2.1)) < every, "after three in a row at more than twice the least, no more"
    assert len(measured_with(lambda number: 2.1 if number % 3 else 1.9)) >= every, "three in a row it takes"
