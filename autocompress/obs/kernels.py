"""Compiled kernels of the engine (numba): loops over one row at a time, rows independent, no Python objects.

All kernels release the GIL, allocate only their work space, and give the same bits for any number of threads, because
no row ever meets another. Float32 inside (engine.md section 1); callers scale weights and Hessian to about one first.

BLAS and LAPACK come from SciPy's own library through a function address. The address is an argument, not a global, so
that numba can keep the compiled code on disk: start-up would cost seconds otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import get_cython_function_address, intrinsic

__all__ = ["DPOTRF", "DPOTRI", "POTRF", "SYRK", "layer_trace", "salient_rows"]

SYRK: int = get_cython_function_address("scipy.linalg.cython_blas", "ssyrk")
POTRF: int = get_cython_function_address("scipy.linalg.cython_lapack", "spotrf")
DPOTRF: int = get_cython_function_address("scipy.linalg.cython_lapack", "dpotrf")
DPOTRI: int = get_cython_function_address("scipy.linalg.cython_lapack", "dpotri")

# contract: fused multiply-add. reassoc: vectorised sums. The order of operations is fixed at compile time, so results
# repeat.
FAST = {"contract", "reassoc", "nsz", "arcp"}


@intrinsic
def _call_pointers(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call a C function of the given address whose arguments are all pointers, given as a tuple of integers."""
    signature = types.void(address, arguments)
    count = len(arguments)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [pointer] * count)
        function = builder.inttoptr(values[0], function_type.as_pointer())
        items = [builder.inttoptr(builder.extract_value(values[1], i), pointer) for i in range(count)]
        builder.call(function, items)
        return context.get_dummy_value()

    return signature, codegen


@njit(nogil=True, cache=True)
def _syrk_lower(
    address: int, G: np.ndarray, U: np.ndarray, m: int, k: int, ints: np.ndarray, reals: np.ndarray, chars: np.ndarray
) -> None:
    """G[:m, :m] -= U[:k, :m].T @ U[:k, :m], lower half of the row-major G only (BLAS sees its transpose: the upper
    half).
    """
    ints[0] = m
    ints[1] = k
    ints[2] = U.shape[1]
    ints[3] = G.shape[1]
    chars[0] = 85  # 'U'
    chars[1] = 78  # 'N'
    reals[0] = -1.0
    reals[1] = 1.0
    i = ints.ctypes.data
    r = reals.ctypes.data
    c = chars.ctypes.data
    _call_pointers(address, (c, c + 1, i, i + 4, r, U.ctypes.data, i + 8, r + 4, G.ctypes.data, i + 12))


@njit(nogil=True, cache=True)
def _potrf(address: int, A: np.ndarray, m: int, ints: np.ndarray, chars: np.ndarray) -> int:
    """Cholesky A[:m, :m] = Cᵀ... in place: row-major A holds Cᵀ in its upper half (LAPACK sees the lower half). Returns
    info.
    """
    ints[0] = m
    ints[1] = A.shape[1]
    ints[2] = 0
    chars[0] = 76  # 'L'
    i = ints.ctypes.data
    _call_pointers(address, (chars.ctypes.data, i, A.ctypes.data, i + 4, i + 8))
    return ints[2]


@njit(nogil=True, cache=True, fastmath=FAST)
def _subtract_rows(u: np.ndarray, U: np.ndarray, p: int, s: int, m: int) -> None:
    """u -= sum over q < s of U[q, p] U[q, :]; eight rows per sweep, so that u is read and written once for eight
    products.
    """
    q = 0
    while q + 8 <= s:
        a0, a1, a2, a3 = U[q, p], U[q + 1, p], U[q + 2, p], U[q + 3, p]
        a4, a5, a6, a7 = U[q + 4, p], U[q + 5, p], U[q + 6, p], U[q + 7, p]
        u0, u1, u2, u3 = U[q], U[q + 1], U[q + 2], U[q + 3]
        u4, u5, u6, u7 = U[q + 4], U[q + 5], U[q + 6], U[q + 7]
        for j in range(m):
            u[j] -= (
                a0 * u0[j] + a1 * u1[j] + a2 * u2[j] + a3 * u3[j] + a4 * u4[j] + a5 * u5[j] + a6 * u6[j] + a7 * u7[j]
            )
        q += 8
    while q < s:
        a = U[q, p]
        v = U[q]
        for j in range(m):
            u[j] -= a * v[j]
        q += 1


@njit(nogil=True, cache=True, fastmath=FAST)
def _step(
    u: np.ndarray,
    w: np.ndarray,
    g: np.ndarray,
    floor: np.ndarray,
    score: np.ndarray,
    dead: np.ndarray,
    inv: float,
    t: float,
    m: int,
) -> None:
    """Scale the pivot row, then w -= u t, g -= u² (never below 1/H_jj, its exact lower bound), score = w²/g (inf where
    dead).
    """
    for j in range(m):
        x = u[j] * inv
        u[j] = x
        v = w[j] - x * t
        w[j] = v
        h = max(g[j] - x * x, floor[j])
        g[j] = h
        score[j] = v * v / h + dead[j]


@njit(nogil=True, cache=True, fastmath=FAST)
def _least(score: np.ndarray, start: int, stop: int) -> float:
    least = score[start]
    for j in range(start + 1, stop):
        least = min(least, score[j])
    return least


@njit(nogil=True, cache=True)
def _argmin(score: np.ndarray, dead: np.ndarray, m: int) -> int:
    """First index of the least score; if every score is infinite (overflow), the first column that is alive."""
    best = np.float32(np.inf)
    at = -1
    for start in range(0, m, 64):
        stop = min(start + 64, m)
        least = _least(score, start, stop)
        if least < best:
            best = least
            at = start
    if at < 0:
        for j in range(m):
            if dead[j] == 0.0:
                return j
    while score[at] != best:
        at += 1
    return at


@njit(nogil=True, cache=True)
def _gather(target: np.ndarray, source: np.ndarray, index: np.ndarray, m: int) -> None:
    for j in range(m):
        target[j] = source[index[j]]


@njit(nogil=True, cache=True)
def _refresh(
    addresses: tuple[int, int, int],
    H: np.ndarray,
    weight: np.ndarray,
    gone: np.ndarray,
    column: np.ndarray,
    m: int,
    G: np.ndarray,
    w: np.ndarray,
    ints: np.ndarray,
    chars: np.ndarray,
) -> bool:
    """Recompute the inverse Hessian over what is left, and its weights, from H in float64: G and w without drift.

    G[:m, :m] = (H_RR)⁻¹ in its lower half, w[:m] = w_R + (H_RR)⁻¹ H_RM w_M with M = gone, R = column[:m].
    """
    A = np.empty((m, m))
    b = np.zeros(m)
    for i in range(m):
        h = H[column[i]]
        for j in range(i, m):
            A[i, j] = h[column[j]]
        for j in range(gone.shape[0]):
            b[i] += h[gone[j]] * weight[gone[j]]
    ints[0] = m
    ints[1] = m
    chars[0] = 76  # 'L' for LAPACK, the upper half of a row-major array
    i32 = ints.ctypes.data
    for k in range(1, 3):  # dpotrf, then dpotri
        ints[2] = 0
        _call_pointers(addresses[k], (chars.ctypes.data, i32, A.ctypes.data, i32 + 4, i32 + 8))
        if ints[2] != 0:
            return False
    for i in range(m):
        acc = A[i, i] * b[i]
        for j in range(i):
            G[i, j] = A[j, i]
            acc += A[j, i] * b[j]
        G[i, i] = A[i, i]
        for j in range(i + 1, m):
            acc += A[i, j] * b[j]
        w[i] = weight[column[i]] + acc
    return True


@njit(nogil=True, cache=True)
def _row_trace(
    addresses: tuple[int, int, int],
    H: np.ndarray,
    inverse: np.ndarray,
    floor: np.ndarray,
    weight: np.ndarray,
    order: np.ndarray,
    losses: np.ndarray,
    block: int,
) -> None:
    """Exact greedy OBS of one row: pivoted Cholesky of the inverse Hessian with lazy rank-`block` updates.

    H (d, d) float64 and its inverse in float32, lower half read; floor (d,) = 1/H_jj; weight (d,); order, losses (d,)
    are written. Float32 updates drift with the condition of H, most at the end of a row, so the state is computed
    afresh once a quarter of the columns is left (a few percent of the work).
    """
    address = addresses[0]
    d = weight.shape[0]
    G = inverse.copy()
    U = np.empty((block, d), np.float32)
    w = weight.copy()
    g = np.empty(d, np.float32)
    lowest = floor.copy()
    score = np.empty(d, np.float32)
    dead = np.zeros(d, np.float32)  # 0 alive, inf finished
    alive = np.empty(d, np.int64)
    column = np.arange(d)
    ints = np.zeros(4, np.int32)
    reals = np.zeros(2, np.float32)
    chars = np.zeros(2, np.uint8)
    for j in range(d):
        g[j] = max(G[j, j], lowest[j])
        score[j] = w[j] * w[j] / g[j]
    m = d
    done = 0
    fresh = True
    while m > 0:
        k = min(block, m)
        for s in range(k):
            p = _argmin(score, dead, m)
            root = np.sqrt(g[p])
            t = w[p] / root
            order[done] = column[p]
            losses[done] = 0.5 * t * t
            done += 1
            dead[p] = np.float32(np.inf)
            u = U[s]
            u[:p] = G[p, :p]
            for j in range(p, m):
                u[j] = G[j, p]
            _subtract_rows(u, U, p, s, m)
            _step(u, w, g, lowest, score, dead, np.float32(1.0) / root, t, m)
        # Compact: columns that are finished leave U, the lower half of G, and the vectors; alive[i] >= i, so in place
        # is safe.
        left = 0
        for j in range(m):
            if dead[j] == 0.0:
                alive[left] = j
                left += 1
        m = left
        for q in range(k):
            _gather(U[q], U[q], alive, m)
        for i in range(m):
            _gather(G[i], G[alive[i]], alive, i + 1)
        _gather(w, w, alive, m)
        _gather(g, g, alive, m)
        _gather(lowest, lowest, alive, m)
        _gather(score, score, alive, m)
        for i in range(m):
            column[i] = column[alive[i]]
        dead[:m] = 0.0
        if m > 0:
            if fresh and 4 * m <= d:
                fresh = False
                if _refresh(addresses, H, weight, order[:done], column, m, G, w, ints, chars):
                    for j in range(m):
                        g[j] = max(G[j, j], lowest[j])
                        score[j] = w[j] * w[j] / g[j]
                    continue
            _syrk_lower(address, G, U, m, k, ints, reals, chars)


@njit(nogil=True, cache=True)
def layer_trace(
    addresses: tuple[int, int, int],
    H: np.ndarray,
    inverse: np.ndarray,
    floor: np.ndarray,
    weight: np.ndarray,
    order: np.ndarray,
    losses: np.ndarray,
    block: int,
) -> None:
    """`_row_trace` for every row of weight (rows, d) over one shared inverse Hessian (d, d)."""
    for r in range(weight.shape[0]):
        _row_trace(addresses, H, inverse, floor, weight[r], order[r], losses[r], block)


@njit(nogil=True, cache=True)
def _factor(
    address: int,
    H: np.ndarray,
    weight: np.ndarray,
    kept: np.ndarray,
    gone: np.ndarray,
    A: np.ndarray,
    refit: np.ndarray,
    ints: np.ndarray,
    chars: np.ndarray,
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
    if _potrf(address, A, m, ints, chars) != 0:
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
    price bits(q). Candidates: both neighbours on the grid, and zero (if the grid has it).
    """
    last = bits.shape[0] - 1
    for a in range(m - 1, -1, -1):
        row = A[a]
        c = row[a]
        target = refit[a] - _dot(row, e, a + 1, m) / c
        x = target / step
        below = int(min(max(np.floor(x), low), high))
        above = min(below + 1, high)
        if price > 0.0:
            unit = 0.5 * c * c * step * step
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
        else:
            best = above if abs(above - x) < abs(below - x) else below
        codes[a] = best
        e[a] = best * step - refit[a]


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
    ints = np.zeros(4, np.int32)
    chars = np.zeros(2, np.uint8)
    for r in range(rows):
        n = counts[r]
        m = d - n
        refits[r, :] = 0.0
        for c in range(cells):
            codes[c, r, :] = 0
        if m == 0:
            continue
        kept = order[r, n:]
        if not _factor(
            address, H, weight[r], kept, order[r, :n], A[:m].reshape(-1)[: m * m].reshape(m, m), refit, ints, chars
        ):
            return r
        B = A[:m].reshape(-1)[: m * m].reshape(m, m)
        for i in range(m):
            refits[r, kept[i]] = refit[i]
        for c in range(cells):
            _salient_pass(B, refit, m, steps[c, r], low[c, r], high[c, r], price[c], bits[c], offset[c], e, line)
            for i in range(m):
                codes[c, r, kept[i]] = line[i]
    return -1
