"""Layers too wide for exact work on every row: one order and one factor for all rows.

Exact OBS costs d³/3 multiply-adds per row (`exact_operations`), and again for every sparsity. Where that is above a
limit, weights are pruned in rounds, what is left is refitted by conjugate gradients, all rows at once, and quantised in
one order (`least_pivots`) with one factor for the layer: 168 d² operations per row for the order of pruning, about 50
d² per row and sparsity, and d² per row and cell. What that loses: docs/options.md. Sources: GPTQ, arXiv 2210.17323
(one order for all rows); L-OBS's scores, arXiv 1705.07565, computed anew after every round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.obs import blas, kernels
from autocompress.obs.pruning import as_groups, hessian_scale, in_threads, scaled_hessian
from autocompress.obs.quantising import Cell
from autocompress.obs.visiting import least_pivots
from autocompress.threads import single_threaded

__all__ = ["EXACT_LIMIT", "exact_operations", "shared_cells", "shared_prune", "shared_trace"]

EXACT_LIMIT = 3e13  # operations of one exact trace of a layer; 512 rows of 4,608 columns take 1.7e13
ROWS = 64  # rows of a task: fixed, since the sums of a product may depend on how many rows it has
COLUMNS = 128  # columns between two matrix products
STEPS = 24  # of conjugate gradients: each costs a product with H
ROUNDS = 24  # of pruning, until LAST is left
ROUND_STEPS = 6  # of conjugate gradients after each, from where the last one stopped
LAST = 0.02
SINGULAR = "the Hessian is not positive definite; add damping (calibrate does)"


def exact_operations(shape: Sequence[int]) -> float:
    """Cost estimate of one exact trace of a weight (..., d): d³/3 multiply-adds for each of its rows."""
    return math.prod(shape[:-1]) * shape[-1] ** 3 / 3


def shared_trace(W: np.ndarray, H: np.ndarray, threads: int = 0, rounds: int = ROUNDS) -> tuple[np.ndarray, np.ndarray]:
    """Order and losses as `prune_trace` returns them, of pruning in rounds by the score w_j²/(2 [H⁻¹]_jj), least first.

    Round k of n takes the least scores of the layer until (1 - (1 - √LAST) k/n)² of its weights are left, and refits
    these. [H⁻¹]_jj stays that of the whole H: what is left of each row would have its own, at d³ operations. Losses are
    the scores that weights went by; their sum is an estimate. With no rounds all go by their first scores. Shapes and
    errors as in `prune_trace`.
    """
    weight, hessian = as_groups(W, H)
    order = np.empty(weight.shape, np.int32)
    losses = np.empty(weight.shape)
    for g in range(len(weight)):
        peak = float(np.abs(weight[g]).max(initial=0.0)) or 1.0
        h, h_scale = scaled_hessian(hessian[g])
        curved, w = h.astype(np.float32), (weight[g] / peak).astype(np.float32)
        with single_threaded():
            if not (blas.in_place(blas.DPOTRF, h, len(h)) and blas.in_place(blas.DPOTRI, h, len(h))):
                raise ValueError(SINGULAR)
        twice = (2.0 * np.diag(h)).astype(np.float32)
        del h
        x, score = w.copy(), w**2 / twice
        left = np.full(w.shape, rounds, np.int16)  # the round that each weight goes in
        gone = np.zeros(w.shape, np.bool_)

        def refit(
            top: int,
            w: np.ndarray = w,
            x: np.ndarray = x,
            gone: np.ndarray = gone,
            curved: np.ndarray = curved,
            score: np.ndarray = score,
            twice: np.ndarray = twice,
        ) -> None:
            part = slice(top, top + ROWS)
            x[part] = _refit(w[part], gone[part], curved, ROUND_STEPS, x[part])
            np.divide(x[part] ** 2, twice, out=score[part], where=~gone[part])

        for k in range(rounds):
            density = (1.0 - (1.0 - math.sqrt(LAST)) * (k + 1) / rounds) ** 2
            alive = score[~gone]
            count = alive.size - int(density * w.size)
            if count > 0:
                new = ~gone & (score <= np.partition(alive, count - 1)[count - 1])
                left[new] = k
                gone |= new
            with single_threaded():
                in_threads(refit, range(0, len(w), ROWS), threads)
        by_score = np.argsort(score, axis=1, kind="stable")
        by_round = np.argsort(np.take_along_axis(left, by_score, 1), axis=1, kind="stable")
        order[g] = np.take_along_axis(by_score, by_round, 1)
        losses[g] = np.take_along_axis(score.astype(np.float64), order[g].astype(np.int64), 1) * (peak**2 * h_scale)
    return order.reshape(np.shape(W)), losses.reshape(np.shape(W))


def shared_cells(
    W: np.ndarray,
    H: np.ndarray,
    order: np.ndarray,
    counts: np.ndarray,
    cells: Sequence[Cell],
    threads: int = 0,
    paths: int = 1,
    visit: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of every cell and the pruned weights, as `salient_cells`, with one order of columns for all rows.

    visit (groups, d): that order, from the column that is quantised last to the first; `least_pivots` of H where none
    is given. The target of a is w_a - Σ_b C_ba (ŵ_b - w_b)/C_aa over the visited b, with w the pruned and refitted
    weights and H = C Cᵀ in that order. The refit stops after `STEPS` steps of conjugate gradients; paths are decided
    every `COLUMNS` columns. Raises ValueError if H is not positive definite.
    """
    weight, hessian = as_groups(W, H)
    groups, rows, d = weight.shape
    n = len(cells)
    orders = least_pivots(hessian, np.float32) if visit is None else np.reshape(visit, (groups, d))
    codes = np.zeros((n, *weight.shape), np.int32)
    pruned = np.zeros(weight.shape)
    gone = np.zeros(weight.shape, np.bool_)
    lost = np.arange(d) < np.asarray(counts).reshape(groups, rows, 1)
    np.put_along_axis(gone, np.asarray(order, np.int64).reshape(weight.shape), lost, -1)
    peak = float(np.abs(weight).max(initial=0.0)) or 1.0  # one scale for the layer: steps are shared by its rows
    for g in range(groups):
        h_scale = hessian_scale(hessian[g])
        visited = orders[g]  # passes go from the last to the first
        curved = np.empty((d, d), np.float32)
        for row, column in zip(curved, visited, strict=True):  # no copy in float64: a wide layer's is large
            row[:] = hessian[g, column, visited] / h_scale
        factor = curved.copy()
        with single_threaded():
            if not blas.in_place(blas.POTRF, factor, d):
                raise ValueError(SINGULAR)
        w = np.ascontiguousarray(weight[g][:, visited] / peak, np.float32)
        left_out = np.ascontiguousarray(gone[g][:, visited])

        def refit(top: int, w: np.ndarray = w, left_out: np.ndarray = left_out, curved: np.ndarray = curved) -> None:
            part = slice(top, top + ROWS)
            if left_out[part].any():
                w[part] = _refit(w[part], left_out[part], curved)

        def run(
            task: tuple[int, int],
            g: int = g,
            w: np.ndarray = w,
            left_out: np.ndarray = left_out,
            factor: np.ndarray = factor,
            visited: np.ndarray = visited,
            h_scale: float = h_scale,
        ) -> None:
            at, top = task
            part, cell = slice(top, top + ROWS), cells[at]
            steps = (cell.step[g, part] / peak).astype(np.float32)
            step, low, high = (_by_column(x, cell.run, visited) for x in (steps, cell.low[g, part], cell.high[g, part]))
            bits = np.zeros(1, np.float32) if cell.bits is None else cell.bits
            price = cell.price / (peak**2 * h_scale)
            e, q = np.zeros((len(step), d), np.float32), np.zeros((len(step), d), np.int32)
            for stop in range(d, 0, -COLUMNS):
                block = slice(max(0, stop - COLUMNS), stop)
                kernels.shared_block(
                    factor[block, block],
                    e[:, stop:] @ factor[block, stop:].T,
                    w[part, block],
                    left_out[part, block],
                    step[:, block],
                    low[:, block],
                    high[:, block],
                    price,
                    bits,
                    cell.offset,
                    np.zeros(0, np.float32) if cell.levels is None else cell.levels,
                    e[:, block],
                    q[:, block],
                    paths,
                )
            codes[at, g, part][:, visited] = q

        tops = range(0, rows, ROWS)
        with single_threaded():
            in_threads(refit, tops, threads)
            in_threads(run, [(at, top) for at in range(n) for top in tops], threads)
        pruned[g][:, visited] = w.astype(np.float64) * peak
    return codes.reshape(n, *np.shape(W)), pruned.reshape(np.shape(W))


def _by_column(values: np.ndarray, run: int, visit: np.ndarray) -> np.ndarray:
    """Values (rows,), or (rows, runs) of `run` columns each, as (rows, d) in the order of the columns of a pass."""
    if values.ndim == 1:
        return np.repeat(values[:, None], len(visit), axis=1)
    return values[:, visit // run]


def _refit(
    w: np.ndarray, gone: np.ndarray, H: np.ndarray, steps: int = STEPS, start: np.ndarray | None = None
) -> np.ndarray:
    """Weights x with x = 0 where gone that nearly minimise ½ (x-w) H (x-w)ᵀ, row by row, in float32."""
    x = np.where(gone, np.float32(0.0), w if start is None else start)
    scale = np.diag(H)
    r = np.where(gone, np.float32(0.0), (w - x) @ H)
    z = r / scale
    p = z
    slope = np.einsum("ij,ij->i", r, z)[:, None]
    for _ in range(steps):
        Hp = np.where(gone, np.float32(0.0), p @ H)
        curve = np.einsum("ij,ij->i", p, Hp)[:, None]
        length = np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)
        x = x + length * p
        r = r - length * Hp
        z = r / scale
        before, slope = slope, np.einsum("ij,ij->i", r, z)[:, None]
        p = z + np.divide(slope, before, out=np.zeros_like(slope), where=before > 0) * p
    return x


def shared_prune(W: np.ndarray, H: np.ndarray, order: np.ndarray, counts: np.ndarray, threads: int = 0) -> np.ndarray:
    """The pruned layer, float64: the first `counts` of each row's `order` are zero. See `shared_cells`."""
    return shared_cells(W, H, order, counts, [], threads=threads)[1]
