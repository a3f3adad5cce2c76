"""Passes along several paths: what a search through all choices finds, and the order of columns they go by."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress import obs
from autocompress.obs import kernels

from . import reference
from .test_engine import make_layer


def search(H: np.ndarray, w: np.ndarray, cell: obs.Cell, paths: int, block: int = 10**9) -> tuple[np.ndarray, float]:
    """Codes of one row and their cost, by the M-algorithm spelled out: the pass goes from the last column to the first,
    and once 2 `block` columns are open the best path decides the older half.
    """
    d = len(w)
    C = np.linalg.cholesky(H)
    step, low, high = float(cell.step[0, 0]), int(cell.low[0, 0]), int(cell.high[0, 0])

    def bits(q: int) -> float:
        return 0.0 if cell.bits is None else float(cell.bits[q + cell.offset])

    alive: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # codes of columns d-1, d-2, ...
    decided = 0
    for a in range(d - 1, -1, -1):
        if d - 1 - a - decided == 2 * block:
            decided += block
            alive = [p for p in alive if p[1][:decided] == alive[0][1][:decided]]
        found = []
        for cost, codes in alive:
            target = w[a]
            for b, q in zip(range(d - 1, a, -1), codes, strict=True):
                target -= C[b, a] / C[a, a] * (q * step - w[b])
            below = int(np.clip(np.floor(target / step), low, high))
            for q in {below, min(below + 1, high), *([0] if cell.price else [])}:
                new = cost + 0.5 * C[a, a] ** 2 * (q * step - target) ** 2 + cell.price * bits(q)
                found.append((new, (*codes, q)))
        alive = sorted(found)[:paths]
    cost, codes = alive[0]
    return np.array(codes[::-1]), cost


def cost_of(H: np.ndarray, w: np.ndarray, cell: obs.Cell, codes: np.ndarray) -> float:
    bits = 0.0 if cell.bits is None else float(cell.bits[codes + cell.offset].sum())
    return reference.layer_error(w[None], codes[None] * float(cell.step[0, 0]), H) + cell.price * bits


def priced(step: float, price: float, rows: int) -> obs.Cell:
    shape = (1, rows)
    table = np.float32(1.0) + 1.5 * np.abs(np.arange(-40, 41)).astype(np.float32)
    return obs.Cell(np.full(shape, step, np.float32), np.full(shape, -40), np.full(shape, 40), price, table, 40)


def grid(step: float, rows: int) -> obs.Cell:
    shape = (1, rows)
    return obs.Cell(np.full(shape, step, np.float32), np.full(shape, -3), np.full(shape, 2))


@pytest.mark.parametrize("cell", [priced(0.8, 0.05, 6), grid(0.6, 6)], ids=["priced", "grid"])
@pytest.mark.parametrize("paths", [1, 2, 5, 800])
def test_the_cheapest_paths_go_on(cell: obs.Cell, paths: int) -> None:
    W, H = make_layer("correlated", rows=6, d=6, seed=50)
    order = np.broadcast_to(np.arange(6), W.shape)
    codes = obs.salient_cells(W, H, order, np.zeros(6, int), [cell], paths=paths)[0][0]
    for w, q in zip(W, codes, strict=True):
        expected, cost = search(H, w, cell, paths)
        np.testing.assert_array_equal(q, expected)
        assert cost_of(H, w, cell, q) == pytest.approx(cost, rel=1e-6)


@pytest.mark.parametrize("d", [2 * kernels.BLOCK, 2 * kernels.BLOCK + 1, 5 * kernels.BLOCK + 7])
def test_long_rows_are_decided_block_by_block(d: int) -> None:
    W, H = make_layer("correlated", rows=3, d=d, seed=51)
    cell = priced(0.5, 0.02, 3)
    order = np.broadcast_to(np.arange(d), W.shape)
    codes = obs.salient_cells(W, H, order, np.zeros(3, int), [cell], paths=3)[0][0]
    for w, q in zip(W, codes, strict=True):
        expected, cost = search(H, w, cell, 3, kernels.BLOCK)
        assert (q == expected).mean() > 0.99  # float32 may take the other of two paths of one cost
        assert cost_of(H, w, cell, q) == pytest.approx(cost, rel=1e-3)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_more_paths_cost_less(shared: bool, sparsity: float) -> None:
    W, H = make_layer("correlated", rows=64, d=150, seed=52)
    order, losses = obs.prune_trace(W, H)
    counts = obs.pruned_counts(losses, sparsity)
    passes = obs.shared_cells if shared else obs.salient_cells
    cells = obs.rate_distortion_cells(W, H, order, counts, [(0.4, 0.1)])

    def cost(paths: int) -> float:
        codes = passes(W, H, order, counts, cells, paths=paths)[0][0]
        gone = np.argsort(order, axis=1) < counts[:, None]
        assert not codes[gone].any()
        error = reference.layer_error(W, codes * float(cells[0].step[0, 0]), H)
        assert cells[0].bits is not None
        return error + cells[0].price * float(cells[0].bits[codes + cells[0].offset].sum())

    costs = [cost(paths) for paths in (1, 2, 4, 8, 16)]
    assert costs == sorted(costs, reverse=True)
    if sparsity == 0.0:
        assert costs[3] < 0.98 * costs[0]


def test_both_passes_are_one_where_no_block_ends() -> None:
    W, H = make_layer("correlated", rows=70, d=100, seed=53)
    visit = obs.least_pivots(H)
    order, none = np.broadcast_to(visit, W.shape), np.zeros(70, int)
    cell = priced(0.5, 0.02, 70)
    exact = obs.salient_cells(W, H, order, none, [cell], paths=8)[0]
    shared = obs.shared_cells(W, H, order, none, [cell], paths=8)[0]
    assert (exact == shared).mean() > 0.99


def test_steps_of_runs_on_rows_of_their_own() -> None:
    W, H = make_layer("correlated", rows=20, d=30, seed=54)
    generator = np.random.default_rng(55)
    steps = generator.choice([0.25, 0.4, 0.7], (1, 20, 4)).astype(np.float32)  # runs of 8, 8, 8 and 6 columns
    runs = obs.Cell(steps, np.full(steps.shape, -3), np.full(steps.shape, 2), run=8)
    order, losses = obs.prune_trace(W, H)
    counts = obs.pruned_counts(losses, 0.3)
    codes = obs.salient_cells(W, H, order, counts, [grid(0.4, 20), runs])[0]
    every = np.repeat(steps[0], 8, axis=1)[:, :30]
    expected = obs.quantise_levels(W, H, order, counts, every, -3, 2)
    assert (codes[1] == expected).mean() > 0.995
    np.testing.assert_array_equal(codes[0], obs.quantise_salient(W, H, order, counts, np.array(0.4), -3, 2))


def pivots(H: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.diag(np.linalg.cholesky(H[np.ix_(order, order)])) ** 2


@pytest.mark.parametrize("d", [1, 2, 30, 64, 65, 200])
def test_the_least_pivot_is_next(d: int) -> None:
    _, H = make_layer("correlated", rows=1, d=d, seed=56)
    order = obs.least_pivots(H)
    assert sorted(order) == list(range(d))
    left, S = list(range(d)), H.copy()
    for a in order[:-1]:
        assert S[a, a] <= (1 + 1e-9) * min(S[b, b] for b in left)
        left.remove(a)
        S = S - np.outer(S[a], S[a]) / S[a, a]
    for other in (np.arange(d), np.argsort(np.diag(H)), order[::-1]):
        assert pivots(H, order).sum() <= pivots(H, other).sum() * (1 + 1e-9)
    np.testing.assert_array_equal(obs.least_pivots(np.stack([H, np.eye(d)])), [order, np.arange(d)])
    rough = obs.least_pivots(H, np.float32)
    assert pivots(H, rough).sum() == pytest.approx(pivots(H, order).sum(), rel=1e-3)


def test_least_pivots_of_no_hessian() -> None:
    with pytest.raises(ValueError, match="not positive definite"):
        obs.least_pivots(np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="diagonal entry that is not positive"):
        obs.least_pivots(np.zeros((3, 3)))
