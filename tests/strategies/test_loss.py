"""Losses of single layers: what is measured, and what lies between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import images, profiled, small_profile
from torch import nn
from torch.nn import functional as F

import autocompress as ac
from autocompress.applying import realise_layers, with_weights
from autocompress.batches import feed
from autocompress.measuring import divergence, logits
from autocompress.strategies.loss import LayerLoss, along_errors, levels


def task_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("labelled", [False, True])
def test_points_are_what_the_loss_does_with_one_layer_compressed(labelled: bool) -> None:
    model, data, found = small_profile()
    training = [[x, torch.arange(len(x)) % 5] for x in images(seed=3)]
    context = ac.Context(model, data, loss=task_loss, training=training) if labelled else ac.Context(model, data)
    points = LayerLoss(samples=24).measured(found, context)
    assert context.evaluations == sum(map(len, points.values()))
    x = torch.cat([b[0] for b in training[:2]] if labelled else context.fit)[:24]
    y = torch.cat([b[1] for b in training[:2]])

    def loss(small: nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(small(x), y))

    stored = with_weights(model, found, {}, None)
    for name, layer in found.layers.items():
        rows = levels(layer, 12)
        assert [error for error, _ in points[name]] == [row.error for row in rows]
        for row, (_, rise) in zip(rows, points[name], strict=True):
            weight = realise_layers(model, found, {name: row.option})[name].weight()
            small = with_weights(model, found, {name: weight}, None)
            if labelled:
                assert rise == pytest.approx(loss(small) - loss(stored), abs=1e-6)
            else:
                with torch.no_grad():
                    expected = divergence(logits(feed(stored, x)), logits(feed(small, x)))
                assert rise == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_levels_lie_along_the_shortest_options() -> None:
    layer = small_profile()[2].layers["conv1"]
    rows = levels(layer, 12)
    errors, sizes = [r.error for r in rows], [r.bytes for r in rows]
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)
    assert min(layer.rows, key=lambda r: r.bytes) in rows
    assert len(levels(layer, 2)) == 2
    for row in rows:
        assert not any(r.error <= row.error and r.bytes < row.bytes and r != row for r in layer.rows)


def test_losses_between_points_are_monotone_and_go_through_them() -> None:
    points = [[1.0, 0.01], [10.0, 0.2], [100.0, 8.0]]
    assert along_errors(np.array([1.0, 10.0, 100.0]), points) == pytest.approx([0.01, 0.2, 8.0])
    # A straight line in logarithms between, in proportion outside.
    found = along_errors(np.array([0.0, 0.5, 10**0.5, 200.0]), points)
    assert found == pytest.approx([0.0, 0.005, (0.01 * 0.2) ** 0.5, 16.0])
    errors = np.geomspace(1e-3, 1e3, 50)
    noisy = along_errors(errors, [[1.0, 0.02], [2.0, 0.01], [4.0, -0.3], [8.0, 0.5]])
    assert (np.diff(noisy) >= 0.0).all()
    assert noisy[0] > 0.0
    assert along_errors(errors, []).tolist() == [0.0] * 50
    assert along_errors(errors, [[1.0, -0.1]]).tolist() == [0.0] * 50


def test_the_dense_model_is_left_alone_and_points_are_kept(tmp_path: Path) -> None:
    model, data, _ = small_profile()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = profiled(model, data, store=tmp_path)
    first, second = ac.Context(model, data), ac.Context(model, data)
    plan = LayerLoss()(found, ac.Budget(ratio=6.0), first)
    assert LayerLoss()(found, ac.Budget(ratio=6.0), second) == plan
    assert (first.evaluations, second.evaluations) == (sum(map(len, LayerLoss().measured(found, first).values())), 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_labelled_batches_are_taken_once() -> None:
    model, data, _ = small_profile()
    given = iter([[x, torch.zeros(len(x)).long()] for x in images()])
    context = ac.Context(model, data, loss=task_loss, training=given)
    assert len(context.labelled(20)) == 2
    assert len(context.labelled(5)) == 1
    assert [len(b[0]) for b in context.labelled(1000)] == [12] * 5
    assert ac.Context(model, data, training=[[data[0], data[0]]]).labelled(5) == []
    assert ac.Context(model, data, loss=task_loss).labelled(5) == []


def test_another_loss_on_the_same_batches_is_measured_anew(tmp_path: Path) -> None:
    model, data, _ = small_profile()
    found = profiled(model, data, store=tmp_path)
    training = [[x, torch.zeros(len(x)).long()] for x in images()]

    def doubled(model: nn.Module, batch: Any) -> torch.Tensor:
        return 2.0 * task_loss(model, batch)

    once, twice = (ac.Context(model, data, loss=loss, training=training) for loss in (task_loss, doubled))
    first, second = LayerLoss(levels=2).measured(found, once), LayerLoss(levels=2).measured(found, twice)
    for name in found.layers:
        assert [r for _, r in second[name]] == pytest.approx([2.0 * r for _, r in first[name]])
