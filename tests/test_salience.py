"""Which channels go first: greedy OBS against the engine's own order and against brute force, and the other scores."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from networks import batches, seeded
from test_channels import Concat, Lopsided, Separable
from torch import nn

import autocompress as ac
from autocompress import digits
from autocompress.calibration import Statistics
from autocompress.errors import LayerError, MismatchError, OptionError
from autocompress.narrowing import ChannelGroup
from autocompress.obs import unit_trace
from autocompress.salience import SCORES, _count, obs_order, widths


@cache
def calibrated() -> tuple[nn.Module, list[torch.Tensor], Statistics]:
    model, data = digits.model(), digits.calibration()[:2]
    return model, data, ac.calibrate(model, data)


def reader(seed: int, rows: int, units: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    d = units * width
    X = rng.standard_normal((d, 3 * d)) * rng.uniform(0.2, 2.0, d)[:, None]
    return rng.standard_normal((rows, d)), X @ X.T / (3 * d), np.repeat(np.arange(units), width)


def removal_error(W: np.ndarray, H: np.ndarray, gone: np.ndarray) -> float:
    """½ tr(ΔW H ΔWᵀ) of the best weight without these columns: the Schur complement of H on them."""
    stay = ~gone
    schur = H[np.ix_(gone, gone)] - H[np.ix_(gone, stay)] @ np.linalg.solve(
        H[np.ix_(stay, stay)], H[np.ix_(stay, gone)]
    )
    return 0.5 * float(np.trace(W[:, gone] @ schur @ W[:, gone].T))


def test_for_one_reader_the_order_is_that_of_the_engine() -> None:
    W, H, units = reader(0, 5, 6, 3)
    engine = unit_trace(W, H, np.arange(18).reshape(6, 3), rows=5, threads=1)
    assert obs_order([(W, H, units)], 6) == engine.order.reshape(-1).tolist()


def test_over_several_readers_each_step_costs_the_least_relative_error() -> None:
    readers = [reader(1, 4, 5, 2), reader(2, 7, 5, 4), reader(3, 3, 5, 1)]
    order = obs_order(readers, 5)
    gone: list[int] = []
    for step in order[:-1]:
        costs = {
            unit: sum(
                removal_error(W, H, np.isin(units, [*gone, unit])) / (0.5 * float(np.trace(W @ H @ W.T)))
                for W, H, units in readers
            )
            for unit in range(5)
            if unit not in gone
        }
        assert step == min(costs, key=lambda unit: costs[unit])
        gone.append(step)


def test_what_stays_at_a_lower_level_stays_at_a_higher_one_and_counts_are_rounded() -> None:
    model, data, stats = calibrated()
    found = widths(model, data[0], stats)
    assert found.levels["blocks.1.conv2"] == (100.0, 75.0, 50.0, 25.0)
    assert found.ends["blocks.2.conv2"] == ("blocks.2.conv1", "blocks.1.conv2")
    assert found.ends["linear"] == ("blocks.1.conv2", "")
    for name, levels in found.kept.items():
        size = found.groups[name].size
        assert [len(levels[level]) for level in (75.0, 50.0, 25.0)] == [size * 3 // 4, size // 2, size // 4]
        assert all(set(b) < set(a) for a, b in itertools.pairwise(levels[level] for level in (75.0, 50.0, 25.0)))
    rounded = widths(model, data[0], stats, levels=(60, 10), round_to=8)
    assert {len(levels[60.0]) for levels in rounded.kept.values()} == {8, 16}
    assert {len(levels[10.0]) for levels in rounded.kept.values()} == {8}
    assert type(found).from_json(found.to_json()) == found


def test_something_of_every_layer_stays_and_units_are_whole() -> None:
    data = batches(2, 4, 4)
    model = seeded(Concat)
    found = widths(model, data[0], ac.calibrate(model, data), levels=(10,))
    for group in found.groups:
        for axis in group.axes:
            assert axis.kept(found.kept[group.name][10.0])
    data = batches(3, 6, 6)
    model = seeded(Separable)
    found = widths(model, data[0], ac.calibrate(model, data), levels=(50,), round_to=4)
    assert len(found.kept["point"][50.0]) == 2  # units of two channels
    assert [_count(ChannelGroup("g", 64, (), (), (), 6), level, 4) for level in (75, 50, 25)] == [48, 32, 16]
    assert [_count(ChannelGroup("g", 16, (), (), (), 3), level, 8) for level in (75, 50, 25)] == [16, 8, 8]
    # A depthwise convolution's inputs are its outputs: it has one level, on the side of the rows.
    assert found.ends["depth"] == ("", "point")
    assert found.ends["mix"] == ("point", "mix")


def test_norms_and_gradients_order_channels_by_their_own_formula() -> None:
    model, data, stats = calibrated()
    group = "blocks.0.conv1"
    weight = model.get_parameter(f"{group}.weight").detach()
    by_norm = widths(model, data[0], stats, "l1", levels=(50,)).kept[group][50.0]
    assert set(by_norm) == set(weight.abs().sum((1, 2, 3)).topk(8).indices.tolist())
    labelled = list(itertools.islice(digits.training(), 2))
    by_slope = widths(model, data[0], stats, "taylor", (50,), batches=labelled, loss=digits.loss).kept[group][50.0]
    copy = seeded(digits.DigitsNet)
    copy.load_state_dict(model.state_dict())
    own, slopes = copy.get_parameter(f"{group}.weight"), torch.zeros(16, dtype=torch.float64)
    for batch in labelled:  # batch by batch, as their mean is near nothing
        (slope,) = torch.autograd.grad(digits.loss(copy, batch), [own])
        slopes += (own.detach() * slope).double().sum((1, 2, 3)) ** 2
    assert set(by_slope) == set(slopes.topk(8).indices.tolist())
    assert all(parameter.requires_grad for parameter in copy.parameters())


def test_what_another_channel_says_too_goes_first() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)))
    first = model.get_parameter("0.weight")
    with torch.no_grad():
        first.zero_()
        first[0, 0] = first[2, 1] = first[3, 2] = 1.0
        first[1, 0] = -2.0  # the same as channel 0, to scale
    data = batches(6)
    found = widths(model, data[0], ac.calibrate(model, data), "cka", (75, 50), batches=data)
    assert {0, 1} & set(found.kept["0"][50.0]) == set()
    assert len({0, 1} & set(found.kept["0"][75.0])) == 1


def test_what_scores_refuse() -> None:
    model, data, stats = calibrated()
    assert set(SCORES) == {"obs", "l1", "taylor", "cka", "pfp"}
    with pytest.raises(OptionError, match="score is 'l2'; it is one of obs, l1, taylor, cka, pfp"):
        widths(model, data[0], stats, "l2")
    with pytest.raises(OptionError, match="'taylor' needs labelled batches and the task's loss"):
        widths(model, data[0], stats, "taylor", batches=data)
    with pytest.raises(OptionError, match="'cka' needs batches"):
        widths(model, data[0], stats, "cka")
    with pytest.raises(OptionError, match="level 0: a level is above 0"):
        widths(model, data[0], stats, levels=(50, 0))
    with pytest.raises(OptionError, match="round_to is 0"):
        widths(model, data[0], stats, round_to=0)
    with pytest.raises(MismatchError, match="field 'model'"):
        widths(seeded(digits.DigitsNet), data[0], stats)
    odd, tokens = seeded(Lopsided), batches(4)
    with pytest.raises(LayerError, match=r"no channel of the model can go .*something beside its layers"):
        widths(odd, tokens[0], ac.calibrate(odd, tokens))
