"""Rules that set widths: FT and PFP against their definitions, levels, and what they refuse."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from networks import convnet, grid_profile, images, small_profile
from torch import nn

import autocompress as ac
from autocompress.costs import Latency
from autocompress.errors import BudgetError, InfeasibleError, MismatchError, OptionError
from autocompress.layers import Layer
from autocompress.narrowing import WHOLE, narrow
from autocompress.planning import limits_of, within_limits
from autocompress.profiling import profile
from autocompress.salience import widths
from autocompress.strategies import STRATEGIES
from autocompress.strategies.base import weights_of
from autocompress.strategies.episodes import Walk, undominated
from autocompress.strategies.erk import _densities as erk_densities_of
from autocompress.strategies.erk import erk_densities
from autocompress.strategies.ft import filter_norms
from autocompress.strategies.pfp import FAILURE, channels_needed, unit_sensitivities
from autocompress.strategies.structures import WidthRule, narrower_values, nearest_levels, rows_of
from autocompress.types import Budget, Option


@functools.cache
def context() -> ac.Context:
    model, data, _ = small_profile()
    return ac.Context(model, data, effort="fast")


def channels_of(layers: Mapping[str, Option]) -> int:
    """Units that stay in all groups together."""
    kept, known = grid_profile()[2].kept(layers), grid_profile()[2].widths
    assert known is not None
    return sum(len(kept[group.name]) if group.name in kept else group.size for group in known.groups)


def structure_of(plan: ac.Plan) -> dict[str, float]:
    found = grid_profile()[2]
    assert found.widths is not None
    return found.widths.structure_of(plan.layers)


def test_levels_are_nearest_in_the_logarithm() -> None:
    widths_of_grid = grid_profile()[2].widths
    assert widths_of_grid is not None
    sizes = {name: {level: len(u) for level, u in kept.items()} for name, kept in widths_of_grid.kept.items()}
    assert sizes == {"conv1": {75.0: 3, 50.0: 2, 25.0: 1}, "conv3": {75.0: 6, 50.0: 4, 25.0: 2}}
    for share, level in [(1.0, 100), (0.87, 100), (0.86, 75), (0.62, 75), (0.6, 50), (0.36, 50), (0.35, 25), (0.0, 25)]:
        assert nearest_levels(widths_of_grid, {"conv1": share, "conv3": share}) == {"conv1": level, "conv3": level}
    assert nearest_levels(widths_of_grid, {"conv1": 0.5}) == {"conv1": 50.0, "conv3": WHOLE}


@pytest.mark.parametrize("strategy", ["ft", "ft_global", "pfp"])
def test_the_next_wider_network_of_a_rule_does_not_fit(strategy: str) -> None:
    """Over many shares: no network of the rule with more channels fits in the same values."""
    found = grid_profile()[2]
    rule = STRATEGIES[strategy]
    assert isinstance(rule, WidthRule)
    at = rule.shares(found, context())
    assert found.widths is not None
    for size in (350, 480):
        plan = rule(found, Budget(size=size), context())
        assert plan.predicted_bytes <= size
        value = next(iter({o.inner for o in plan.layers.values()}))
        fitting = []
        for t in np.linspace(0.0, 1.0, 101):
            shaped = found.at(nearest_levels(found.widths, at(float(t))))
            rows = rows_of(shaped, value)
            if within_limits(shaped, size, rows):
                fitting.append(channels_of({n: row.option for n, row in rows.items()}))
        assert channels_of(plan.layers) >= max(fitting)


def test_ft_keeps_the_same_part_of_every_group() -> None:
    plan = STRATEGIES["ft"](grid_profile()[2], Budget(size=380), None)
    assert len(set(structure_of(plan).values())) == 1
    assert plan.strategy == "ft(w4)"
    assert any(option.width is not None for option in plan.layers.values())


def test_one_threshold_is_on_the_mean_magnitude_of_filters() -> None:
    model, _, found = grid_profile()
    assert found.widths is not None
    norms = {name: filter_norms(found, context(), found.widths.groups[name]) for name in found.widths.kept}
    conv1, conv2, conv3 = (model.get_parameter(f"conv{i}.weight").detach().double().abs() for i in (1, 2, 3))
    np.testing.assert_allclose(norms["conv3"], conv3.mean(dim=(1, 2, 3)).numpy())
    # A unit of the first group is two channels, of the layer in front and of the grouped one behind it.
    weights = [torch.cat([conv1[2 * u : 2 * u + 2].ravel(), conv2[2 * u : 2 * u + 2].ravel()]) for u in range(4)]
    np.testing.assert_allclose(norms["conv1"], [float(w.mean()) for w in weights])
    rule = STRATEGIES["ft_global"]
    assert isinstance(rule, WidthRule)
    at = rule.shares(found, context())
    for kept in range(13):
        threshold = np.sort(np.concatenate(list(norms.values())))[::-1][kept - 1] if kept else math.inf
        assert at(kept / 12) == {name: float((each >= threshold).mean()) for name, each in norms.items()}


def by_hand(model: nn.Conv2d, x: torch.Tensor) -> np.ndarray:
    """The largest part of each input channel, with loops over every product."""
    weight, best = model.weight.detach().double().numpy(), np.zeros(model.in_channels)
    patches = torch.nn.functional.unfold(x.double(), (3, 3), padding=1, stride=2)
    a = patches.reshape(len(x), model.in_channels, 9, -1).numpy()
    for n in range(len(x)):
        for p in range(a.shape[-1]):
            for row in weight.reshape(model.out_channels, model.in_channels, 9):
                for w in (np.maximum(row, 0.0), np.maximum(-row, 0.0)):
                    for inputs in (np.maximum(a[n, :, :, p], 0.0), np.maximum(-a[n, :, :, p], 0.0)):
                        each = (w * inputs).sum(axis=1)
                        if each.sum() > 0.0:
                            best = np.maximum(best, each / each.sum())
    return best


def test_a_sensitivity_is_the_largest_part_of_any_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(5, 4, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(torch.tensor([1.0, 3.0, 0.1, 1.0, 0.0])[None, :, None, None])
    data = [torch.randn(20, 2, 4, 4), torch.randn(3, 2, 4, 4)]
    from autocompress.channels import channel_groups

    groups = channel_groups(model, data[0])
    found = unit_sensitivities(model, groups.prunable, data)
    x = torch.tanh(model[0](torch.cat(data))).detach()
    s, alpha = found["0"]
    np.testing.assert_allclose(s, by_hand(model[2], x), rtol=1e-5)  # type: ignore[arg-type]
    assert s[4] == 0.0
    assert alpha == pytest.approx(2 * math.log(8 * (4 + 1) * 9 / FAILURE))
    # A channel of 2 x 2 pixels that was flattened is as sensitive as the most sensitive of them.
    s, alpha = found["2"]
    assert s.shape == (4,)
    assert alpha == pytest.approx(2 * math.log(8 * 2 / FAILURE))
    y = torch.flatten(model[2](x), 1).detach().double().numpy()
    W, parts = model.get_parameter("4.weight").detach().double().numpy(), np.zeros(16)
    for row in y:
        for w in W:
            for inputs in (np.maximum(row, 0), np.maximum(-row, 0)):
                for signed in (np.maximum(w, 0), np.maximum(-w, 0)):
                    each = signed * inputs
                    parts = np.maximum(parts, each / each.sum() if each.sum() > 0 else 0.0)
    np.testing.assert_allclose(s, parts.reshape(4, 4).max(axis=1), rtol=1e-5)


def test_channels_needed_fall_with_the_error_and_with_concentration() -> None:
    even, peaked = np.full(16, 0.2), np.array([0.9] + [1e-4] * 15)
    counts = [channels_needed(even, 80.0, e) for e in (1e-3, 10.0, 30.0, 100.0, 1e9)]
    assert counts[0] == 16
    assert counts[-1] == 1
    assert counts == sorted(counts, reverse=True)
    assert channels_needed(peaked, 80.0, 10.0) < channels_needed(even, 80.0, 10.0)
    # By the formula: m draws out of 16 alike hit 16 (1 - (15/16)^m) of them on average.
    m = math.ceil(3 * (6 + 2 * 40.0) * 80.0 * 3.2 / 40.0**2)
    assert channels_needed(even, 80.0, 40.0) == math.ceil(16 * (1 - (15 / 16) ** m))
    assert channels_needed(np.zeros(4), 80.0, 1.0) == 1


def test_channels_can_be_ordered_by_their_sensitivity() -> None:
    model, data = convnet(), images()
    stats = ac.calibrate(model, data)
    found = widths(model, data[0], stats, score="pfp", batches=data)
    s = unit_sensitivities(model, found.groups, [torch.cat(data)[:64]])["conv3"][0]
    assert set(found.kept["conv3"][50.0]) == set(np.argsort(s, kind="stable")[4:].tolist())
    with pytest.raises(OptionError, match="score 'pfp' needs batches of data"):
        widths(model, data[0], stats, score="pfp")


def test_profiles_without_narrower_layers_are_refused() -> None:
    for name in ("ft", "ft_global", "pfp"):
        with pytest.raises(MismatchError, match=f"strategy '{name}' sets a width .* --options default,channels"):
            STRATEGIES[name](small_profile()[2], Budget.parse("6x"), context())
    model, data = convnet(), images()
    stats = ac.calibrate(model, data)
    kept = widths(model, data[0], stats)
    some = profile(model, stats, options=["w4", "n75/100w4", "n100/75w8"], workers=1, channels=kept)
    with pytest.raises(MismatchError, match="no value, such as w4, that every layer has at all of its widths"):
        STRATEGIES["ft"](some, Budget.parse("6x"), None)
    assert narrower_values(grid_profile()[2], "ft") == [Option.parse("w4"), Option.parse("w2")]
    with pytest.raises(MismatchError, match="strategy 'pfp' runs the model: give a context"):
        STRATEGIES["pfp"](grid_profile()[2], Budget.parse("6x"), None)


@pytest.mark.parametrize("name", ["ft", "ft_global", "pfp", "cc"])
def test_milliseconds_of_narrower_layers_are_refused(name: str) -> None:
    found = grid_profile()[2]
    times = {n: dict.fromkeys([row.option for row in layer.rows], 0.0) for n, layer in found.layers.items()}
    timed = dataclasses.replace(found, latency=Latency(1.0, times, [], {}))
    with pytest.raises(BudgetError, match=f"strategy '{name}' makes layers narrower, and there is no table of millis"):
        ac.plan(timed, "400, latency_ms=120%", name, context())
    assert ac.plan(timed, "400, latency_ms=120%", "exact").strategy.startswith("exact")


def test_rules_read_a_narrower_network_where_they_plan_one() -> None:
    """Shapes and weights are those of the network with these channels cut out, a grouped convolution among them."""
    model, _, found = grid_profile()
    assert found.widths is not None
    structure = {"conv1": 25.0, "conv3": 50.0}
    part, small = found.at(structure), narrow(model, found.widths.units(structure), found.widths.groups)
    own = {name: small.get_submodule(name).weight.detach().double().numpy() for name in found.layers}  # type: ignore[operator]
    assert {name: part.shape(name) for name in part.layers} == {name: w.shape for name, w in own.items()}
    assert [own[name].shape[0] for name in ("conv1", "conv2", "conv3")] == [2, 2, 4]
    for name, weight in weights_of(part, context(), "a rule").items():
        layer = Layer(name, (name,), own[name].shape, small.get_submodule(name).groups if name == "conv2" else 1)  # type: ignore[arg-type]
        np.testing.assert_array_equal(weight, layer.matrix(own[name]))
    whole = {name: tuple(model.get_parameter(f"{name}.weight").shape) for name in found.layers}
    assert all({name: each.shape(name) for name in found.layers} == whole for each in (found, found.joint()))
    # The rules see nothing else.
    shapes = {name: w.shape for name, w in own.items()}
    assert erk_densities_of(part, None)(0.3) == erk_densities(shapes, 0.3) != erk_densities_of(found, None)(0.3)
    limits = limits_of(Budget(size=430), part)
    walk = Walk(part, limits, undominated(part, limits))
    assert walk.sizes.tolist() == [w.size for w in own.values()]
    assert all(
        rows[i].nonzero <= n for n, rows, some in zip(walk.sizes, walk.rows, walk.options, strict=True) for i in some
    )
    assert ac.plan(part, 430, "itpruner", context()).predicted_bytes <= 430


def test_too_small_a_budget_names_the_size_of_the_narrowest() -> None:
    found = grid_profile()[2]
    with pytest.raises(InfeasibleError, match="no choice of strategy 'ft'") as caught:
        STRATEGIES["ft"](found, Budget(size=100), None)
    assert set(structure_of(STRATEGIES["ft"](found, Budget(size=caught.value.smallest_bytes), None)).values()) == {25.0}
