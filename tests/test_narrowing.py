"""Narrower networks from profile to file and back: structures, their plans, exact sizes, what is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import batches, seeded
from test_channels import Separable, Transformer
from test_salience import removal_error
from torch import nn

import autocompress as ac
from autocompress import digits
from autocompress.channels import channel_groups, narrow
from autocompress.errors import CalibrationError, MismatchError, OptionError
from autocompress.exporting import export
from autocompress.narrowing import Widths
from autocompress.planning import running_cost, single_options
from autocompress.profiling import Profile, load_profile
from autocompress.salience import widths
from autocompress.saving import fill, load
from autocompress.strategies import STRATEGIES
from autocompress.types import Budget, Option, Plan

INNER = ("w4", "s60w4", "w8", "tcq(0.34,0.4)", "rd(0.5,0.3)s60")
OPTIONS = [*INNER, *(f"n{a}/{b}{o}" for a, b in ((50, 50), (50, 100), (100, 50)) for o in INNER), "n50/50", "n100/50"]


@functools.cache
def digits_profile() -> tuple[nn.Module, list[torch.Tensor], Profile]:
    model, data = digits.model(), digits.calibration()[:3]
    stats = ac.calibrate(model, data)
    options = [Option.parse(name) for name in OPTIONS]
    found = ac.profile(model, stats, options=options, channels=widths(model, data[0], stats), workers=1)
    return model, data, found


def half(found: Profile) -> dict[str, float]:
    return {group: 50.0 for group in found.levels()}


def planned(found: Profile, budget: int | str, strategy: str = "exact") -> Plan:
    return ac.plan(found.at(half(found)), budget, strategy)


def with_option(plan: Plan, layer: str, option: str) -> Plan:
    return plan.replace(layers={**plan.layers, layer: Option.parse(option)})


def test_without_a_structure_nothing_is_narrower() -> None:
    model, _, found = digits_profile()
    plain = ac.profile(model, found.statistics, options=list(INNER), workers=1)
    for name, layer in found.layers.items():
        assert layer.rows == plain.layers[name].rows
        assert {row.option.width for row in layer.narrowed} <= {(50, 50), (50, 100), (100, 50)}
    assert all(option.width is None for option in ac.plan(found, 12_000).layers.values())
    assert ac.plan(found, 12_000).layers == ac.plan(plain, 12_000).layers
    assert plain.levels() == {}
    assert set(plain.links()["conv1"]) == {("", 100.0, "", 100.0)}


def test_links_say_what_each_row_needs() -> None:
    _, _, found = digits_profile()
    links = found.links()
    for name, layer in found.layers.items():
        for row, link in zip((*layer.rows, *layer.narrowed), links[name], strict=True):
            below, above = row.option.width or (100.0, 100.0)
            assert (link[1], link[3]) == (below, above)
    assert links["blocks.1.shortcut.0"][0] == ("conv1", 100.0, "blocks.1.conv2", 100.0)
    assert {link[2:] for link in links["linear"]} == {("", 100.0)}
    # Only what can be had of a layer is measured: its last outputs are what the model returns.
    assert {row.option.width for row in found.layers["linear"].narrowed} == {(50, 100)}
    assert found.levels()["conv1"] == (100.0, 75.0, 50.0, 25.0)


def test_error_is_that_of_the_rows_that_stay() -> None:
    model, _, found = digits_profile()
    layer, stats = found.layers["blocks.2.conv1"], found.statistics.layers["blocks.2.conv1"]
    assert found.widths is not None
    weight = model.get_parameter(layer.layer.key).detach().double().numpy().reshape(32, 32, 9)
    columns = found.widths.kept["blocks.1.conv2"][50.0]
    rows = found.widths.kept["blocks.2.conv1"][50.0]
    gone = np.setdiff1d(np.arange(288), (np.array(columns)[:, None] * 9 + np.arange(9)).reshape(-1))
    kept_rows = weight.reshape(32, 288)[list(rows)]
    removal = removal_error(kept_rows, stats.hessian[0], np.isin(np.arange(288), gone))
    np.testing.assert_allclose(layer.row(Option.parse("n50/50")).error, removal, rtol=1e-5)
    # Compression adds an error of its own, of what was refitted.
    assert layer.row(Option.parse("n50/50w8")).error > removal
    assert layer.row(Option.parse("n50/50w4")).error > layer.row(Option.parse("n50/50w8")).error


@pytest.mark.parametrize(
    "strategy", ["exact", "uniform", "greedy", "lagrangian", "dp", "raw", "uniform_bits", "uniform_sparsity", "erk"]
)
def test_every_strategy_plans_on_a_structure(strategy: str) -> None:
    _, _, found = digits_profile()
    plan = planned(found, 6000, strategy)
    assert plan.predicted_bytes <= 6000
    assert plan.fingerprint == found.fingerprint
    assert {option.width for option in plan.layers.values()} == {(50, 50), (50, 100), (100, 50)}


@pytest.mark.parametrize("budget", [3300, 4400, 6000])
def test_a_plan_at_half_width_goes_through_a_file_and_back(tmp_path: Path, budget: int) -> None:
    model, data, found = digits_profile()
    plan = planned(found, budget)
    small = ac.apply(model, plan, found, data)
    info = ac.save(small, plan, tmp_path / "model.acz")
    assert info.bytes == plan.predicted_bytes <= budget
    assert small.get_submodule("blocks.1.shortcut.0").in_channels == 8
    assert small.get_submodule("blocks.1.bn2").num_features == 16
    assert all(parameter.shape[0] == 16 for parameter in small.get_submodule("blocks.2.bn1").parameters())
    x = torch.cat(data)
    assert small(x).argmax(1).eq(model(x).argmax(1)).float().mean() > 0.9
    for packed in (False, True, "bits"):
        back = load(tmp_path / "model.acz", digits.model(), packed=packed)
        assert torch.equal(back(x), small(x))
    assert running_cost(found, "macs", plan.layers) < 0.3 * running_cost(found, "macs", ac.plan(found, 12_000).layers)
    bigger = ac.load(tmp_path / "model.acz")
    assert isinstance(bigger, dict)
    assert bigger["blocks.2.conv1.weight"].shape == (16, 16, 3, 3)


def test_the_file_of_any_structure_has_the_length_that_was_predicted(tmp_path: Path) -> None:
    model, data, found = digits_profile()
    generator = np.random.default_rng(0)
    for number in range(4):
        structure = {group: float(generator.choice([100.0, 50.0])) for group in found.levels()}
        plan = ac.plan(found.at(structure), 12_000)
        assert found.widths is not None
        assert found.widths.structure_of(plan.layers) == structure
        rows = {name: found.layers[name].row(option) for name, option in plan.layers.items()}
        at = found.with_vectors(plan.vector_bits)
        assert at.template.file_bytes(rows) == plan.predicted_bytes  # from the whole profile too
        info = ac.save(ac.apply(model, plan, found, data), plan, tmp_path / f"{number}.acz")
        assert info.bytes == plan.predicted_bytes


def test_statistics_are_corrected_on_the_channels_that_stay() -> None:
    model, data, found = digits_profile()
    plan = planned(found, 6000)
    x = torch.cat(data)

    def spread(network: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        kept: list[torch.Tensor] = []
        handle = network.get_submodule(name).register_forward_hook(lambda m, a, y: kept.append(y.detach()))
        network(x)
        handle.remove()
        return kept[0].mean((0, 2, 3)), kept[0].std((0, 2, 3))

    assert found.widths is not None
    stay = list(found.widths.kept["blocks.1.conv2"][50.0])
    wanted = [part[stay] for part in spread(model, "blocks.2.bn2")]
    plain, corrected = (spread(ac.apply(model, plan, found, d), "blocks.2.bn2") for d in (None, data))
    for before, after, target in zip(plain, corrected, wanted, strict=True):
        assert float((after - target).abs().mean()) < 0.3 * float((before - target).abs().mean())


def test_a_plan_whose_widths_disagree_is_refused() -> None:
    model, _, found = digits_profile()
    plan = planned(found, 6000)
    with pytest.raises(MismatchError, match=r"group 'conv1': layer 'conv1' .* 50 % .*'blocks\.0\.conv1' with 100"):
        ac.apply(model, with_option(plan, "blocks.0.conv1", "n100/50w4"), found)
    with pytest.raises(MismatchError, match="option 'n50/50w4': layer 'linear' has a fixed width on that side"):
        ac.apply(model, with_option(plan, "linear", "n50/50w4"), found)
    with pytest.raises(MismatchError, match=r"no level 60; it has 100, 75, 50, 25"):
        found.at({"conv1": 60.0})
    with pytest.raises(MismatchError, match="there is no channel group 'linear'"):
        found.at({"linear": 50.0})
    with pytest.raises(MismatchError, match="'conv1' has no option at these widths"):
        found.at({"conv1": 75.0})
    with pytest.raises(OptionError, match="'n50/50w4' needs channels="):
        ac.profile(model, found.statistics, options=["n50/50w4"])
    plain = ac.profile(model, found.statistics, options=["w4"], workers=1)
    with pytest.raises(MismatchError, match="this profile has no narrower layers"):
        plain.at({"conv1": 50.0})
    with pytest.raises(CalibrationError, match="not compressed one after another yet"):
        ac.apply_sequentially(model, plan, found, digits_profile()[1])


def test_a_narrower_file_of_another_architecture_is_refused_and_the_model_stays(tmp_path: Path) -> None:
    model, data, found = digits_profile()
    plan = planned(found, 6000)
    ac.save(ac.apply(model, plan, found, data), plan, tmp_path / "model.acz")
    other = digits.model()
    other.linear = nn.Linear(32, 5)
    before = str(other)
    with pytest.raises(MismatchError, match=r"'linear.weight' is \(10, 16\) in the file and \(5, 32\) in the model"):
        load(tmp_path / "model.acz", other)
    assert str(other) == before
    # A file of full width does not narrow a wider network.
    whole = ac.plan(found, 12_000)
    ac.save(ac.apply(model, whole, found, data), whole, tmp_path / "whole.acz")
    wide = digits.model()
    wide.linear = nn.Linear(32, 12)
    with pytest.raises(MismatchError, match="belongs to another architecture"):
        load(tmp_path / "whole.acz", wide)


def test_a_store_remembers_which_channels_stay(tmp_path: Path) -> None:
    model, data, found = digits_profile()
    options = ["w4", "n50/50w4", "n100/50w4", "n50/100w4"]
    kept = ac.profile(model, found.statistics, tmp_path, options, workers=1, channels=found.widths)
    again = load_profile(tmp_path)
    assert again.fingerprint == kept.fingerprint
    assert again.widths == found.widths
    plan = ac.plan(again.at(half(again)), 6000)
    one, other = (ac.apply(model, plan, profile, data) for profile in (kept, again))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    changed = widths(model, data[0], found.statistics, "l1")
    with pytest.raises(MismatchError, match=r"field 'channels'.* other channels kept"):
        ac.profile(model, found.statistics, tmp_path, options, workers=1, channels=changed)


def at_half(profile: Profile, budget: Budget, context: ac.Context | None) -> Plan:
    return STRATEGIES["exact"](profile.at(half(profile)), budget, context)


def test_compress_verify_and_export_take_a_strategy_that_narrows(tmp_path: Path) -> None:
    options: list[Option | str] = ["w4", "w8", "n50/50w4", "n50/100w4", "n100/50w4", "n50/50w8"]
    result = ac.compress(
        digits.model(),
        digits.calibration()[:3],
        Budget.parse("5000, macs=40%"),
        strategy=at_half,
        effort="fast",
        options=options,
        out=tmp_path,
        workers=1,
    )
    assert result.metrics["costs"]["macs"]["predicted"] <= 0.4 * result.metrics["costs"]["macs"]["dense"]
    assert ac.verify(tmp_path).good
    export(tmp_path, digits.model(), "safetensors", tmp_path / "x.safetensors")
    export(result.model, None, "safetensors", tmp_path / "y.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_single_options_of_a_structure_are_the_same_on_what_stays() -> None:
    _, _, found = digits_profile()
    plans = single_options(found.at(half(found)), 10**6, undominated=False)
    assert {row.option.inner for plan in plans for row in plan.values()} >= {Option.parse(name) for name in INNER}
    assert all(len({row.option.inner for row in plan.values()}) == 1 for plan in plans)


def test_a_narrower_grouped_convolution_lacks_whole_groups() -> None:
    network = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 2, 1))
    before = str(network)
    for shape in ((5, 2, 3, 3), (4, 1, 3, 3), (4, 2, 1, 3)):
        tensors = network.state_dict() | {"0.weight": torch.zeros(shape)}
        with pytest.raises(MismatchError, match=re.escape(f"'0.weight' is {shape} in the file")):
            fill(network, tensors, "a file", narrower=True)
    assert str(network) == before
    tensors = {"0.weight": torch.ones(4, 2, 3, 3), "0.bias": torch.ones(4), "1.weight": torch.ones(2, 4, 1, 1)}
    found = fill(network, tensors | {"1.bias": torch.ones(2)}, "a file", narrower=True)
    assert (found[0].groups, found[0].in_channels, found[1].in_channels) == (2, 4, 4)  # type: ignore[index]
    assert found(torch.ones(1, 4, 3, 3)).flatten().tolist() == [77.0, 77.0]


@pytest.mark.parametrize("build", [Separable, Transformer])
def test_units_of_several_channels_and_norms_over_channels_go_through_a_file(tmp_path: Path, build: type) -> None:
    """Depthwise and transposed convolutions, group norms, slopes; heads, layer norms, embeddings of positions."""
    model = seeded(build)
    data = batches(*((3, 6, 6) if build is Separable else (5, 6)))
    stats = ac.calibrate(model, data)
    kept = widths(model, data[0], stats, levels=(50,))
    options: list[Option | str] = ["w8", "n50/50w8", "n50/100w8", "n100/50w8"]
    found = ac.profile(model, stats, options=options, channels=kept, workers=1)
    for structure in ({name: 50.0} for name in kept.kept):
        plan = ac.plan(found.at(structure), 10**6)
        small = ac.apply(model, plan, found, data)
        ac.save(small, plan, tmp_path / "model.acz")
        back = ac.load(tmp_path / "model.acz", seeded(build, seed=3))
        assert str(back) == str(narrow(model, kept.units(structure), kept.groups))
        assert torch.equal(back(data[0]), small(data[0]))


def test_widths_of_groups_that_are_not_there_are_refused() -> None:
    model = digits.model()
    groups = channel_groups(model, digits.example_input())
    found = Widths(groups, {"conv1": {50.0: tuple(range(8))}}, {"conv1": ("", "conv1")})
    layer = dataclasses.replace(digits_profile()[2].layers["conv1"].layer)
    columns, rows = found.cuts(layer)
    assert columns == {}
    assert rows[50.0].tolist() == list(range(8))
