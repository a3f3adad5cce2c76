"""Rules that set densities: their formulas against naive ones, and what they make of a profile."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
from networks import batches, convnet, grid_profile, images, profiled, seeded
from torch import nn

import autocompress as ac
from autocompress.errors import InfeasibleError, MismatchError
from autocompress.planning import budget_bytes, energy_losses, within
from autocompress.profiling import Profile
from autocompress.strategies import STRATEGIES
from autocompress.strategies.base import weights_of
from autocompress.strategies.densities import above_one_threshold, sparse_families
from autocompress.strategies.erk import erk_densities
from autocompress.strategies.lamp import lamp_scores
from autocompress.types import Budget, Plan

RULES = ("uniform_bits", "uniform_sparsity", "magnitude", "erk", "lamp", "yang", "opq", "opq_energy")
WIDTHLESS = ("magnitude", "erk", "lamp")
SHAPES = {"conv1": (16, 3, 3, 3), "conv2": (16, 16, 3, 3), "conv3": (64, 32, 3, 3), "linear": (10, 64)}


def ruled(profile: Profile, budget: str, strategy: str, context: ac.Context | None = None) -> Plan:
    """A rule's own plan, before `ac.plan` compares it with single options."""
    wanted = Budget.parse(budget)
    given = context or ac.Context(*grid_profile()[:2])
    return STRATEGIES[strategy](within(profile, budget_bytes(wanted, profile)), wanted, given)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3, 0.7, 0.99, 1.0])
def test_erk_spends_the_density_and_gives_all_layers_below_1_the_same_multiple(density: float) -> None:
    found = erk_densities(SHAPES, density)
    size = {n: int(np.prod(shape)) for n, shape in SHAPES.items()}
    assert sum(found[n] * size[n] for n in size) == pytest.approx(density * sum(size.values()), rel=1e-12)
    multiple = {n: found[n] * size[n] / sum(SHAPES[n]) for n in SHAPES}
    below = [multiple[n] for n in SHAPES if found[n] < 1.0]
    assert max(found.values()) <= 1.0
    assert below == pytest.approx([max(below, default=0.0)] * len(below))
    # A layer at 1 would have got more, which is what was given to the others.
    assert all(multiple[n] <= min(below, default=np.inf) * (1 + 1e-12) for n in SHAPES if found[n] == 1.0)


def test_erk_of_the_paper_where_no_layer_is_full() -> None:
    found = erk_densities(SHAPES, 0.02)
    share = {"conv1": 25 / 432, "conv2": 38 / 2304, "conv3": 102 / 18432, "linear": 74 / 640}
    epsilon = 0.02 * (432 + 2304 + 18432 + 640) / (25 + 38 + 102 + 74)
    assert found == pytest.approx({n: epsilon * each for n, each in share.items()})


def test_lamp_scores_are_those_of_the_definition() -> None:
    weight = np.random.default_rng(0).laplace(size=(3, 4, 5))
    scores = lamp_scores(weight)
    for place in np.ndindex(weight.shape):
        rest = sum(float(v) ** 2 for v in weight.ravel() if abs(v) >= abs(weight[place]))
        assert scores[place] == pytest.approx(weight[place] ** 2 / rest, rel=1e-12)
    assert scores.max() == 1.0
    assert not lamp_scores(np.zeros((2, 2))).any()


@pytest.mark.parametrize("kept", [0, 1, 7, 40, 59, 60])
def test_one_threshold_keeps_the_largest_scores_of_all_layers(kept: int) -> None:
    generator = np.random.default_rng(1)
    scores = {"a": generator.random((4, 5)), "b": 3 * generator.random(30), "c": generator.random((2, 5))}
    found = above_one_threshold(scores)(kept / 60)
    ranked = sorted(((float(s), n) for n, each in scores.items() for s in each.ravel()), reverse=True)[:kept]
    assert found == {n: pytest.approx(sum(m == n for _, m in ranked) / each.size) for n, each in scores.items()}


@functools.cache
def fine_profile() -> Profile:
    """Six sparsities with each of two widths, and with rate-distortion codes."""
    values = ("w4", "w3", "rd(0.4,0.1)")
    options = [f"{v}{s}" if "rd" in v else f"{s}{v}" for v in values for s in ("", "s20", "s40", "s60", "s75", "s85")]
    return profiled(convnet(), images(), options)


@pytest.mark.parametrize("strategy", WIDTHLESS)
def test_a_rule_takes_the_nearest_sparsities_and_the_best_value_part(strategy: str) -> None:
    """By a sweep over the rule's parameter, with every value part."""
    profile = fine_profile()
    plan = ruled(profile, "7.6x", strategy)
    profile = within(profile, plan.budget_bytes)
    losses = energy_losses(profile)
    rule = STRATEGIES[strategy]
    at = rule.densities(profile, ac.Context(*grid_profile()[:2]))  # type: ignore[attr-defined]
    best = {}
    for family in sparse_families(profile, strategy):
        for t in np.linspace(0.0, 1.0, 1001):
            rows = {}
            for name, density in at(float(t)).items():
                offered = {row: 1.0 - row.option.sparsity / 100.0 for row in family.rows[name]}
                rows[name] = min(offered, key=lambda row: abs(np.log(offered[row] / max(density, 1e-9))))
            if profile.template.file_bytes(rows) <= plan.budget_bytes:
                loss = sum(losses[n][profile.layers[n].rows.index(row)] for n, row in rows.items())
                best[str(family.value)] = loss, {n: row.option for n, row in rows.items()}
    value, (loss, options) = min(best.items(), key=lambda item: item[1][0])
    assert set(best) == {"w3", "w4"}
    assert plan.strategy == f"{strategy}({value})"
    assert plan.predicted_loss == pytest.approx(loss)
    assert plan.layers == options
    assert len({option.sparsity for option in options.values()}) > 1


def test_uniform_bits_is_the_widest_integer_that_fits_and_uniform_sparsity_the_best_pair() -> None:
    profile = fine_profile()
    limit = budget_bytes(Budget.parse("7x"), profile)
    profile = within(profile, limit)
    losses = energy_losses(profile)

    def best(allowed: str) -> str:
        found = {}
        for option in (row.option for row in profile.layers["conv1"].rows):
            rows = {n: layer.row(option) for n, layer in profile.layers.items()}
            if re.fullmatch(allowed, str(option)) and profile.template.file_bytes(rows) <= limit:
                found[str(option)] = sum(losses[n][profile.layers[n].rows.index(row)] for n, row in rows.items())
        return min(found, key=lambda option: found[option])

    for strategy, allowed in (("uniform_bits", r"w\d"), ("uniform_sparsity", r"(s\d+)?w\d")):
        plan = ruled(profile, "7x", strategy)
        assert {str(option) for option in plan.layers.values()} == {best(allowed)}
        assert plan.strategy == strategy
        assert plan.fingerprint == profile.fingerprint


@pytest.mark.parametrize("strategy", RULES)
def test_a_profile_without_what_a_rule_needs_is_refused_with_the_option_that_helps(strategy: str) -> None:
    model, data = convnet(), images()
    plain = profiled(model, data, ["fp16", "rd(0.5,0.3)", "rd(0.9,0.3)s60", "2:4w4", "blk2@50w4", "w4g8"])
    if strategy == "uniform_bits":
        plain = profiled(model, data, ["fp16", "s60w4"])
    with pytest.raises(MismatchError, match=rf"'{strategy}' .*--options default,surface") as caught:
        ac.plan(plain, "3x", strategy, ac.Context(model, data))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "strategy", [name for name in RULES if name not in ("uniform_bits", "uniform_sparsity", "erk")]
)
def test_a_rule_that_looks_at_weights_needs_them(strategy: str) -> None:
    with pytest.raises(MismatchError, match=rf"'{strategy}' looks at the weights: give a context"):
        ac.plan(grid_profile()[2], "3x", strategy)


def test_sparse_codes_do_where_there_are_no_sparse_integers() -> None:
    profile = profiled(convnet(), images(), ["w4", "rd(0.5,0.3)", "rd(0.5,0.3)s60", "rd(0.5,0.3)s85"])
    for strategy in WIDTHLESS:
        assert ruled(profile, "420", strategy).strategy == f"{strategy}(rd(0.5,0.3))"
    assert {str(o.structure) for o in ruled(profile, "420", "uniform_sparsity").layers.values()} == {"s60"}


@pytest.mark.parametrize("strategy", RULES)
def test_running_costs_that_no_choice_of_a_rule_keeps_are_named(strategy: str) -> None:
    with pytest.raises(InfeasibleError, match=r"is within 592 bytes and [\d,]+ BOPs: the least .* takes is 592 bytes"):
        ruled(grid_profile()[2], "6x,bops=0.01%", strategy)


@pytest.mark.parametrize("strategy", ["magnitude", "lamp", "yang", "opq"])
def test_a_layer_of_zeros_is_pruned_first(strategy: str) -> None:
    model, data = convnet(), images()
    model.get_submodule("conv3").weight.data.zero_()  # type: ignore[operator]
    profile = profiled(model, data, ["w2", "w4", "s35w2", "s35w4", "s85w2", "s85w4"])
    plan = ruled(profile, "8.5x", strategy, ac.Context(model, data))
    assert plan.predicted_bytes <= plan.budget_bytes
    assert plan.layers["conv3"].sparsity == 85.0
    assert {option.sparsity for option in plan.layers.values()} != {85.0}


@pytest.mark.parametrize("strategy", ["uniform_bits", "uniform_sparsity", "erk", "opq_energy"])
def test_a_layer_of_zeros_is_no_trouble_to_rules_that_treat_layers_alike(strategy: str) -> None:
    model, data = convnet(), images()
    model.get_submodule("conv3").weight.data.zero_()  # type: ignore[operator]
    profile = profiled(model, data, ["w2", "w4", "s35w2", "s35w4", "s85w2", "s85w4"])
    plan = ruled(profile, "8.4x", strategy, ac.Context(model, data))
    assert plan.predicted_bytes <= plan.budget_bytes
    assert np.isfinite(plan.predicted_loss)


class Spare(nn.Module):
    """One layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("strategy", RULES)
def test_layers_that_calibration_never_reached_take_their_smallest(strategy: str) -> None:
    model, data = seeded(Spare), batches(12)
    profile = profiled(model, data, ["w2", "w4", "s60w2", "s60w4", "fp16", "w8"])
    plan = ruled(profile, "3.5x", strategy, ac.Context(model, data))
    assert list(weights_of(profile, ac.Context(model, data), strategy)) == ["first", "last"]
    assert str(plan.layers["spare"]) == "w8"
    assert str(plan.layers["first"]) != "dense"
