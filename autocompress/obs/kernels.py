"""Compiled passes over the weights that pruning left, most salient first: `obs.salient_cells`.

All kernels release the GIL, allocate only their work space, and give the same bits for any number of threads, because
no row ever meets another. Float32 inside (engine.md section 1); callers scale weights and Hessian to about one first.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from autocompress.obs.blas import FAST, in_place

__all__ = ["choose", "salient_rows", "shared_block"]


@njit(nogil=True, cache=True)
def _factor(
    address: int,
    H: np.ndarray,
    weight: np.ndarray,
    kept: np.ndarray,
    gone: np.ndarray,
    A: np.ndarray,
    refit: np.ndarray,
) -> bool:
    """Cᵀ of H over the kept columns into A (upper half, row-major), and the optimal weights of the kept columns.

    With M the columns that are gone, the refit is w_R + H_RR⁻¹ H_RM w_M (the minimum of the layer error with w_M = 0).
    """
    m = kept.shape[0]
    for i in range(m):
        h = H[kept[i]]
        for j in range(i, m):
            A[i, j] = h[kept[j]]
        acc = 0.0
        for j in range(gone.shape[0]):
            acc += h[gone[j]] * weight[gone[j]]
        refit[i] = acc
    if not in_place(address, A, m):
        return False
    if gone.shape[0] > 0:
        for i in range(m):  # C y = b, with C[j, i] = A[i, j]
            y = refit[i] / A[i, i]
            refit[i] = y
            for j in range(i + 1, m):
                refit[j] -= A[i, j] * y
        for i in range(m - 1, -1, -1):  # Cᵀ x = y
            acc = refit[i]
            for j in range(i + 1, m):
                acc -= A[i, j] * refit[j]
            refit[i] = acc / A[i, i]
    else:
        refit[:m] = 0.0
    for i in range(m):
        refit[i] += weight[kept[i]]
    return True


@njit(nogil=True, cache=True, fastmath=FAST)
def _dot(a: np.ndarray, b: np.ndarray, start: int, stop: int) -> np.float32:
    acc = np.float32(0.0)
    for j in range(start, stop):
        acc += a[j] * b[j]
    return acc


@njit(nogil=True, cache=True)
def choose(
    target: float, curvature: float, step: float, low: int, high: int, price: float, bits: np.ndarray, offset: int
) -> int:
    """The code q of least curvature (q step - target)² / 2 + price bits(q): a neighbour on the grid, or zero."""
    last = bits.shape[0] - 1
    x = target / step
    below = int(min(max(np.floor(x), low), high))
    above = min(below + 1, high)
    if price <= 0.0:
        return above if abs(above - x) < abs(below - x) else below
    unit = 0.5 * curvature * step * step
    best = below
    cost = unit * (below - x) * (below - x) + price * bits[min(max(below + offset, 0), last)]
    other = unit * (above - x) * (above - x) + price * bits[min(max(above + offset, 0), last)]
    if other < cost:
        best = above
        cost = other
    if low <= 0 <= high:
        other = unit * x * x + price * bits[offset]
        if other <= cost:
            best = 0
    return best


@njit(nogil=True, cache=True)
def _salient_pass(
    A: np.ndarray,
    refit: np.ndarray,
    m: int,
    step: float,
    low: int,
    high: int,
    price: float,
    bits: np.ndarray,
    offset: int,
    e: np.ndarray,
    codes: np.ndarray,
) -> None:
    """Quantise most-salient-first: columns m-1 ... 0 of the pruning order, each against the error of those before it.

    The target of column a is w_a - sum over b > a of C_ba e_b / C_aa, and code q costs C_aa² (q step - target)² / 2 +
    price bits(q).
    """
    for a in range(m - 1, -1, -1):
        row = A[a]
        c = row[a]
        target = refit[a] - _dot(row, e, a + 1, m) / c
        codes[a] = choose(target, c * c, step, low, high, price, bits, offset)
        e[a] = codes[a] * step - refit[a]


@njit(nogil=True, cache=True)
def salient_rows(
    address: int,
    H: np.ndarray,
    weight: np.ndarray,
    order: np.ndarray,
    counts: np.ndarray,
    steps: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    price: np.ndarray,
    bits: np.ndarray,
    offset: np.ndarray,
    codes: np.ndarray,
    refits: np.ndarray,
) -> int:
    """Prune each row to `counts`, refit it, and quantise what is left once for every cell.

    H (d, d) float32; weight (rows, d) float32; order (rows, d); counts (rows,); cells c: steps (cells, rows), low and
    high (cells, rows) limits of the codes, price (cells,), bits (cells, table) of code q at q + offset[c]; codes
    (cells, rows, d) and refits (rows, d), the pruned weights before quantisation, are written. Returns the first row
    whose factorisation failed, or -1.
    """
    rows, d = weight.shape
    cells = price.shape[0]
    A = np.empty((d, d), np.float32)
    refit = np.empty(d, np.float32)
    e = np.empty(d, np.float32)
    line = np.empty(d, np.int32)
    for r in range(rows):
        n = counts[r]
        m = d - n
        refits[r, :] = 0.0
        for c in range(cells):
            codes[c, r, :] = 0
        if m == 0:
            continue
        kept = order[r, n:]
        B = A[:m].reshape(-1)[: m * m].reshape(m, m)
        if r > 0 and n == 0 and counts[r - 1] == 0 and np.array_equal(kept, order[r - 1]):
            for i in range(d):  # the factor is that of the row before
                refit[i] = weight[r, kept[i]]
        elif not _factor(address, H, weight[r], kept, order[r, :n], B, refit):
            return r
        for i in range(m):
            refits[r, kept[i]] = refit[i]
        for c in range(cells):
            _salient_pass(B, refit, m, steps[c, r], low[c, r], high[c, r], price[c], bits[c], offset[c], e, line)
            for i in range(m):
                codes[c, r, kept[i]] = line[i]
    return -1


@njit(nogil=True, cache=True)
def shared_block(
    A: np.ndarray,
    base: np.ndarray,
    weight: np.ndarray,
    gone: np.ndarray,
    steps: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    price: float,
    bits: np.ndarray,
    offset: int,
    e: np.ndarray,
    codes: np.ndarray,
) -> None:
    """One block of columns of a pass that all rows make in one order, from the block's last column to its first.

    A (n, n): the block of Cᵀ (upper half), H = C Cᵀ; base (rows, n): what the columns after the block contribute,
    Σ_b C_ba e_b; weight, gone, steps, low, high (rows, n). Columns that are gone are zero and stay so. e (rows, n) and
    codes are written.
    """
    rows, n = weight.shape
    for r in range(rows):
        for a in range(n - 1, -1, -1):
            if gone[r, a]:
                e[r, a] = 0.0
                codes[r, a] = 0
                continue
            c = A[a, a]
            target = weight[r, a] - (base[r, a] + _dot(A[a], e[r], a + 1, n)) / c
            codes[r, a] = choose(target, c * c, steps[r, a], low[r, a], high[r, a], price, bits, offset)
            e[r, a] = codes[r, a] * steps[r, a] - weight[r, a]
