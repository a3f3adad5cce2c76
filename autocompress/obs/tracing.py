"""Compiled greedy traces, one row at a time: which weight goes next, what it costs, and what the others make of it.

A row is a pivoted Cholesky factorisation of the inverse Hessian G (engine.md section 1). What a weight becomes when it
goes is zero (pruning) or the nearest level of a grid (OBQ); everything else is the same.

All kernels release the GIL, write only the work space that they are handed, and give the same bits for any number of
threads, because no row ever meets another. Float32 inside; callers scale weights and Hessian to about one first.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from autocompress.obs.blas import FAST, in_place, syrk_lower

__all__ = ["LINES", "trace_rows"]

CHUNK = 64  # values compared at a time where one of them is looked for
LINES = 6  # vectors of length d that a row works on


@njit(nogil=True, cache=True, fastmath=FAST)
def _subtract_rows(u: np.ndarray, U: np.ndarray, a: np.ndarray, s: int, m: int) -> None:
    """u -= sum over q < s of a[q] U[q, :]; eight rows per sweep, so that u passes once for eight products."""
    q = 0
    while q + 8 <= s:
        a0, a1, a2, a3, a4, a5, a6, a7 = a[q], a[q + 1], a[q + 2], a[q + 3], a[q + 4], a[q + 5], a[q + 6], a[q + 7]
        u0, u1, u2, u3 = U[q], U[q + 1], U[q + 2], U[q + 3]
        u4, u5, u6, u7 = U[q + 4], U[q + 5], U[q + 6], U[q + 7]
        for j in range(m):
            u[j] -= (
                a0 * u0[j] + a1 * u1[j] + a2 * u2[j] + a3 * u3[j] + a4 * u4[j] + a5 * u5[j] + a6 * u6[j] + a7 * u7[j]
            )
        q += 8
    while q < s:
        b = a[q]
        v = U[q]
        for j in range(m):
            u[j] -= b * v[j]
        q += 1


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _update(
    u: np.ndarray, w: np.ndarray, g: np.ndarray, floor: np.ndarray, score: np.ndarray, inv: float, t: float, m: int
) -> None:
    """Scale the pivot row, then w -= u t, g -= u² (never below 1/H_jj, its exact lower bound), score = w²/g."""
    for j in range(m):
        x = u[j] * inv
        u[j] = x
        v = w[j] - x * t
        w[j] = v
        h = max(g[j] - x * x, floor[j])
        g[j] = h
        score[j] = v * v / h


@njit(nogil=True, cache=True, error_model="numpy")  # not FAST: it is exact arithmetic that breaks ties as published
def _round(
    w: np.ndarray, g: np.ndarray, score: np.ndarray, away: np.ndarray, step: float, low: float, high: float, m: int
) -> None:
    """away = (w - q(w))², score = away / g, with q the nearest of low ... high times step."""
    for j in range(m):
        r = w[j] - min(max(np.rint(w[j] / step), low), high) * step
        away[j] = r * r
        score[j] = r * r / g[j]


@njit(nogil=True, cache=True)
def _extreme(values: np.ndarray, m: int, sign: int) -> int:
    """First index of the least (sign 1) or greatest (sign -1) of the first m values, none of them negative."""
    # Floats that are not negative are ordered like the integers of the same bits, whose minimum LLVM vectorises.
    keys = values.view(np.int32)
    best = np.int32(sign) * keys[0]
    for j in range(m):
        best = min(best, np.int32(sign) * keys[j])
    best *= np.int32(sign)
    start = 0
    while start + CHUNK <= m:
        found = 0
        for j in range(start, start + CHUNK):
            found += keys[j] == best
        if found > 0:
            break
        start += CHUNK
    while keys[start] != best:
        start += 1
    return start


@njit(nogil=True, cache=True)
def _take(G: np.ndarray, u: np.ndarray, p: int, last: int) -> None:
    """Row p of the symmetric G (lower half) into u, and row `last` into its place, so that what is left stays dense."""
    row = G[p]
    end = G[last]
    for j in range(p):
        u[j] = row[j]
        row[j] = end[j]
    if p < last:
        u[p] = end[p]
        row[p] = end[last]
        for j in range(p + 1, last):
            u[j] = G[j, p]
            G[j, p] = end[j]


@njit(nogil=True, cache=True)
def _refresh(
    addresses: tuple[int, int, int],
    H: np.ndarray,
    delta: np.ndarray,
    weight: np.ndarray,
    gone: np.ndarray,
    column: np.ndarray,
    m: int,
    A: np.ndarray,
    G: np.ndarray,
    w: np.ndarray,
) -> bool:
    """Recompute the inverse Hessian over what is left, and its weights, from H in float64: G and w without drift.

    G[:m, :m] = (H_RR)⁻¹ in its lower half, w[:m] = w_R - (H_RR)⁻¹ H_RM delta_M, M = gone, R = column[:m], delta what
    the weights of M changed by. A (at least m x m, float64) is work space.
    """
    b = np.zeros(m)
    for i in range(m):
        h = H[column[i]]
        for j in range(i, m):
            A[i, j] = h[column[j]]
        acc = 0.0
        for j in range(gone.shape[0]):
            acc -= h[gone[j]] * delta[gone[j]]
        b[i] = acc
    if not (in_place(addresses[1], A, m) and in_place(addresses[2], A, m)):
        return False
    x = np.zeros(m)
    for i in range(m):
        acc = A[i, i] * b[i]
        G[i, i] = A[i, i]
        for j in range(i + 1, m):
            G[j, i] = A[i, j]
            acc += A[i, j] * b[j]
            x[j] += A[i, j] * b[i]
        x[i] += acc
    for i in range(m):
        w[i] = weight[column[i]] + x[i]
    return True


@njit(nogil=True, cache=True)
def _trace_row(
    addresses: tuple[int, int, int],
    H: np.ndarray,
    inverse: np.ndarray,
    floor: np.ndarray,
    weight: np.ndarray,
    step: np.float32,
    low: np.float32,
    high: np.float32,
    first: np.ndarray,
    order: np.ndarray,
    losses: np.ndarray,
    levels: np.ndarray,
    G: np.ndarray,
    U: np.ndarray,
    lines: np.ndarray,
    A: np.ndarray,
) -> None:
    """Greedy OBS of one row: pivoted Cholesky of the inverse Hessian with lazy rank-k updates.

    `first` are columns that go first, to zero, in that order. After them the cheapest weight goes next, to zero where
    step = 0, else to its level; weights farther than half a step from theirs go before all others, farthest first,
    unless the one that is cheapest is exactly zero (OBC's rule for outliers). order, losses, levels (d,) are written.

    What is alive stays dense in the first m places: the last column takes the place of the one that goes. Float32
    updates drift with the condition of H, most at the end of a row, so the state is computed afresh in float64 once
    as few columns are left as A holds.
    """
    d = weight.shape[0]
    block = U.shape[0]
    w, g, lowest, score, away = lines[0], lines[1], lines[2], lines[3], lines[4]
    delta = lines[5]
    a = np.empty(block, np.float32)
    column = np.arange(d)
    for j in range(d):
        G[j, : j + 1] = inverse[j, : j + 1]
        w[j] = weight[j]
        lowest[j] = floor[j]
        g[j] = max(G[j, j], lowest[j])
    U[0, :] = 0.0
    m = d
    done = 0
    k = 0
    fresh = A.shape[0] < d
    _update(U[0], w, g, lowest, score, np.float32(0.0), np.float32(0.0), m)
    if step > 0.0:
        _round(w, g, score, away, step, low, high, m)
    position = np.arange(d if first.shape[0] > 0 else 0)
    while m > 0:
        level = np.float32(0.0)
        if done < first.shape[0]:
            p = position[first[done]]
        else:
            p = _extreme(score, m, 1)
            if step > 0.0:
                if w[p] != 0.0:
                    far = _extreme(away, m, -1)
                    if away[far] > np.float32(0.25) * step * step:
                        p = far
                level = min(max(np.rint(w[p] / step), low), high)
        root = np.sqrt(g[p])
        r = w[p] - level * step
        t = r / root
        order[done] = column[p]
        losses[done] = 0.5 * t * t
        levels[column[p]] = level
        delta[column[p]] = level * step - weight[column[p]]
        done += 1
        last = m - 1
        u = U[k]
        _take(G, u, p, last)
        for q in range(k):
            a[q] = U[q, p]
            U[q, p] = U[q, last]
        w[p], g[p], lowest[p], column[p] = w[last], g[last], lowest[last], column[last]
        if first.shape[0] > 0:
            position[column[p]] = p
        m = last
        _subtract_rows(u, U, a, k, m)
        _update(u, w, g, lowest, score, np.float32(1.0) / root, t, m)
        k += 1
        if fresh and 0 < m <= A.shape[0]:
            fresh = False
            if _refresh(addresses, H, delta, weight, order[:done], column, m, A, G, w):
                for j in range(m):
                    g[j] = max(G[j, j], lowest[j])
                    score[j] = w[j] * w[j] / g[j]
                k = 0
        if k == block:
            syrk_lower(addresses[0], G, U, m, k)
            k = 0
        if step > 0.0:
            _round(w, g, score, away, step, low, high, m)


@njit(nogil=True, cache=True)
def trace_rows(
    addresses: tuple[int, int, int],
    H: np.ndarray,
    inverse: np.ndarray,
    floor: np.ndarray,
    weight: np.ndarray,
    steps: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    first: np.ndarray,
    counts: np.ndarray,
    order: np.ndarray,
    losses: np.ndarray,
    levels: np.ndarray,
    G: np.ndarray,
    U: np.ndarray,
    lines: np.ndarray,
    A: np.ndarray,
) -> None:
    """`_trace_row` for every row of weight (rows, d) over one shared inverse Hessian (d, d).

    addresses: ssyrk, dpotrf, dpotri. H (d, d) float64, its inverse float32, lower half read; floor (d,) = 1/H_jj.
    Per row: steps, low, high (rows,), the first `counts` of `first` (rows, d). Work space: G (d, at least d),
    U (block, d), lines (LINES, d) float32, A float64, square, as wide as what is left when the state is refreshed.
    """
    for r in range(weight.shape[0]):
        _trace_row(
            addresses,
            H,
            inverse,
            floor,
            weight[r],
            steps[r],
            low[r],
            high[r],
            first[r, : counts[r]],
            order[r],
            losses[r],
            levels[r],
            G,
            U,
            lines,
            A,
        )
