"""Grids for quantising (uniform, symmetric or not, binary, per row or run of columns), and OBS error feedback on any
grid.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from scipy.linalg import lapack

from autocompress.obs.pruning import as_groups
from autocompress.obs.quantising import search_scale
from autocompress.threads import single_threaded

__all__ = ["column_runs", "quantise_levels", "search_grid"]


def column_runs(weight: np.ndarray, size: int) -> np.ndarray:
    """View (..., d) as (..., ceil(d / size), size): runs of `size` consecutive columns, the last filled with zeros."""
    runs = -(-weight.shape[-1] // size)
    padded = np.zeros((*weight.shape[:-1], runs * size))
    padded[..., : weight.shape[-1]] = weight
    return padded.reshape(*weight.shape[:-1], runs, size)


def search_grid(
    weight: np.ndarray, bits: int, asymmetric: bool = False, minmax: bool = False, exponent: float = 2.4
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and lowest code of the uniform grid scale · {low, ..., low + 2^bits - 1} of every vector, 0 in it.

    Symmetric: low = -2^(bits-1), `search_scale`. Asymmetric: the range [min(w, 0), max(w, 0)] and 80 shrinks of it to
    1 - i/100, the one with the least Σ |w - ŵ|^exponent, and low = -round(-min / scale). One bit, symmetric: the grid
    is {-scale, scale}, as {-scale, 0} would be no symmetric one, and scale the mean |w| of what is not zero, which
    minimises Σ (w - ŵ)². minmax: no shrink; one bit then has the largest |w| for its scale.

    weight (..., n); returns scale float64 (0 where a vector is zero) and low int64, both in the leading shape. Sources:
    OBC's published code (arXiv 2208.11580); XNOR-Net, arXiv 1603.05279, section 3.1 (one bit).
    """
    zero = ~weight.any(axis=-1)
    if bits == 1 and not asymmetric:
        size = np.abs(weight)
        scale = size.max(axis=-1, initial=0.0) if minmax else size.sum(axis=-1) / np.maximum((size > 0).sum(axis=-1), 1)
        return scale, np.full(scale.shape, -1)
    if not asymmetric:
        scale = search_scale(weight, bits, exponent, shrinks=1 if minmax else 80)
        return np.where(zero, 0.0, scale), np.full(scale.shape, -(2 ** (bits - 1)))
    least, most = weight.min(axis=-1, initial=0.0), weight.max(axis=-1, initial=0.0)
    span = np.where(zero, 1.0, most - least)
    top = 2**bits - 1
    low = -np.rint(-least / span * top).astype(np.int64)
    unit = weight / span[..., None]
    best = np.full(span.shape, np.inf)
    chosen = np.zeros(span.shape)
    for i in range(1 if minmax else 80):
        scale = (1.0 - i / 100.0) / top
        q = np.clip(np.rint(unit / scale), low[..., None], (low + top)[..., None])
        error = (np.abs(unit - q * scale) ** exponent).sum(axis=-1)
        better = error < best
        best = np.where(better, error, best)
        chosen = np.where(better, scale * span, chosen)
    return np.where(zero, 0.0, chosen), low


def quantise_levels(
    W: np.ndarray,
    H: np.ndarray,
    order: np.ndarray,
    counts: np.ndarray,
    step: np.ndarray,
    low: np.ndarray | int = 0,
    high: np.ndarray | int = 0,
    levels: np.ndarray | None = None,
) -> np.ndarray:
    """Prune each row to `counts`, then quantise what is left, most salient first, with a step for every weight.

    As `salient_cells`, in float64: the target of a is w_a - Σ_b C_ba (ŵ_b - w_b)/C_aa over the visited b, and it takes
    the nearest code · step: a whole number from low to high or, where `levels` are given (ascending), one of those.
    step, low, high broadcast to W's shape; a weight with step 0 has code 0. Returns float64 codes in the shape of W;
    pruned weights have code 0. Raises ValueError if H over a row's kept columns is not positive definite.
    Source: OBS error feedback as in OBQ (arXiv 2208.11580); GPTQ (arXiv 2210.17323) for steps per group.
    """
    weight, hessian = as_groups(W, H)
    groups, rows, _ = weight.shape
    order = np.asarray(order, np.int64).reshape(weight.shape)
    counts = np.asarray(counts).reshape(groups, rows)
    step, low, high = (np.broadcast_to(a, np.shape(W)).reshape(weight.shape) for a in (step, low, high))
    table = np.zeros(0) if levels is None else np.asarray(levels, np.float64)
    codes = np.zeros(weight.shape)
    with single_threaded():
        for g, r in np.ndindex(groups, rows):
            gone, kept = np.split(order[g, r], [counts[g, r]])
            if not kept.size:
                continue
            h = hessian[g][kept]
            factor, info = lapack.dpotrf(h[:, kept], lower=1)
            if info != 0:
                raise ValueError(f"the Hessian is not positive definite over what row {r} keeps; add damping")
            w = weight[g, r, kept]
            if gone.size:
                w = w + lapack.dpotrs(factor, h[:, gone] @ weight[g, r, gone], lower=1)[0]
            codes[g, r, kept] = _feedback(
                factor.T, w, *(np.ascontiguousarray(a[g, r, kept], np.float64) for a in (step, low, high)), table
            )
    return codes.reshape(np.shape(W))


@njit(nogil=True, cache=True)
def _feedback(
    C: np.ndarray, w: np.ndarray, step: np.ndarray, low: np.ndarray, high: np.ndarray, levels: np.ndarray
) -> np.ndarray:
    """Codes of one row. C: upper triangular with H = Cᵀ C in the order of w, quantised from its end."""
    m = w.shape[0]
    codes = np.zeros(m)
    e = np.zeros(m)
    for a in range(m - 1, -1, -1):
        if step[a] > 0.0:
            x = (w[a] - np.dot(C[a, a + 1 :], e[a + 1 :]) / C[a, a]) / step[a]
            if levels.shape[0]:
                above = min(np.searchsorted(levels, x), levels.shape[0] - 1)
                below = max(above - 1, 0)
                codes[a] = levels[above] if abs(levels[above] - x) < abs(levels[below] - x) else levels[below]
            else:
                codes[a] = min(max(np.rint(x), low[a]), high[a])
        e[a] = codes[a] * step[a] - w[a]
    return codes
