"""Compiled passes over the weights that pruning left: `obs.salient_cells`.

All kernels release the GIL, allocate only their work space, and give the same bits for any number of threads, because
no row ever meets another. Float32 inside (engine.md section 1); callers scale weights and Hessian to about one first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from autocompress.obs.blas import FAST, in_place

__all__ = ["PATHS", "choose", "salient_rows", "shared_block"]

PATHS = 8  # side by side, where an option is made: docs/options.md has what more and fewer do
BLOCK = 64  # columns that are decided together, once twice as many are open


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


@njit(inline="always")
def _enter(
    found: np.ndarray, parent: np.ndarray, value: np.ndarray, live: int, cost: float, path: int, code: int
) -> int:
    """Put a path into the list of the cheapest, by cost, if it is one of them. Returns how many there are."""
    i = live
    if live == found.shape[0]:
        if not cost < found[live - 1]:
            return live
        i -= 1
    else:
        live += 1
    while i > 0 and cost < found[i - 1]:
        found[i], parent[i], value[i] = found[i - 1], parent[i - 1], value[i - 1]
        i -= 1
    found[i], parent[i], value[i] = cost, path, code
    return live


@njit(inline="always")
def _value(code: int, levels: np.ndarray) -> Any:
    """What a code stands for, in steps."""
    return levels[code - 1] if code > 0 and levels.shape[0] > 0 else np.float32(code)


@njit(nogil=True, cache=True)
def _pass(
    A: np.ndarray,
    weight: np.ndarray,
    base: np.ndarray,
    gone: np.ndarray,
    step: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    price: float,
    bits: np.ndarray,
    offset: int,
    levels: np.ndarray,
    paths: np.ndarray,
    parents: np.ndarray,
    values: np.ndarray,
    e: np.ndarray,
    codes: np.ndarray,
) -> None:
    """Quantise columns n-1 ... 0, each against the error of those before it, along the cheapest paths side by side.

    The target of column a is w_a - (base_a + Σ_{b > a} C_ba e_b)/C_aa, and code q costs C_aa² (q step - target)²/2 +
    price bits(q); A (n, n) is Cᵀ, upper half. A path is a choice of codes so far with its own errors; candidates to
    continue it are both neighbours on the grid and, where bits have a price, zero. Once `2 BLOCK` columns are open, the
    cheapest path decides the older half and those that differ from it there end. Columns that are gone are zero, and
    so are those whose step is. levels (any number, ascending): where there are some, code q > 0 is levels[q - 1] steps.

    weight, base, gone, step, low, high (n,); work space: paths float32 (2, most, 2 BLOCK), parents and values int32
    (at least n, most), most being how many paths are kept. e and codes (n,) are written.
    """
    n, most, last = weight.shape[0], paths.shape[1], bits.shape[0] - 1
    cost, found = np.zeros(most), np.empty(most)
    ancestor = np.empty(most, np.int64)
    now, live, top = 0, 1, n  # columns from `top` on are decided
    for a in range(n - 1, -1, -1):
        opened = top - 1 - a
        if opened == 2 * BLOCK:
            for h in range(live):
                at = h
                for column in range(a + 1, top - BLOCK):
                    at = parents[column, at]
                ancestor[h] = at
            _decide(top - BLOCK, top, ancestor[0], parents, values, weight, step, levels, e, codes)
            for h in range(live):
                if ancestor[h] != ancestor[0]:
                    cost[h] = np.inf
                for j in range(2 * BLOCK - 1, BLOCK - 1, -1):
                    paths[now, h, j] = paths[now, h, j - BLOCK]
            top -= BLOCK
            opened = BLOCK
        first = 2 * BLOCK - opened
        row, s = A[a], step[a]
        c = row[a]
        entered = 0
        if gone[a] or s == 0.0:
            for h in range(live):
                found[h], parents[a, h], values[a, h] = cost[h], h, 0
            entered = live
        else:
            centre = weight[a] - (base[a] + _dot(row, e, top, n)) / c
            unit = 0.5 * c * c * s * s
            for h in range(live):
                if cost[h] == np.inf:
                    continue
                x = (centre - _dot(row[a + 1 :], paths[now, h, first:], 0, opened) / c) / s
                if levels.shape[0] > 0:
                    above = min(np.searchsorted(levels, x), levels.shape[0] - 1) + 1
                    below = max(above - 1, 1)
                else:
                    below = int(min(max(np.floor(x), low[a]), high[a]))
                    above = min(below + 1, high[a])
                for candidate in range(3):
                    q = below if candidate == 0 else above if candidate == 1 else 0
                    if candidate == 1 and above == below:
                        continue
                    if candidate == 2 and (price <= 0.0 or below == 0 or above == 0 or not low[a] <= 0 <= high[a]):
                        continue
                    miss = _value(q, levels) - x
                    total = cost[h] + unit * miss * miss
                    if price > 0.0:
                        total += price * bits[min(max(q + offset, 0), last)]
                    entered = _enter(found, parents[a], values[a], entered, total, h, q)
        for k in range(entered):
            g = parents[a, k]
            for j in range(first, 2 * BLOCK):
                paths[1 - now, k, j] = paths[now, g, j]
            paths[1 - now, k, first - 1] = _value(values[a, k], levels) * s - weight[a]
            cost[k] = found[k]
        now, live = 1 - now, entered
    if n > 0:
        _decide(0, top, 0, parents, values, weight, step, levels, e, codes)


@njit(nogil=True, cache=True)
def _decide(
    start: int,
    stop: int,
    path: int,
    parents: np.ndarray,
    values: np.ndarray,
    weight: np.ndarray,
    step: np.ndarray,
    levels: np.ndarray,
    e: np.ndarray,
    codes: np.ndarray,
) -> None:
    """Codes and errors of columns start ... stop - 1 along one path, by its number at column `start`."""
    for column in range(start, stop):
        codes[column] = values[column, path]
        e[column] = _value(codes[column], levels) * step[column] - weight[column]
        path = parents[column, path]


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
    run: np.ndarray,
    price: np.ndarray,
    bits: np.ndarray,
    offset: np.ndarray,
    levels: np.ndarray,
    count: np.ndarray,
    codes: np.ndarray,
    refits: np.ndarray,
    most: int,
) -> int:
    """Prune each row to `counts`, refit it, and quantise what is left once for every cell, along `most` paths.

    H (d, d) float32; weight (rows, d) float32; order (rows, d); counts (rows,); cells c: steps (cells, rows, runs), of
    run[c] consecutive columns each, low and high the same, limits of the codes, price (cells,), bits (cells, table) of
    code q at q + offset[c], levels (cells, any) of which the first count[c] are the cell's. Written are codes (cells,
    rows, d) and refits (rows, d), the pruned weights before quantisation. Returns the first row whose factorisation
    failed, or -1.
    """
    rows, d = weight.shape
    cells = price.shape[0]
    A = np.empty((d, d), np.float32)
    refit = np.empty(d, np.float32)
    e = np.empty(d, np.float32)
    line = np.empty(d, np.int32)
    base, gone = np.zeros(d, np.float32), np.zeros(d, np.bool_)
    step, lowest, highest = np.empty(d, np.float32), np.empty(d, np.int64), np.empty(d, np.int64)
    paths = np.empty((2, most, 2 * BLOCK), np.float32)
    parents, values = np.empty((d, most), np.int32), np.empty((d, most), np.int32)
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
            for i in range(m):
                at = kept[i] // run[c]
                step[i], lowest[i], highest[i] = steps[c, r, at], low[c, r, at], high[c, r, at]
            _pass(
                B,
                refit[:m],
                base,
                gone,
                step,
                lowest,
                highest,
                price[c],
                bits[c],
                offset[c],
                levels[c, : count[c]],
                paths,
                parents,
                values,
                e[:m],
                line,
            )
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
    levels: np.ndarray,
    e: np.ndarray,
    codes: np.ndarray,
    most: int,
) -> None:
    """One block of columns of a pass that all rows make in one order, from the block's last column to its first.

    A (n, n): the block of Cᵀ (upper half), H = C Cᵀ; base (rows, n): what the columns after the block contribute,
    Σ_b C_ba e_b; weight, gone, steps, low, high (rows, n). Columns that are gone are zero and stay so. e (rows, n) and
    codes are written.
    """
    rows, n = weight.shape
    paths = np.empty((2, most, 2 * BLOCK), np.float32)
    parents, values = np.empty((n, most), np.int32), np.empty((n, most), np.int32)
    for r in range(rows):
        _pass(
            A,
            weight[r],
            base[r],
            gone[r],
            steps[r],
            low[r],
            high[r],
            price,
            bits,
            offset,
            levels,
            paths,
            parents,
            values,
            e[r],
            codes[r],
        )
