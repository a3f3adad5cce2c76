"""Hessians with a weight per row: what they reduce to, and what rows of unequal weight gain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autocompress import obs
from autocompress.obs import RowHessian

ROWS, D = 40, 24


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, D))


def shared(rank: int = 2 * D) -> np.ndarray:
    X = np.random.default_rng(1).standard_normal((D, rank))
    return X @ X.T / rank


def everything(W: np.ndarray, H: Any) -> dict[str, np.ndarray]:
    order, losses = obs.prune_trace(W, H, threads=1)
    counts = obs.pruned_counts(losses, 0.5)
    cells = obs.rate_distortion_cells(W, H, order, counts, [(0.5, 0.0)], threads=1)
    codes, refits = obs.salient_cells(W, H, order, counts, cells, threads=1)
    return {"order": order, "losses": losses, "counts": counts, "codes": codes, "refits": refits}


@pytest.mark.parametrize("c", [3.0, 1e-6, 1e6])
def test_equal_weights_are_a_multiple_of_the_identity(c: float) -> None:
    found, wanted = everything(weight(), RowHessian(np.full(ROWS, c))), everything(weight(), c * np.eye(D))
    for name in ("order", "counts", "codes"):
        np.testing.assert_array_equal(found[name], wanted[name])
    for name in ("losses", "refits"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)


def test_equal_weights_beside_a_shared_part_are_its_damping() -> None:
    found = everything(weight(), RowHessian(np.full(ROWS, 0.7), shared()))
    wanted = everything(weight(), shared() + 0.7 * np.eye(D))
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


@pytest.mark.parametrize("both", [False, True])
def test_the_error_is_the_sum_over_rows(both: bool) -> None:
    c = np.logspace(-3, 2, ROWS)
    H = RowHessian(c, shared() if both else None)
    delta = weight(2)
    rows = [0.5 * d @ ((shared() if both else 0.0) + w * np.eye(D)) @ d for d, w in zip(delta, c, strict=True)]
    assert obs.layer_error(weight(), weight() + delta, H) == pytest.approx(sum(rows), rel=1e-12)


@pytest.mark.parametrize("both", [False, True])
def test_losses_are_errors_and_rows_of_more_weight_keep_more(both: bool) -> None:
    """Exact where columns are on their own; with a shared part, weights within √2 of each other are taken for one."""
    c = np.logspace(-1, 1, ROWS)
    H = RowHessian(c, shared() if both else None)
    order, losses = obs.prune_trace(weight(), H, threads=1)
    counts = obs.pruned_counts(losses, 0.5)
    assert counts.sum() == ROWS * D // 2
    assert counts[: ROWS // 4].mean() > 1.5 * counts[-ROWS // 4 :].mean()
    error = obs.layer_error(weight(), obs.prune(weight(), H, order, counts, threads=1), H)
    recorded = sum(float(row[:n].sum()) for row, n in zip(losses, counts, strict=True))
    assert recorded == pytest.approx(error, rel=0.05 if both else 1e-9)
    # One weight for all rows, the mean, is a worse guess.
    plain = (shared() if both else 0.0) + c.mean() * np.eye(D)
    order, losses = obs.prune_trace(weight(), plain, threads=1)
    alike = obs.prune(weight(), plain, order, obs.pruned_counts(losses, 0.5), threads=1)
    assert error < 0.9 * obs.layer_error(weight(), alike, H)


def test_parts_cover_all_rows_once_and_are_close() -> None:
    c = np.logspace(-6, 3, ROWS)
    H = RowHessian(c, shared())
    parts = list(H.parts())
    assert sorted(np.concatenate([rows for rows, _ in parts]).tolist()) == list(range(ROWS))
    level = np.diag(shared()).mean()
    for rows, hessian in parts:
        taken = (hessian - shared())[0, 0]
        large = c[rows] > level * 2.0**-7
        assert (np.abs(np.log2(c[rows] / taken))[large] < 1.0).all()
        assert (c[rows][~large] < level * 2.0**-6).all()
    assert 8 < len(parts) < 30


def test_steps_go_with_the_square_root_of_the_weights() -> None:
    scales = RowHessian(np.array([1.0, 4.0, 16.0, 64.0])).step_scales()
    np.testing.assert_allclose(scales / scales[0], [1.0, 0.5, 0.25, 0.125])
    far = RowHessian(np.array([1e-9, 1.0, 1e9])).step_scales()
    assert far.tolist() == [4.0, 1.0, 2.0**-6]
    assert (RowHessian(np.full(5, 0.3)).step_scales() == 1.0).all()
    assert (RowHessian(np.array([1e-9, 2e-9]), shared()).step_scales() == 1.0).all(), "a head that outweighs the table"


def test_steps_by_row_lose_less_at_the_same_price() -> None:
    """Half the rows are used a thousand times as often: at the same bits, their steps are smaller."""
    rng = np.random.default_rng(3)
    W = rng.standard_normal((200, D))
    H = RowHessian(np.where(np.arange(200) % 2 == 0, 1.0, 1000.0))
    order = obs.prune_trace(W, H, threads=1)[0]
    counts = np.zeros(200, np.int64)

    def entropy(q: np.ndarray) -> float:
        p = np.unique(q, return_counts=True)[1] / q.size
        return float(-(p * np.log2(p)).sum())

    found = {}
    for name, scales, step in (("one", None, 0.25), ("by row", H.step_scales(), 0.75)):
        (cell,) = obs.rate_distortion_cells(W, H, order, counts, [(step, 0.0)], threads=1, scales=scales)
        q = obs.salient_cells(W, H, order, counts, [cell], threads=1)[0][0]
        bits = (entropy(q[::2]) + entropy(q[1::2])) / 2
        found[name] = bits, obs.layer_error(W, q * cell.step[0][:, None], H)
    assert found["by row"][0] < found["one"][0] + 0.1
    assert found["by row"][1] < 0.6 * found["one"][1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_for_the_squared_error_is_the_general_one(bits: int) -> None:
    W = np.concatenate([weight(), np.zeros((1, D)), 1e-20 * weight(5)[:2], 1e20 * weight(6)[:2]])
    found, wanted = obs.search_square(W, bits), obs.search_scale(W, bits, exponent=2.0)

    def error(step: np.ndarray) -> np.ndarray:
        q = np.clip(np.rint(W / step[:, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return ((q - W / step[:, None]) ** 2).sum(axis=1) * (step / np.abs(W).max(axis=1).clip(1e-30)) ** 2

    np.testing.assert_allclose(error(found), error(wanted), rtol=1e-4, atol=1e-12)


REFUSED = [
    (np.ones(3), None, "row weights"),
    (np.zeros(ROWS), None, "finite and positive"),
    (np.full(ROWS, np.nan), None, "finite and positive"),
    (np.ones(ROWS), np.eye(3), r"\(3, 3\)"),
    (np.ones(ROWS), np.full((D, D), np.inf), "the Hessian has values that are not finite"),
]


@pytest.mark.parametrize(("weights", "part", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_does_not_fit_is_refused(weights: np.ndarray, part: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        obs.prune_trace(weight(), RowHessian(weights, part))
