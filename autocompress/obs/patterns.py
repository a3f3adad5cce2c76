"""Masks of structured pruning: N:M, blocks, whole input and output channels, each chosen greedily by its OBS loss.

A layer's columns run over (input channels, kernel positions), positions fastest. A *unit* is what goes at once: some
columns of some consecutive rows. Rows whose units go together share one order, all the others have their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from autocompress.obs.pruning import as_groups, inverse_hessian, over_rows

__all__ = ["Units", "input_blocks", "nm_mask", "order_of_mask", "row_losses", "unit_mask", "unit_trace"]


@dataclass(frozen=True)
class Units:
    """The order in which units go and what each costs, both (groups, bands, units): a band is a run of rows that share
    their pattern. `columns` (units, width) are padded with -1; `rows` is how many rows a band has, the last one the
    rest.
    """

    columns: np.ndarray
    rows: int
    order: np.ndarray
    losses: np.ndarray


def input_blocks(d: int, positions: int, size: int) -> np.ndarray:
    """Columns of every run of `size` consecutive input channels at one kernel position, int64 (units, size).

    d columns = channels * positions. A last run that is shorter is padded with -1.
    """
    channels = d // positions
    starts = np.arange(0, channels, size)
    channel = starts[:, None] + np.arange(size)[None, :]
    columns = channel[:, None, :] * positions + np.arange(positions)[None, :, None]
    return np.where(channel[:, None, :] < channels, columns, -1).reshape(-1, size)


def unit_trace(W: np.ndarray, H: np.ndarray, columns: np.ndarray, rows: int = 1, threads: int = 0) -> Units:
    """Prune units greedily to the end: B = argmin Σ_r w_rB ([H⁻¹]_BB)⁻¹ w_rBᵀ over the rows r of a band, then the
    optimal update of the rest.

    W (rows, d) and H (d, d), or both with leading groups; columns (units, width) as `input_blocks` gives them, disjoint
    and together all d. The sum of the first n losses of a band, each half its score, is the band's exact error after n
    units. Source: OBC, arXiv 2208.11580, section 4 (block sparsity), summed over the rows that share a pattern.
    """
    return _trace(W, H, columns, rows, np.arange(len(columns)), np.ones(len(columns), np.int64), threads)


def nm_mask(W: np.ndarray, H: np.ndarray, kept: int, size: int, positions: int = 1, threads: int = 0) -> np.ndarray:
    """Which weights go so that at most `kept` of every `size` consecutive input channels stay, bool in the shape of W.

    Greedy OBS, one weight at a time; a run from which size - kept are gone loses no more. The last run of channels may
    be shorter and then loses fewer: with channels of zeros it is a whole one. Source: OBC, arXiv 2208.11580, section 4.
    """
    shape = np.shape(W)
    d = shape[-1]
    runs = input_blocks(d, positions, size)
    run_of = np.empty(d, np.int64)
    for i, run in enumerate(runs):
        run_of[run[run >= 0]] = i
    quota = np.maximum((runs >= 0).sum(axis=1) - kept, 0)
    found = _trace(W, H, np.arange(d)[:, None], 1, run_of, quota, threads)
    total = int(quota.sum())
    gone = np.zeros(found.order.shape, bool)
    np.put_along_axis(gone, found.order[..., :total].astype(np.int64), True, axis=-1)
    return gone.reshape(shape)


def unit_mask(units: Units, shape: tuple[int, ...], sparsity: float) -> np.ndarray:
    """Which weights go so that at least ceil(sparsity · size) do, always with the smallest *next* loss, bool `shape`.

    The heap rule of `pruned_counts` over bands, with units counted by the weights that they hold.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is {sparsity}, needed a fraction between 0 and 1")
    groups, bands, _ = units.order.shape
    rows, d = shape[-2], shape[-1]
    height = np.minimum(units.rows, rows - units.rows * np.arange(bands))
    width = (units.columns >= 0).sum(axis=1)
    weights = width[units.order] * height[None, :, None]
    first = np.argsort(np.maximum.accumulate(units.losses, axis=-1), axis=None, kind="stable")
    goal = np.ceil(sparsity * groups * rows * d - 1e-9)
    before = np.cumsum(weights.reshape(-1)[first]) - weights.reshape(-1)[first]
    gone = np.zeros((groups, bands, d + 1), bool)  # the last column takes the padding
    g, band, step = np.unravel_index(first[before < goal], units.order.shape)
    gone[g[:, None], band[:, None], units.columns[units.order[g, band, step]]] = True
    return np.repeat(gone[..., :d], units.rows, axis=1)[:, :rows].reshape(shape)


def row_losses(W: np.ndarray, H: np.ndarray) -> np.ndarray:
    """½ w H wᵀ of every row, (groups, rows): what losing it costs, for rows never make up for each other."""
    weight, hessian = as_groups(W, H)
    return 0.5 * np.einsum("grd,grd->gr", weight @ hessian, weight)


def order_of_mask(order: np.ndarray, gone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, counts) for `prune` and `salient_cells`: what is gone first, both parts in the order that was given."""
    taken = np.take_along_axis(gone, order.astype(np.int64), axis=-1)
    place = np.argsort(~taken, axis=-1, kind="stable")
    return np.take_along_axis(order, place, axis=-1), gone.sum(axis=-1).astype(np.int64)


def _trace(
    W: np.ndarray, H: np.ndarray, columns: np.ndarray, rows: int, run_of: np.ndarray, quota: np.ndarray, threads: int
) -> Units:
    """Order and losses of every band; a unit goes only while its run has quota left, the rest keep a loss of inf."""
    weight, hessian = as_groups(W, H)
    groups, height, _ = weight.shape
    bands, count = -(-height // rows), len(columns)
    total = int(quota.sum())
    order = np.full((groups, bands, count), -1, np.int32)
    losses = np.full((groups, bands, count), np.inf)
    columns, run_of = np.ascontiguousarray(columns, np.int64), np.ascontiguousarray(run_of, np.int64)
    for g in range(groups):
        inverse = inverse_hessian(hessian[g])

        def run(part: slice, g=g, inverse=inverse) -> None:
            for band in range(part.start, part.stop):
                own = np.ascontiguousarray(weight[g, band * rows : (band + 1) * rows])
                _band_trace(inverse, own, columns, run_of, quota.copy(), total, order[g, band], losses[g, band])

        over_rows(run, bands, threads)
    return Units(columns, rows, order, losses)


@njit(nogil=True, cache=True)
def _band_trace(
    inverse: np.ndarray,
    weight: np.ndarray,
    columns: np.ndarray,
    run_of: np.ndarray,
    quota: np.ndarray,
    total: int,
    order: np.ndarray,
    losses: np.ndarray,
) -> None:
    """Greedy OBS of one band in float64: a block-pivoted Cholesky factorisation of the inverse Hessian, left-looking.

    inverse (d, d) is never updated: row j of the current one is inverse[j] - Σ_q U[q, j] U[q], with one row of U for
    each column that is gone. weight (rows, d) is the band's; `blocks` holds [H⁻¹]_BB of every unit as it is now. `live`
    are the columns that may still go; the rest leaves U and w whenever a quarter of them is finished.
    """
    rows, d = weight.shape
    units, width = columns.shape
    w = weight.copy()
    blocks = np.zeros((units, width, width))
    size = np.zeros(units, np.int64)
    for b in range(units):
        while size[b] < width and columns[b, size[b]] >= 0:
            size[b] += 1
        for i in range(size[b]):
            for j in range(size[b]):
                blocks[b, i, j] = inverse[columns[b, i], columns[b, j]]
    columns = columns.copy()  # from here on places in `live`
    live = np.arange(d)
    U = np.empty((d, d))
    alive = np.ones(units, np.bool_)
    L = np.empty((width, width))
    best_L = np.empty((width, width))
    y = np.empty(width)
    t = np.empty((rows, width))
    past = np.empty((width, d))
    done = 0
    for step in range(total):
        best, at, left = np.inf, -1, 0
        for b in range(units):
            if not alive[b] or quota[run_of[b]] == 0:
                alive[b] = False
                continue
            n = size[b]
            left += n
            _cholesky(blocks[b], n, L)
            score = 0.0
            for r in range(rows):
                for i in range(n):
                    acc = w[r, columns[b, i]]
                    for j in range(i):
                        acc -= L[i, j] * y[j]
                    y[i] = acc / L[i, i]
                    score += y[i] * y[i]
            if score < best or at < 0:
                best, at = score, b
                best_L[:n, :n] = L[:n, :n]
        order[step] = at
        losses[step] = 0.5 * best
        if 4 * left <= 3 * live.size:
            keep = np.zeros(live.size, np.bool_)
            for b in range(units):
                if alive[b]:
                    keep[columns[b, : size[b]]] = True
            place, index = np.cumsum(keep) - 1, np.flatnonzero(keep)
            for b in range(units):
                for i in range(size[b]):
                    columns[b, i] = place[columns[b, i]] if alive[b] else 0
            live, w = live[index], w[:, index]
            older = U
            U = np.empty((d, live.size))
            for q in range(done):
                U[q] = older[q][index]
        alive[at] = False
        quota[run_of[at]] -= 1
        n, m = size[at], live.size
        pivot = U[done : done + n]  # becomes U_B = L⁻¹ [H⁻¹]_B
        for i in range(n):
            pivot[i] = inverse[live[columns[at, i]]][live]
            for q in range(done):
                past[i, q] = U[q, columns[at, i]]
        if done:
            pivot -= np.dot(past[:n, :done].copy(), U[:done])
        for i in range(n):
            u = pivot[i]
            for q in range(i):
                a = best_L[i, q]
                v = pivot[q]
                for j in range(m):
                    u[j] -= a * v[j]
            inv = 1.0 / best_L[i, i]
            for j in range(m):
                u[j] *= inv
        for r in range(rows):
            for i in range(n):
                acc = w[r, columns[at, i]]
                for j in range(i):
                    acc -= best_L[i, j] * t[r, j]
                t[r, i] = acc / best_L[i, i]
            for i in range(n):
                a = t[r, i]
                u = pivot[i]
                for j in range(m):
                    w[r, j] -= a * u[j]
        for b in range(units):
            if alive[b]:
                for k in range(done, done + n):
                    for i in range(size[b]):
                        a = U[k, columns[b, i]]
                        for j in range(size[b]):
                            blocks[b, i, j] -= a * U[k, columns[b, j]]
        done += n


@njit(nogil=True, cache=True)
def _cholesky(A: np.ndarray, n: int, L: np.ndarray) -> None:
    """Lower factor of A[:n, :n]; a pivot that rounding made too small is held at a relative 1e-12."""
    for i in range(n):
        for j in range(i + 1):
            acc = A[i, j]
            for k in range(j):
                acc -= L[i, k] * L[j, k]
            L[i, j] = np.sqrt(max(acc, 1e-12 * A[i, i], 1e-300)) if i == j else acc / L[j, j]
