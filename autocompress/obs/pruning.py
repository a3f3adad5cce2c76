"""Exact greedy pruning of a layer: the order and the losses (`prune_trace`), how many per row (`pruned_counts`), the
weights (`prune`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, overload

import numpy as np
from scipy.linalg import LinAlgError

from autocompress.obs import blas, tracing, weighted
from autocompress.obs.weighted import RowHessian
from autocompress.threads import default_workers, single_threaded

__all__ = ["layer_error", "prune", "prune_trace", "pruned_counts"]

# Pivots per trailing update: long enough for the product to run near the speed of BLAS, short enough for the pivot rows
# of a block to stay in cache while the next pivots are brought up to date with them.
BLOCK = 64
REFRESH = 6  # the state of a row is computed afresh once d / REFRESH columns are left
PANEL = 128  # columns of an inverse Hessian that one thread solves for at a time
LAPACK = (blas.SYRK, blas.DPOTRF, blas.DPOTRI)

Item = TypeVar("Item")


def prune_trace(W: Any, H: Any, threads: int = 0, backend: str | None = None) -> tuple[Any, Any]:
    """Prune every row greedily to the end and return the order and the loss of each step.

    Step: p = argmin w_p²/[H⁻¹]_pp over what is left, loss = w_p²/(2 [H⁻¹]_pp), then the optimal update of the rest. The
    sum of the first n losses of a row is its exact error ½ (ŵ-w) H (ŵ-w)ᵀ after n steps.

    W (rows, d); H (d, d) symmetric positive definite (no damping is added here). With leading groups: W (g, rows, d), H
    (g, d, d); or H a `RowHessian`. Returns order int32 and losses float64 in the shape of W. `threads`: rows are dealt
    to that many (0: one per core); the result does not depend on it. `backend`: "numba", or "torch" (batched, equal to
    rounding; takes and returns tensors on the device of W); by default torch for tensors on a GPU. Raises ValueError on
    shapes that do not match, values that are not finite, or H not positive definite. Source: OBC, arXiv 2208.11580,
    algorithm 1, as a pivoted Cholesky factorisation of H⁻¹ with lazy updates.
    """
    order, losses, _ = greedy(W, H, threads=threads, backend=backend)
    return order, losses


def greedy(
    W: Any,
    H: Any,
    grid: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    first: tuple[np.ndarray, np.ndarray] | None = None,
    threads: int = 0,
    backend: str | None = None,
) -> tuple[Any, Any, Any]:
    """Order, losses and levels of greedy OBS: the cheapest weight goes next, to zero or, with a grid, to its level.

    grid: step float64, low and high, each in the leading shape of W. first: (order, counts) of columns that go to zero
    before all others. Losses sum up to the error ½ (ŵ-w) H (ŵ-w)ᵀ; levels are int32 in the shape of W, 0 where a weight
    was pruned. Otherwise as `prune_trace`.
    """
    if backend not in (None, "numba", "torch"):
        raise ValueError(f"backend is {backend!r}, needed numba or torch")
    if backend == "torch" or (backend is None and getattr(getattr(W, "device", None), "type", "cpu") != "cpu"):
        from autocompress.obs import batched  # torch is for those who have tensors

        return batched.greedy(W, H, grid, first)
    weight, hessian = as_groups(W, H)
    if isinstance(hessian, RowHessian):
        if grid is not None or first is not None:
            raise ValueError("a RowHessian has the order of pruning only")
        found = weighted.trace(weight, hessian, lambda w, h: prune_trace(w, h, threads))
        return found[0].reshape(np.shape(W)), found[1].reshape(np.shape(W)), np.zeros(np.shape(W), np.int32)
    groups, rows, d = weight.shape
    order = np.empty(weight.shape, np.int32)
    losses = np.empty(weight.shape, np.float64)
    levels = np.empty(weight.shape, np.int32)
    zeros = np.zeros((groups, rows))
    step, low, high = (np.asarray(x, np.float64).reshape(groups, rows) for x in grid or (zeros, zeros, zeros))
    sequence, counts = first if first is not None else (np.zeros((groups, rows, 0)), zeros)
    sequence = np.ascontiguousarray(sequence, np.int64).reshape(groups, rows, -1)
    counts = np.asarray(counts, np.int64).reshape(groups, rows)
    # The last dimension of the work space: whole cache lines, and an odd number of them, so that the entries of one
    # column of a matrix do not meet in one set of the cache.
    lines = -(-d // 16)
    width = 16 * (lines + 1 - lines % 2)
    rest = -(-d // REFRESH) if d > 1 else 0
    for g in range(groups):
        w, row_scale = scaled_rows(weight[g])
        h, h_scale = scaled_hessian(hessian[g])
        inverse, floor = inverse_hessian(h, threads).astype(np.float32), (1.0 / np.diag(h)).astype(np.float32)
        limits = [x.astype(np.float32) for x in (step[g] / row_scale[:, 0], low[g], high[g])]
        cost, level = np.empty((rows, d), np.float32), np.empty((rows, d), np.float32)

        def run(p: slice, w=w, h=h, inverse=inverse, floor=floor, limits=limits, cost=cost, level=level, g=g) -> None:
            tracing.trace_rows(
                LAPACK,
                h,
                inverse,
                floor,
                w[p],
                *(x[p] for x in limits),
                sequence[g, p],
                counts[g, p],
                order[g, p],
                cost[p],
                level[p],
                # From numpy, which asks for huge pages: a wide matrix has each entry of a column on another small one.
                np.empty((d, width), np.float32),
                np.empty((BLOCK, width), np.float32),
                np.empty((tracing.LINES, width), np.float32),
                np.empty((rest, rest)),
            )

        over_rows(run, rows, threads)
        losses[g] = cost * (row_scale**2 * h_scale)
        levels[g] = level
    shape = np.shape(W)
    return order.reshape(shape), losses.reshape(shape), levels.reshape(shape)


def pruned_counts(losses: np.ndarray, sparsity: float) -> np.ndarray:
    """How many weights each row loses so that ceil(sparsity · size) are gone from the layer: always the smallest *next*
    loss.

    A heap over the rows' next losses pops in the order of the running maxima of the losses, because what follows a
    large loss and is smaller leaves the heap at once; so the smallest of the running maxima replace the heap.
    losses (..., d) as `prune_trace` returns them; returns int64 counts in the leading shape. Raises ValueError if
    sparsity is not in [0, 1]. Source: OBC, arXiv 2208.11580, section 4 (global mask selection).
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is {sparsity}, needed a fraction between 0 and 1")
    flat = np.maximum.accumulate(losses.reshape(-1, losses.shape[-1]), axis=1)
    total = min(flat.size, int(np.ceil(sparsity * flat.size - 1e-9)))
    if total == 0:
        return np.zeros(losses.shape[:-1], np.int64)
    # The first `total` of a stable sort, by selection: sorting the table of an embedding for each sparsity takes longer
    # than coding it.
    last = np.partition(flat, total - 1, axis=None)[total - 1]
    counts = (flat < last).sum(axis=1)
    ties = np.flatnonzero(flat == last)[: total - counts.sum()]
    counts += np.bincount(ties // flat.shape[1], minlength=flat.shape[0])
    return counts.reshape(losses.shape[:-1]).astype(np.int64)


def prune(
    W: np.ndarray, H: np.ndarray | RowHessian, order: np.ndarray, counts: np.ndarray, threads: int = 0
) -> np.ndarray:
    """Rebuild the pruned layer from its order: the first `counts` of each row are zero, the rest is refitted optimally.

    With M gone and R kept, ŵ_R = w_R + H_RR⁻¹ H_RM w_M (float32 factorisation). Shapes as in `prune_trace`; returns
    float64.
    """
    from autocompress.obs.quantising import salient_cells

    return salient_cells(W, H, order, counts, [], threads=threads)[1]


def layer_error(W: np.ndarray, W_hat: np.ndarray, H: np.ndarray | RowHessian) -> float:
    """½ tr(ΔW H ΔWᵀ) with ΔW = W_hat - W, in float64, summed over groups. Shapes as in `prune_trace`."""
    weight, hessian = as_groups(W, H)
    delta = np.asarray(W_hat, np.float64).reshape(weight.shape) - weight
    if isinstance(hessian, RowHessian):
        return float(hessian.row_errors(delta).sum())
    return 0.5 * float(sum(np.vdot(d @ h, d) for d, h in zip(delta, hessian, strict=True)))


@overload
def as_groups(W: np.ndarray, H: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
@overload
def as_groups(W: np.ndarray, H: np.ndarray | RowHessian) -> tuple[np.ndarray, np.ndarray | RowHessian]: ...
def as_groups(W: np.ndarray, H: np.ndarray | RowHessian) -> tuple[np.ndarray, np.ndarray | RowHessian]:
    """(groups, rows, d) and (groups, d, d) views in float64, checked; a RowHessian stays one, of a single group."""
    if isinstance(H, RowHessian):
        return _checked_rows(np.asarray(W, np.float64), H), H
    weight, hessian = np.asarray(W, np.float64), np.asarray(H, np.float64)
    if weight.ndim == 2 and hessian.ndim == 2:
        weight, hessian = weight[None], hessian[None]
    groups_match = weight.ndim == 3 and hessian.ndim == 3 and weight.shape[0] == hessian.shape[0]
    if not groups_match or hessian.shape[1:] != (weight.shape[-1], weight.shape[-1]):
        raise ValueError(
            f"weight has shape {np.shape(W)} and Hessian {np.shape(H)}; needed (rows, d) and (d, d), "
            "or both with groups"
        )
    if not np.isfinite(weight).all():
        raise ValueError("the weight has values that are not finite")
    if not np.isfinite(hessian).all():
        raise ValueError("the Hessian has values that are not finite")
    return weight, hessian


def _checked_rows(weight: np.ndarray, H: RowHessian) -> np.ndarray:
    weight = weight[None] if weight.ndim == 2 else weight
    d = weight.shape[-1]
    shared = (d, d) if H.shared is None else H.shared.shape
    if weight.ndim != 3 or weight.shape[:2] != (1, *H.weights.shape) or shared != (d, d):
        raise ValueError(
            f"weight has shape {weight.shape}, row weights {H.weights.shape} and their shared Hessian {shared}; "
            "needed (rows, d), (rows,) and (d, d)"
        )
    if not np.isfinite(weight).all():
        raise ValueError("the weight has values that are not finite")
    if not (np.isfinite(H.weights).all() and (H.weights > 0.0).all()):
        raise ValueError("row weights must be finite and positive")
    if H.shared is not None and not np.isfinite(H.shared).all():
        raise ValueError("the Hessian has values that are not finite")
    return weight


def scaled_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in float32 with a largest magnitude of 1/2 to 1, and their scales (rows, 1): 1e-20 and 1e20 are alike then.

    Scales are powers of two, so that weights which come from float32 lose nothing, and a weight that lies half-way
    between two levels of a grid stays there.
    """
    peak = np.abs(weight).max(axis=1, keepdims=True, initial=0.0)
    scale = np.where(peak > 0.0, np.ldexp(1.0, np.frexp(peak)[1]), 1.0)
    return np.ascontiguousarray(weight / scale, np.float32), scale


def scaled_hessian(hessian: np.ndarray) -> tuple[np.ndarray, float]:
    """The Hessian with a mean diagonal of one, and its scale."""
    scale = hessian_scale(hessian)
    return np.ascontiguousarray(hessian) / scale, scale


def hessian_scale(hessian: np.ndarray) -> float:
    """The mean of the diagonal. Raises ValueError where an entry of that is not positive."""
    scale = float(np.mean(np.diag(hessian)))
    if not scale > 0.0 or not (np.diag(hessian) > 0.0).all():
        raise ValueError("the Hessian has a diagonal entry that is not positive; add damping (calibrate does)")
    return scale


def inverse_hessian(hessian: np.ndarray, threads: int = 1) -> np.ndarray:
    """Inverse of a symmetric positive definite matrix through its Cholesky factor, float64, both halves filled.

    Panels of columns are solved for one by one, on `threads` threads, each on what of the factor it depends on: the
    bits are the same for any number of them.
    """
    d = len(hessian)
    factor = np.array(hessian, np.float64, order="C")
    inverse = np.empty((d, d))

    def panel(start: int) -> None:
        stop = min(start + PANEL, d)
        X = np.eye(stop - start, d - start)
        blas.solve(blas.DPOTRS, factor[start:, start:], X)
        inverse[start:stop, start:] = X
        inverse[start:, start:stop] = X.T

    # On busy cores, threads of LAPACK spend far longer waiting for each other than a matrix of this size takes.
    with single_threaded():
        if not blas.in_place(blas.DPOTRF, factor, d):
            raise LinAlgError(
                "the Hessian is not positive definite; add damping (calibrate does, 1e-2 of the mean diagonal by "
                "default)"
            )
        in_threads(panel, range(0, d, PANEL), threads)
    return inverse


def over_rows(run: Callable[[slice], None], rows: int, threads: int) -> None:
    """Call run(slice) for panels of rows on that many threads, with BLAS on one thread in each."""
    threads = min(threads if threads > 0 else default_workers(), rows)
    panels = 1 if threads <= 1 else min(rows, 4 * threads)
    edges = [rows * i // panels for i in range(panels + 1)]
    with single_threaded():
        in_threads(run, [slice(a, b) for a, b in itertools.pairwise(edges)], threads)


def in_threads(run: Callable[[Item], None], items: Iterable[Item], threads: int) -> None:
    """Call run on every item, on that many threads (0: one per core)."""
    threads = threads if threads > 0 else default_workers()
    if threads <= 1:
        for item in items:
            run(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(run, items):
            pass
