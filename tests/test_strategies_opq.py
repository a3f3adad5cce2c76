"""OPQ's closed forms against numeric optima, on drawn Laplace weights where sampling allows."""

from __future__ import annotations

import numpy as np
import pytest
from networks import convnet, grid_profile, images, profiled
from scipy.integrate import quad
from scipy.optimize import minimize
from test_strategies_densities import ruled

import autocompress as ac
from autocompress.planning import within
from autocompress.profiling import Profile
from autocompress.strategies.opq import laplace_bits, laplace_error, laplace_threshold

SIZE = {"a": 40_000, "b": 90_000, "c": 20_000}
TAU = {"a": 1.0, "b": 0.3, "c": 2.5}


def drawn() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {n: generator.laplace(scale=TAU[n], size=SIZE[n]) for n in SIZE}


def kept_shares(scores: dict[str, np.ndarray], density: float) -> dict[str, float]:
    """Of all scores the largest are kept: what greedy, exact for equal costs, leaves of each layer."""
    every = np.sort(np.concatenate(list(scores.values())))[::-1]
    least = every[round(density * every.size) - 1]
    return {n: float((each >= least).mean()) for n, each in scores.items()}


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
def test_the_least_pruning_error_has_one_threshold(density: float) -> None:
    beta = laplace_threshold(SIZE, TAU, density)
    predicted = {n: float(np.exp(-beta / TAU[n])) for n in TAU}
    assert sum(SIZE[n] * predicted[n] for n in SIZE) == pytest.approx(density * sum(SIZE.values()), rel=1e-9)
    assert kept_shares({n: w**2 for n, w in drawn().items()}, density) == pytest.approx(predicted, rel=0.03, abs=0.002)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
def test_of_errors_over_mean_squares_it_is_one_sparsity(density: float) -> None:
    shares = kept_shares({n: w**2 / np.mean(w**2) for n, w in drawn().items()}, density)
    assert shares == pytest.approx(dict.fromkeys(TAU, density), rel=0.06)
    beta = laplace_threshold(SIZE, dict.fromkeys(TAU, 1.0), density)
    assert np.exp(-beta) == pytest.approx(density, rel=1e-9)


@pytest.mark.parametrize(
    ("sparsity", "bits", "below"), [(0.0, 3, 0.18), (0.0, 6, 0.1), (50.0, 4, 0.06), (75.0, 3, 0.04), (90.0, 5, 0.02)]
)
def test_the_modelled_error_is_that_of_a_grid_with_the_best_range(sparsity: float, bits: int, below: float) -> None:
    """2^bits levels, each at the middle of its cell, on [-c, c] for the kept; all c are tried."""
    weights = np.random.default_rng(1).laplace(size=100_000)
    beta = -np.log(1.0 - sparsity / 100.0)
    kept = weights[np.abs(weights) >= beta]

    def error(clip: float) -> float:
        step = 2.0 * clip / 2**bits
        codes = np.clip(np.floor(kept / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        left = float(((kept - step * (codes + 0.5)) ** 2).sum())
        return (left + float((weights[np.abs(weights) < beta] ** 2).sum())) / weights.size

    best = min(error(clip) for clip in np.linspace(1.0, 12.0, 56))
    assert (1.0 - below) * best < laplace_error(sparsity, bits) < 1.02 * best


@pytest.mark.parametrize(("sparsity", "bits"), [(0.0, 2), (40.0, 3), (92.0, 8)])
def test_the_closed_form_of_the_range_is_the_minimum_of_the_model(sparsity: float, bits: int) -> None:
    kept = 1.0 - sparsity / 100.0
    pruned = quad(lambda w: w**2 * np.exp(-w), 0.0, -np.log(kept))[0]
    beyond = {c: quad(lambda w, c=c: (w - c) ** 2 * np.exp(-w), c, np.inf)[0] for c in np.linspace(0.5, 20.0, 400)}
    best = min(pruned + over + kept * (2.0 * c / 2**bits) ** 2 / 12.0 for c, over in beyond.items())
    assert laplace_error(sparsity, bits) == pytest.approx(best, rel=1e-3)
    assert laplace_error(sparsity, bits) <= best * (1 + 1e-12)


@pytest.mark.parametrize("step", [0.1, 0.3, 0.6])
def test_the_least_quantisation_error_has_one_step(step: float) -> None:
    """Numerically: least Σ N τ² error(b) for the bits Σ n b that a common step spends, b free in every layer."""
    beta = laplace_threshold(SIZE, TAU, 0.4)
    shares = {n: float(np.exp(-beta / TAU[n])) for n in TAU}
    predicted = np.array([laplace_bits(step / TAU[n], beta / TAU[n]) for n in TAU])
    counts = np.array([SIZE[n] * shares[n] for n in TAU])
    weights = np.array([SIZE[n] * TAU[n] ** 2 for n in TAU])
    sparsity = [100.0 * (1.0 - shares[n]) for n in TAU]

    def error(bits: np.ndarray) -> float:
        each = [laplace_error(s, b) for s, b in zip(sparsity, bits, strict=True)]
        return float(weights @ each) / weights.sum()

    start = np.full(3, counts @ predicted / counts.sum())
    spent = {"type": "eq", "fun": lambda bits: counts @ (bits - predicted) / counts.sum()}
    found = minimize(error, start, constraints=spent, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500})
    assert found.success
    assert found.x == pytest.approx(predicted, abs=0.02)
    assert abs(start - predicted).max() > 0.1


def test_bits_rise_as_the_step_falls_and_with_the_scale_of_a_layer() -> None:
    steps = np.geomspace(1e-3, 1e3, 200)
    bits = np.array([laplace_bits(float(step), 0.7) for step in steps])
    assert (np.diff(bits) < 0).all()
    assert laplace_bits(0.1 / 2.0) > laplace_bits(0.1)


def grid() -> Profile:
    return profiled(convnet(), images(), [f"{s}w{b}" for b in (2, 3, 4, 5) for s in ("", "s35", "s60", "s75", "s85")])


def test_one_sparsity_and_width_for_all_layers_if_errors_are_normalised_and_else_more_for_larger_weights() -> None:
    profile, context = grid(), ac.Context(*grid_profile()[:2])
    for budget in ("5x", "6.5x", "7.5x"):
        plan = ruled(profile, budget, "opq_energy", context)
        given = within(profile, plan.budget_bytes)
        fitting = {}  # by modelled error
        for option in (row.option for row in given.layers["conv1"].rows if row.option.bits):
            rows = {n: layer.row(option) for n, layer in given.layers.items()}
            if given.template.file_bytes(rows) <= plan.budget_bytes:
                fitting[laplace_error(option.sparsity, option.bits or 0)] = option
        assert set(plan.layers.values()) == {fitting[min(fitting)]}
    plan = ruled(profile, "8.2x", "opq", context)
    tau = {n: float(context.model.get_parameter(f"{n}.weight").detach().abs().mean()) for n in plan.layers}
    by_scale = [plan.layers[n] for n in sorted(tau, key=lambda n: tau[n])]
    assert [o.sparsity for o in by_scale] == sorted((o.sparsity for o in by_scale), reverse=True)
    assert [o.bits for o in by_scale] == sorted(o.bits or 0 for o in by_scale)
    assert len(set(by_scale)) > 1
