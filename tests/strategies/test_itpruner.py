"""CKA, importances and the two programmes of ITPruner."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from networks import kinds, profiled, small_profile

import autocompress as ac
from autocompress.errors import CalibrationError
from autocompress.strategies.itpruner import (
    ItPruner,
    features,
    importances,
    kept_linear,
    kept_quadratic,
    linear_cka,
)


def test_cka_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 7)), rng.normal(size=(30, 4))
    found = linear_cka([x, y, None, np.ones((30, 2))])
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(a.T @ b) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert found[0, 1] == pytest.approx(expected) == found[1, 0]
    assert found[0, 0] == pytest.approx(1.0)
    assert np.isnan(found[2]).all()
    assert found[0, 3] == 0.0
    # Neither turning the features nor scaling them changes it.
    turn = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    assert linear_cka([3.0 * x @ turn + 1.0, y])[0, 1] == pytest.approx(expected)


def test_importance_falls_with_resemblance() -> None:
    cka = np.array([[1.0, 0.9, 0.8], [0.9, 1.0, 0.1], [0.8, 0.1, 1.0]])
    found = importances(cka)
    a = np.array([1.7, 1.0, 0.9]) / 3.6
    beta = np.log(10.0) / (a[0] - a[2])
    assert found == pytest.approx(np.exp(-beta * (a - a[2])))
    assert found.max() / found.min() == pytest.approx(10.0)
    assert importances(np.ones((3, 3))).tolist() == [1.0, 1.0, 1.0]
    unseen = np.full((3, 3), np.nan)
    unseen[:2, :2] = [[1.0, 0.5], [0.5, 1.0]]
    assert importances(unseen).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(CalibrationError, match="no layer puts out one value per sample"):
        importances(np.full((2, 2), np.nan))


def test_features_are_outputs_of_layers() -> None:
    model, data, found = small_profile()
    outputs = features(ac.Context(model, data), found)
    x = torch.cat(ac.Context(model, data).fit)[:100]
    with torch.no_grad():
        expected = model.get_submodule("conv1")(x)
    assert outputs[0] is not None
    np.testing.assert_allclose(outputs[0], expected.reshape(len(x), -1).numpy())
    assert [o is not None and len(o) == len(x) for o in outputs] == [True] * 4
    assert not any(module._forward_hooks for module in model.modules())


def test_the_linear_programme_is_a_fractional_knapsack() -> None:
    importance, size, least = np.array([1.0, 3.0, 2.0]), np.array([10.0, 10.0, 40.0]), np.array([0.1, 0.1, 0.1])
    # The floors take 6; the second layer is worth most per byte, then the first, then the third.
    assert kept_linear(importance, size, least, 6.0 + 9.0 + 4.5) == pytest.approx([0.55, 1.0, 0.1])
    assert kept_linear(importance, size, least, 100.0) == pytest.approx([1.0, 1.0, 1.0])
    assert kept_linear(importance, size, least, 1.0).tolist() == least.tolist()


def test_the_quadratic_programme_is_near_the_best_of_a_grid() -> None:
    importance, size = np.array([1.0, 0.2, 0.6]), np.array([2.0, 5.0, 8.0])
    grid = np.linspace(0.02, 1.0, 50)
    for budget in (1.0, 3.0, 8.0):
        best = max(
            float(importance @ x)
            for x in map(np.array, itertools.product(grid, grid, grid))
            if size[0] * x[0] + size[1] * x[0] * x[1] + size[2] * x[1] * x[2] <= budget
        )
        shares = kept_quadratic(importance, size, np.zeros(3), budget)
        assert size @ shares <= budget * (1 + 1e-9)
        x = [shares[0], shares[1] / shares[0], shares[2] / shares[1] * shares[0]]
        assert importance @ x >= 0.999 * best
    assert kept_quadratic(importance, size, np.zeros(3), 15.0) == pytest.approx([1.0, 1.0, 1.0])


def test_layers_without_outputs_of_their_own_get_a_plan_too() -> None:
    model, data = kinds()
    found = profiled(model, data, ["w4", "w8"])
    for quadratic in (False, True):
        plan = ItPruner(quadratic)(found, ac.Budget(ratio=5.0), ac.Context(model, data))
        assert plan.predicted_bytes <= found.template.dense_bytes // 5
