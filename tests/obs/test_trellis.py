"""Trellis-coded quantisation: exact where that can be checked, and smaller than scalar codes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autocompress import obs
from autocompress.storage import CODECS, coded_size

NEXT = ((0, 1), (3, 2), (5, 4), (6, 7), (1, 0), (2, 3), (4, 5), (7, 6))  # docs/format.md


def correlated(d: int, seed: int = 0) -> np.ndarray:
    """A damped Hessian of inputs that resemble their neighbours, as those of a convolution do."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((d, 4 * d))
    X = X + 0.8 * np.roll(X, 1, 0) + 0.5 * np.roll(X, 3, 0)
    H = 2.0 * X @ X.T / (4 * d)
    return H + 1e-2 * np.diag(H).mean() * np.eye(d)


def test_nothing_is_better_where_columns_do_not_interact() -> None:
    """With a diagonal Hessian and λ = 0 the Viterbi search is exact: compared with every sequence of the trellis."""
    rng = np.random.default_rng(1)
    W, step = rng.standard_normal((5, 5)), 0.5
    diagonal = rng.uniform(0.3, 3.0, 5)
    found = obs.trellis_codes(W, np.diag(diagonal), [(step, 0.0)], threads=1)[0]
    paths: list[tuple[tuple[int, ...], int]] = [((), 0)]
    for _ in range(5):
        paths = [
            ((*codes, q), NEXT[state][(abs(q) + state % 2) // 2 % 2])
            for codes, state in paths
            for q in range(-8, 9)
            if q % 2 == state % 2 or q == 0
        ]
    every = np.array([codes for codes, _ in paths])
    for row, codes in zip(W, found, strict=True):
        errors = ((every * step - row) ** 2 * diagonal).sum(axis=1)
        assert ((codes * step - row) ** 2 * diagonal).sum() == pytest.approx(errors.min(), rel=1e-5)


def test_rows_do_not_meet_and_threads_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    W, H = rng.standard_normal((20, 150)), correlated(150)  # 150 columns: more than are kept undecided
    grid = [(0.3, 0.0), (0.5, 0.4)]
    one = obs.trellis_codes(W, H, grid, threads=1)
    for codes, again in zip(one, obs.trellis_codes(W, H, grid, threads=3), strict=True):
        np.testing.assert_array_equal(codes, again)
    np.testing.assert_array_equal(obs.trellis_codes(W[7:9], H, grid[:1], threads=1)[0], one[0][7:9])


def far(d: int) -> np.ndarray:
    """Columns that resemble those half a row away: their errors are long decided when they are met."""
    rng = np.random.default_rng(6)
    X = rng.standard_normal((d, 4 * d))
    X[d // 2 :] = X[: d // 2] + 0.3 * X[d // 2 :]
    return 2.0 * X @ X.T / (4 * d)


@pytest.mark.parametrize("H", [correlated(90), far(180)], ids=["near", "far"])
def test_errors_are_fed_forward(H: np.ndarray) -> None:
    """Decisions that know of H lose far less than those that know its diagonal only."""
    W = np.random.default_rng(3).standard_normal((16, len(H)))
    with_feedback, without = (
        obs.layer_error(W, obs.trellis_codes(W, K, [(0.5, 0.0)], threads=1)[0] * 0.5, H)
        for K in (H, np.diag(np.diag(H)))
    )
    assert with_feedback < 0.75 * without, (with_feedback, without)


def test_groups_are_layers_of_their_own() -> None:
    rng = np.random.default_rng(4)
    W, H = rng.standard_normal((3, 4, 20)), np.stack([correlated(20, seed) for seed in range(3)])
    codes = obs.trellis_codes(W, H, [(0.4, 0.0)], threads=1)[0]
    for g in range(3):
        np.testing.assert_array_equal(codes[g], obs.trellis_codes(W[g], H[g], [(0.4, 0.0)], threads=1)[0])


@pytest.mark.parametrize(("step", "lam"), [(0.5, 0.1), (1.0, 0.1), (1.6, 0.1)])
def test_fewer_bytes_for_less_error_than_scalar_codes(step: float, lam: float) -> None:
    """At every rate some option is at least 3% smaller than a scalar one and loses no more."""
    rng = np.random.default_rng(5)
    W, H = rng.laplace(size=(48, 96)), correlated(96)
    W /= np.sqrt((W**2).mean())
    order, _ = obs.prune_trace(W, H, threads=1)
    scalar = obs.rd_quantise(W, H, order, np.zeros(48, int), step, lam, threads=1)
    limit, size = obs.layer_error(W, scalar * step, H), coded_size(scalar)
    grid = [(step * share, x) for share, x in itertools.product(np.arange(0.5, 0.68, 0.01), (0.25, 0.4))]
    found = obs.trellis_codes(W, H, grid, threads=1)
    fitting = [
        CODECS["trellis"].size(codes)
        for codes, (s, _) in zip(found, grid, strict=True)
        if obs.layer_error(W, codes * s, H) <= limit
    ]
    assert min(fitting) < 0.97 * size, (min(fitting), size)


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(ValueError, match="the Hessian is not positive definite; add damping"):
        obs.trellis_codes(np.ones((2, 2)), np.array([[1.0, 2.0], [2.0, 1.0]]), [(0.1, 0.1)])
