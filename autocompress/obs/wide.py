"""Layers too wide for exact work on every row: one order and one factor for all rows.

Exact OBS costs d³/3 multiply-adds per row (`exact_operations`), and again for every sparsity. Where that is above a
limit, weights are pruned by their first scores, what is left is refitted by conjugate gradients, all rows at once, and
quantised in the order of the largest diagonal of H with one factor for the layer: about 50 d² operations per row and
sparsity, and d² per row and cell. Sources: GPTQ, arXiv 2210.17323 (act-order); L-OBS's scores, arXiv 1705.07565.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.obs import blas, kernels
from autocompress.obs.pruning import as_groups, in_threads, inverse_hessian, scaled_hessian
from autocompress.obs.quantising import Cell
from autocompress.threads import single_threaded

__all__ = ["EXACT_LIMIT", "exact_operations", "shared_cells", "shared_prune", "shared_trace"]

EXACT_LIMIT = 3e13  # operations of one exact trace of a layer; 512 rows of 4,608 columns take 1.7e13
ROWS = 64  # rows of a task: fixed, since the sums of a product may depend on how many rows it has
COLUMNS = 128  # columns between two matrix products
STEPS = 24  # of conjugate gradients: each costs a product with H


def exact_operations(shape: Sequence[int]) -> float:
    """Cost estimate of one exact trace of a weight (..., d): d³/3 multiply-adds for each of its rows."""
    return math.prod(shape[:-1]) * shape[-1] ** 3 / 3


def shared_trace(W: np.ndarray, H: np.ndarray, threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Order and losses as `prune_trace` returns them, by the first scores alone: w_j²/(2 [H⁻¹]_jj), least first.

    Losses are the exact ones of losing that weight only; their sum is an estimate. Shapes and errors as in
    `prune_trace`.
    """
    weight, hessian = as_groups(W, H)
    order = np.empty(weight.shape, np.int32)
    losses = np.empty(weight.shape)
    for g, (w, h) in enumerate(zip(weight, hessian, strict=True)):
        scaled, scale = scaled_hessian(h)
        scores = w**2 / (2.0 * np.diag(inverse_hessian(scaled, threads)) / scale)
        order[g] = np.argsort(scores, axis=1, kind="stable")
        losses[g] = np.take_along_axis(scores, order[g].astype(np.int64), 1)
    return order.reshape(np.shape(W)), losses.reshape(np.shape(W))


def shared_cells(
    W: np.ndarray, H: np.ndarray, order: np.ndarray, counts: np.ndarray, cells: Sequence[Cell], threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of every cell and the pruned weights, as `salient_cells`, with one order of columns for all rows.

    Columns go from the largest diagonal of H to the smallest; the target of a is w_a - Σ_b C_ba (ŵ_b - w_b)/C_aa over
    the visited b, with w the pruned and refitted weights and H = C Cᵀ in that order reversed. The refit stops after
    `STEPS` steps of conjugate gradients. Raises ValueError if H is not positive definite.
    """
    weight, hessian = as_groups(W, H)
    groups, rows, d = weight.shape
    n = len(cells)
    codes = np.zeros((n, *weight.shape), np.int32)
    pruned = np.zeros(weight.shape)
    gone = np.zeros(weight.shape, np.bool_)
    lost = np.arange(d) < np.asarray(counts).reshape(groups, rows, 1)
    np.put_along_axis(gone, np.asarray(order, np.int64).reshape(weight.shape), lost, -1)
    peak = float(np.abs(weight).max(initial=0.0)) or 1.0  # one scale for the layer: steps are shared by its rows
    for g in range(groups):
        h, h_scale = scaled_hessian(hessian[g])
        visit = np.argsort(np.diag(h), kind="stable")  # passes go from the last to the first
        curved = h[np.ix_(visit, visit)].astype(np.float32)
        factor = curved.copy()
        with single_threaded():
            if not blas.in_place(blas.POTRF, factor, d):
                raise ValueError("the Hessian is not positive definite; add damping (calibrate does)")
        w = np.ascontiguousarray(weight[g][:, visit] / peak, np.float32)
        left_out = np.ascontiguousarray(gone[g][:, visit])

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
            visit: np.ndarray = visit,
            h_scale: float = h_scale,
        ) -> None:
            at, top = task
            part, cell = slice(top, top + ROWS), cells[at]
            step = (cell.step[g, part] / peak).astype(np.float32)
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
                    step,
                    cell.low[g, part],
                    cell.high[g, part],
                    price,
                    bits,
                    cell.offset,
                    e[:, block],
                    q[:, block],
                )
            codes[at, g, part][:, visit] = q

        tops = range(0, rows, ROWS)
        with single_threaded():
            in_threads(refit, tops, threads)
            in_threads(run, [(at, top) for at in range(n) for top in tops], threads)
        pruned[g][:, visit] = w.astype(np.float64) * peak
    return codes.reshape(n, *np.shape(W)), pruned.reshape(np.shape(W))


def _refit(w: np.ndarray, gone: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Weights x with x = 0 where gone that nearly minimise ½ (x-w) H (x-w)ᵀ, row by row, in float32."""
    x = np.where(gone, np.float32(0.0), w)
    scale = np.diag(H)
    r = np.where(gone, np.float32(0.0), (w - x) @ H)
    z = r / scale
    p = z
    slope = np.einsum("ij,ij->i", r, z)[:, None]
    for _ in range(STEPS):
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
