# mypy: ignore-errors
# numba gives every scalar here one integer type; mypy sees numpy's and Python's in turn
"""Dependent (trellis-coded) quantisation inside the OBS error feedback, on the rate-distortion cost.

The decoder walks a row's columns in their stored order, and each code's parity picks the quantiser of the next (see
`storage.kernels`). So the encoder walks that order too, one factorisation for all rows, and each of its survivors
carries its own errors: what it fed forward depends on the path.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from autocompress.obs import blas
from autocompress.obs.kernels import FAST
from autocompress.obs.pruning import as_groups, hessian_scale, over_rows
from autocompress.obs.quantising import CODE_LIMIT, SAMPLE_ROWS, rate_table
from autocompress.storage.kernels import NEXT_STATE, STATES
from autocompress.threads import single_threaded

__all__ = ["trellis_codes"]

KEPT = 2  # survivors per state; the second costs as much time as the first and saves 1% of the bytes
BLOCK = 32  # columns that are decided together, once twice as many have been walked


@njit(inline="always")
def _enter(new, parent, value, state, cost, survivor, code) -> None:
    """Put a path into its state's list of KEPT, if it is cheaper than one of those."""
    end = (state + 1) * KEPT
    if cost >= new[end - 1]:
        return
    for i in range(end - KEPT, end):
        if cost < new[i]:
            for j in range(end - 1, i, -1):
                new[j], parent[j], value[j] = new[j - 1], parent[j - 1], value[j - 1]
            new[i], parent[i], value[i] = cost, survivor, code
            return


@njit(nogil=True, cache=True, fastmath=FAST)
def _dot(a, b, n) -> np.float32:
    acc = np.float32(0.0)
    for j in range(n):
        acc += a[j] * b[j]
    return acc


@njit(nogil=True, cache=True)
def _quantise_rows(F, pivot, weight, step, price, bits, codes) -> None:
    """Codes int32 (rows, d) of weight float32 (rows, d) for one step and price; bits (STATES, table) of index k at k +
    table // 2.

    Column i's target is w_i - sum over j < i of F_ij e_j, e the errors of the path; code q costs pivot_i (q step -
    target)² / 2. Candidates: both neighbours among the state's codes, and zero.
    """
    rows, d = weight.shape
    count = STATES * KEPT
    offset = bits.shape[1] // 2
    cost, new = np.empty(count), np.empty(count)
    parent, value = np.zeros(count, np.int64), np.zeros(count, np.int64)
    path, path_new = np.zeros((count, 2 * BLOCK), np.float32), np.zeros((count, 2 * BLOCK), np.float32)
    decided = np.zeros(d, np.float32)
    for r in range(rows):
        cost[:] = np.inf
        cost[0] = 0.0
        base = 0
        for i in range(d):
            n = i - base
            if n == 2 * BLOCK:  # the best path decides the older half; survivors that disagree end
                best = np.argmin(cost)
                for j in range(BLOCK):
                    codes[r, base + j] = path[best, j]
                    decided[base + j] = path[best, j] * step - weight[r, base + j]
                for h in range(count):
                    for j in range(BLOCK):
                        if path[h, j] != path[best, j]:
                            cost[h] = np.inf
                            break
                for h in range(count):
                    path[h, :BLOCK] = path[h, BLOCK:]
                base += BLOCK
                n = BLOCK
            row = F[i]
            recent = row[base:]
            centre = weight[r, i] - _dot(row, decided, base) + _dot(recent, weight[r, base:], n)
            unit = 0.5 * pivot[i] * step * step
            new[:] = np.inf
            for h in range(count):
                if cost[h] == np.inf:
                    continue
                state = h // KEPT
                odd = state & 1
                x = centre / step - _dot(recent, path[h], n)
                x = min(max(x, -CODE_LIMIT + 2.0), CODE_LIMIT - 2.0)
                below = 2 * int(np.floor((x - odd) / 2)) + odd
                for c in range(3):
                    q = below if c == 0 else below + 2 if c == 1 else 0
                    if c == 2 and (below == 0 or below == -2):
                        continue
                    k = (abs(q) + odd) >> 1
                    path_cost = cost[h] + unit * (q - x) * (q - x) + price * bits[state, min(k, offset) + offset]
                    _enter(new, parent, value, NEXT_STATE[2 * state + (k & 1)], path_cost, h, q)
            for h in range(count):
                cost[h] = new[h]
                if new[h] == np.inf:
                    continue
                g = parent[h]
                for j in range(n):
                    path_new[h, j] = path[g, j]
                path_new[h, n] = value[h]
            path, path_new = path_new, path
        best = np.argmin(cost)
        for j in range(d - base):
            codes[r, base + j] = path[best, j]


@njit(nogil=True, cache=True)
def _walk(codes, index, state) -> None:
    """The index of every code among its quantiser's, and the state that it was coded in; all of shape (rows, d)."""
    for r in range(codes.shape[0]):
        s = 0
        for i in range(codes.shape[1]):
            k = (abs(codes[r, i]) + (s & 1)) >> 1
            state[r, i] = s
            index[r, i] = k
            s = NEXT_STATE[2 * s + (k & 1)]


def _rate_tables(codes: np.ndarray, size: int) -> np.ndarray:
    """Bits of index k in every state, float32 (STATES, 2 size + 1), from the codes of a first pass."""
    flat = np.ascontiguousarray(codes.reshape(-1, codes.shape[-1]))
    index, state = np.empty_like(flat), np.empty_like(flat)
    _walk(flat, index, state)
    return np.stack([rate_table(index[state == s], size) for s in range(STATES)])


def trellis_codes(
    W: np.ndarray, H: np.ndarray, grid: Sequence[tuple[float, float]], threads: int = 0
) -> list[np.ndarray]:
    """Codes int32 in the shape of W for every (step, λ) of the grid; ŵ = code · step, and each row lies on the trellis.

    The cost is that of `rate_distortion_cells`, with a rate table per state, learned in three passes over a sample of
    rows. W (rows, d), H (d, d), or both with groups; λ in units of the error of one step, which here is half the
    distance between the codes of a state. Raises ValueError if H is not positive definite. Source: this project;
    dependent quantisation as in H. Schwarz et al., DCC 2019, and per-survivor processing (Raheli, Polydoros, Tzou 1995)
    of the errors of OBQ (arXiv 2208.11580).
    """
    weight, hessian = as_groups(W, H)
    groups, rows, d = weight.shape
    magnitude = float(np.abs(weight).max(initial=0.0)) or 1.0
    scaled = (weight / magnitude).astype(np.float32)
    factors, pivots = np.empty((groups, d, d), np.float32), np.empty((groups, d), np.float32)
    scales = np.empty(groups)
    with single_threaded():
        for g in range(groups):
            scales[g] = hessian_scale(hessian[g])
            # From the last column back: the feedback goes forward.
            h = np.divide(hessian[g, ::-1, ::-1], scales[g], order="C")
            if not blas.in_place(blas.DPOTRF, h, d):  # into its upper half, for a wide layer's is large
                raise ValueError("the Hessian is not positive definite; add damping")
            diagonal = np.diag(h)[::-1]
            np.divide(h[::-1, ::-1], diagonal[:, None], out=factors[g], casting="same_kind")
            pivots[g] = diagonal**2
    unit = 0.5 * float(np.exp(np.mean(np.log(pivots.astype(np.float64)) + np.log(scales)[:, None])))
    take = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE_ROWS)).astype(int))
    some = np.unique(np.linspace(0, groups - 1, min(groups, SAMPLE_ROWS)).astype(int))

    def quantise(g: int, which: np.ndarray, step: float, lam: float, bits: np.ndarray, threads: int) -> np.ndarray:
        w = scaled[g, which]
        codes = np.empty(w.shape, np.int32)
        price = lam * unit * step * step / scales[g]

        def run(part: slice) -> None:
            _quantise_rows(factors[g], pivots[g], w[part], np.float32(step), price, bits, codes[part])

        over_rows(run, len(w), threads)
        return codes

    found = []
    for absolute, lam in grid:
        step = absolute / magnitude
        size = int(min(np.ceil(0.625 / step) + 2, CODE_LIMIT // 2))
        bits = np.zeros((STATES, 2 * size + 1), np.float32)
        for _ in range(3 if lam > 0.0 else 0):
            bits = _rate_tables(np.stack([quantise(g, take, step, lam, bits, 1) for g in some]), size)
        codes = np.stack([quantise(g, np.arange(rows), step, lam, bits, threads) for g in range(groups)])
        found.append(codes.reshape(np.shape(W)))
    return found
