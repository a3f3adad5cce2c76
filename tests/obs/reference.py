"""Optimal Brain Compression in float64, written to be read: the oracle that the engine is tested against.

Every function keeps the inverse Hessian `G = H^-1` of a row in full and downdates it step by step, as the published
algorithm does; nothing is blocked, factorised, reordered or shared between rows. `W` is (rows, d), `H` is (d, d),
damping included.

Source: OBC, arXiv 2208.11580, sections 4 and 5; what the paper leaves open (outliers, grids, counts) follows its code.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Grid",
    "Replay",
    "band_losses",
    "block_losses",
    "block_prune",
    "damped",
    "greedy_quantise",
    "input_channel_groups",
    "is_greedy_quantisation",
    "layer_error",
    "nm_prune",
    "prune_trace",
    "pruned_counts_flat",
    "pruned_counts_heap",
    "quantise_in_order",
    "rebuild",
    "replay_codes",
    "replay_order",
    "search_grid",
]

Matrix = NDArray[np.float64]
Indices = NDArray[np.int32] | NDArray[np.int64]


def damped(hessian: Matrix, rel_damp: float) -> Matrix:
    """`H + rel_damp * mean(diag H) * I`: with it a dead column has a small curvature and is pruned like any other."""
    H = np.array(hessian, dtype=np.float64)
    return H + rel_damp * np.mean(np.diag(H)) * np.eye(len(H))


def layer_error(W: Matrix, W_hat: Matrix, H: Matrix) -> float:
    """`1/2 tr(dW H dW^T)`, one row at a time."""
    return sum(0.5 * float(e @ H @ e) for e in np.asarray(W_hat, np.float64) - np.asarray(W, np.float64))


def _inverse(H: Matrix) -> Matrix:
    G = np.linalg.inv(np.asarray(H, np.float64))
    return (G + G.T) / 2


def _drop(G: Matrix, j: int) -> Matrix:
    """Inverse Hessian of what is left once weight `j` is decided; its row and column become exactly zero."""
    G = G - np.outer(G[:, j], G[j]) / G[j, j]
    G[j, :] = G[:, j] = 0.0
    return G


# ------------------------------------------------------------------------------------------------- unstructured pruning


def prune_trace(W: Matrix, H: Matrix) -> tuple[Indices, Matrix]:
    """Column that goes at each step, and its `w_j^2 / (2 G_jj)`: both (rows, d)."""
    rows, d = W.shape
    order, losses = np.zeros((rows, d), np.int64), np.zeros((rows, d))
    for i in range(rows):
        w, G, alive = W[i].astype(np.float64), _inverse(H), np.ones(d, bool)
        for t in range(d):
            scores = np.full(d, np.inf)
            scores[alive] = w[alive] ** 2 / np.diag(G)[alive]
            j = int(np.argmin(scores))
            order[i, t], losses[i, t] = j, scores[j] / 2
            w, G = w - G[:, j] * (w[j] / G[j, j]), _drop(G, j)
            alive[j] = False
            w[~alive] = 0.0
    return order, losses


@dataclass(frozen=True)
class Replay:
    """What a given sequence of decisions really costs, step by step, each (rows, d).

    `losses` are exact for that sequence; `excess` says how much worse than the best choice each step was: relative to
    the best score for pruning orders, in grid steps for codes. Where it is tiny, a sequence is greedy up to near-ties.
    """

    losses: Matrix
    excess: Matrix


def replay_order(W: Matrix, H: Matrix, order: Indices) -> Replay:
    """Follow `order` in float64; `excess` is (score taken) / (smallest score alive) - 1, and 0 where both are 0.

    Two orders that part at a near-tie stay apart, so comparing them entry by entry says little after that; this judges
    every step of an order given the steps before it.
    """
    rows, d = W.shape
    losses, excess = np.zeros((rows, d)), np.zeros((rows, d))
    for i in range(rows):
        w, G, alive = W[i].astype(np.float64), _inverse(H), np.ones(d, bool)
        for t, j in enumerate(np.asarray(order[i], int)):
            assert alive[j], f"row {i} prunes column {j} a second time at step {t}"
            scores = w[alive] ** 2 / np.diag(G)[alive]
            taken = w[j] ** 2 / G[j, j]
            losses[i, t] = taken / 2
            excess[i, t] = taken / scores.min() - 1 if scores.min() > 0 else (0.0 if taken == 0 else np.inf)
            w, G = w - G[:, j] * (w[j] / G[j, j]), _drop(G, j)
            alive[j] = False
            w[~alive] = 0.0
    return Replay(losses, excess)


def pruned_counts_heap(losses: Matrix, sparsity: float) -> Indices:
    """Weights to take from each row: the smallest *next* loss of all, until `ceil(rows * d * sparsity)` are gone.

    The sparsity counts as the decimal fraction that it prints as, up to 1e-9 of a weight.
    """
    rows, d = losses.shape
    counts = np.zeros(rows, np.int64)
    heap = [(float(losses[i, 0]), i) for i in range(rows)]
    heapq.heapify(heap)
    for _ in range(math.ceil(rows * d * Fraction(repr(sparsity)) - Fraction(1, 10**9))):
        _, i = heapq.heappop(heap)
        counts[i] += 1
        if counts[i] < d:
            heapq.heappush(heap, (float(losses[i, counts[i]]), i))
    return counts


def pruned_counts_flat(losses: Matrix, sparsity: float) -> Indices:
    """The published code's rule: sort all losses, whatever their order in a row, and count the smallest per row."""
    rows, steps = losses.shape
    first = np.argsort(losses.ravel(), kind="stable")[: math.ceil(losses.size * sparsity)]
    return np.bincount(first // steps, minlength=rows).astype(np.int64)


def rebuild(W: Matrix, H: Matrix, order: Indices, counts: Indices) -> Matrix:
    """The best layer whose row `i` has its first `counts[i]` pivots `M` at zero: `w - G[:, M] G[M, M]^-1 w_M`."""
    G = _inverse(H)
    W_hat = np.array(W, dtype=np.float64)
    for i, n in enumerate(counts):
        M = np.asarray(order[i][: int(n)], int)
        W_hat[i] -= G[:, M] @ np.linalg.solve(G[np.ix_(M, M)], W_hat[i, M])
        W_hat[i, M] = 0.0
    return W_hat


# --------------------------------------------------------------------------------------------------- structured pruning


def input_channel_groups(weight_shape: tuple[int, ...], group: int) -> Indices:
    """Columns of each group of `group` neighbours along the input channels, shape (d / group, group).

    Columns run (channel, ky, kx) in the layer's matrix; a group holds consecutive channels of one position (ky, kx).
    """
    inputs, kernel = weight_shape[1], math.prod(weight_shape[2:])
    columns = np.arange(inputs * kernel).reshape(inputs, kernel).T.ravel()
    return columns.reshape(-1, group)


def nm_prune(W: Matrix, H: Matrix, groups: Indices, zeros: int) -> Matrix:
    """Greedy pruning that leaves a group alone once `zeros` of its weights are gone, until every group has them."""
    rows, d = W.shape
    group_of = np.zeros(d, int)
    group_of[groups.ravel()] = np.repeat(np.arange(len(groups)), groups.shape[1])
    W_hat = np.zeros((rows, d))
    for i in range(rows):
        w, G, alive = W[i].astype(np.float64), _inverse(H), np.ones(d, bool)
        gone = np.zeros(len(groups), int)
        for _ in range(zeros * len(groups)):
            open_ = alive & (gone[group_of] < zeros)
            scores = np.full(d, np.inf)
            scores[open_] = w[open_] ** 2 / np.diag(G)[open_]
            j = int(np.argmin(scores))
            w, G = w - G[:, j] * (w[j] / G[j, j]), _drop(G, j)
            alive[j] = False
            w[~alive] = 0.0
            gone[group_of[j]] += 1
        W_hat[i] = w
    return W_hat


def block_losses(W: Matrix, H: Matrix, blocks: Indices) -> tuple[Indices, Matrix]:
    """Greedy pruning of blocks `B` by `w_B^T (G_BB)^-1 w_B`: block and half its score at each step, (rows, blocks)."""
    rows, n_blocks = len(W), len(blocks)
    order, losses = np.zeros((rows, n_blocks), np.int64), np.zeros((rows, n_blocks))
    for i in range(rows):
        w, G, alive = W[i].astype(np.float64), _inverse(H), np.ones(n_blocks, bool)
        for t in range(n_blocks):
            scores = np.full(n_blocks, np.inf)
            for k in np.flatnonzero(alive):
                B = blocks[k]
                scores[k] = w[B] @ np.linalg.solve(G[np.ix_(B, B)], w[B])
            b = int(np.argmin(scores))
            order[i, t], losses[i, t] = b, scores[b] / 2
            B = blocks[b]
            spread = np.linalg.solve(G[np.ix_(B, B)], G[B])
            w, G = w - w[B] @ spread, G - G[:, B] @ spread
            w[B] = G[B, :] = G[:, B] = 0.0
            alive[b] = False
    return order, losses


def band_losses(W: Matrix, H: Matrix, units: list[Indices], rows: int) -> tuple[Indices, Matrix]:
    """`block_losses` where `rows` consecutive rows (the last of them what is left) lose the same columns: the scores of
    a unit are added up over the rows of a band; (bands, units). Units may differ in size.
    """
    bands = [W[start : start + rows] for start in range(0, len(W), rows)]
    order, losses = np.zeros((len(bands), len(units)), np.int64), np.zeros((len(bands), len(units)))
    for i, band in enumerate(bands):
        w, G, alive = band.astype(np.float64), _inverse(H), np.ones(len(units), bool)
        for t in range(len(units)):
            scores = np.full(len(units), np.inf)
            for k in np.flatnonzero(alive):
                B = units[k]
                scores[k] = sum(v[B] @ np.linalg.solve(G[np.ix_(B, B)], v[B]) for v in w)
            b = int(np.argmin(scores))
            order[i, t], losses[i, t] = b, scores[b] / 2
            B = units[b]
            spread = np.linalg.solve(G[np.ix_(B, B)], G[B])
            w, G = w - w[:, B] @ spread, G - G[:, B] @ spread
            w[:, B] = G[B, :] = G[:, B] = 0.0
            alive[b] = False
    return order, losses


def block_prune(W: Matrix, H: Matrix, blocks: Indices, order: Indices, counts: Indices) -> Matrix:
    """The best layer without the first `counts[i]` blocks of row `i`."""
    columns = np.stack([blocks[row].ravel() for row in order])
    return rebuild(W, H, columns, counts * blocks.shape[1])


# --------------------------------------------------------------------------------------------------------- quantisation


@dataclass(frozen=True)
class Grid:
    """`scale * (k - zero)` for k = 0 .. levels - 1, of one row."""

    scale: float
    zero: float
    levels: int

    def __call__(self, w: Matrix) -> Matrix:
        return self.scale * (np.clip(np.round(w / self.scale) + self.zero, 0, self.levels - 1) - self.zero)


def search_grid(w: Matrix, bits: int, symmetric: bool, shrinks: int = 80, exponent: float = 2.4) -> Grid:
    """The grid over `(1 - i/100) * [min(w, 0), max(w, 0)]`, i < `shrinks`, with the least `sum |w - q(w)|^exponent`."""
    low, high, top = min(float(w.min()), 0.0), max(float(w.max()), 0.0), 2**bits - 1
    if symmetric:
        high = max(-low, high)
        low = -high if low < 0 else low
    if low == high:
        low, high = -1.0, 1.0
    best, best_error = None, np.inf
    for i in range(shrinks):
        shrink = 1 - i / 100
        scale = shrink * (high - low) / top
        grid = Grid(scale, (top + 1) / 2 if symmetric else float(np.round(-shrink * low / scale)), top + 1)
        error = float(np.sum(np.abs(grid(w) - w) ** exponent))
        if error < best_error:
            best, best_error = grid, error
    assert best is not None, f"no grid for a row with values in [{low}, {high}]"
    return best


def _next_weights(w: Matrix, G: Matrix, alive: NDArray[np.bool_], grid: Grid, tie: float) -> list[int]:
    """Weights that OBQ may quantise next: one, and more where rules meet within `tie`, a relative margin.

    The least `(w - q)^2 / G_jj` goes next. Outlier rule: while some weight is more than half a step away from its grid,
    the farthest one goes first, unless the weight that would go next is exactly zero.
    """
    residual = np.where(alive, w - grid(w), 0.0)
    scores = np.full(len(w), np.inf)
    scores[alive] = residual[alive] ** 2 / np.diag(G)[alive]
    regular = [int(j) for j in np.flatnonzero(scores <= np.min(scores) * (1 + tie))]
    farthest = np.max(residual**2) / (0.25 * grid.scale**2)
    if w[np.argmin(scores)] == 0 or farthest <= 1 - tie:
        return regular
    outliers = [int(j) for j in np.flatnonzero(residual**2 >= np.max(residual**2) * (1 - tie))]
    return outliers if farthest > 1 + tie else regular + outliers


def greedy_quantise(W: Matrix, H: Matrix, grids: list[Grid]) -> Matrix:
    """OBQ: quantise one weight after another, the one that costs least first, and let the others make up for it."""
    Q = np.zeros(W.shape)
    for i, grid in enumerate(grids):
        w, G, alive = W[i].astype(np.float64), _inverse(H), np.ones(W.shape[1], bool)
        for _ in range(W.shape[1]):
            j = _next_weights(w, G, alive, grid, tie=0.0)[0]
            Q[i, j] = grid(w[j])
            w, G = w - G[:, j] * ((w[j] - Q[i, j]) / G[j, j]), _drop(G, j)
            alive[j] = False
    return Q


def is_greedy_quantisation(w: Matrix, H: Matrix, grid: Grid, q: Matrix, tie: float) -> bool:
    """Whether some way of breaking near-ties leads OBQ from the row `w` to `q` (depth-first over what `q` allows).

    OBQ meets near-ties all the time: an outlier pushes the next one to the edge of half a step, and a symmetric grid
    that is not shrunk has the largest weight exactly half-way between two levels.
    """
    states = [(np.array(w, np.float64), _inverse(H), np.ones(len(w), bool))]
    while states:
        w, G, alive = states.pop()
        if not alive.any():
            return True
        for j in _next_weights(w, G, alive, grid, tie):
            if abs(w[j] - q[j]) <= abs(w[j] - grid(w[j])) + tie * grid.scale:
                rest = alive.copy()
                rest[j] = False
                states.append((w - G[:, j] * ((w[j] - q[j]) / G[j, j]), _drop(G, j), rest))
    return False


def quantise_in_order(
    W: Matrix, H: Matrix, sequence: Callable[[int], Indices], quantiser: Callable[[int, Matrix], Matrix]
) -> Matrix:
    """Quantise the columns `sequence(i)` of row `i` one after another with error feedback; columns not in it stay zero.

    A column that is not in the sequence counts as pruned: it leaves the problem first, and the others make up for it.
    """
    W_hat = np.zeros(W.shape)
    for i in range(len(W)):
        w, G = W[i].astype(np.float64), _inverse(H)
        columns = np.asarray(sequence(i), int)
        for j in np.setdiff1d(np.arange(W.shape[1]), columns):
            w, G = w - G[:, j] * (w[j] / G[j, j]), _drop(G, int(j))
        for j in columns:
            W_hat[i, j] = quantiser(i, w[j])
            w, G = w - G[:, j] * ((w[j] - W_hat[i, j]) / G[j, j]), _drop(G, int(j))
    return W_hat


def replay_codes(W: Matrix, H: Matrix, order: Indices, counts: Indices, step: float, codes: Indices) -> Replay:
    """Follow `codes`, most salient column first, on what pruning leaves; entries run in the order of the decisions.

    `losses` are the pruning losses and then the `(v - q)^2 / (2 G_aa)` of each code; `excess` is how much farther from
    its target the code is than the nearest one, in steps.
    """
    rows, d = W.shape
    losses, excess = np.zeros((rows, d)), np.zeros((rows, d))
    for i in range(rows):
        w, G, n = W[i].astype(np.float64), _inverse(H), int(counts[i])
        pruned, kept = np.asarray(order[i][:n], int), np.asarray(order[i][n:][::-1], int)
        for t, j in enumerate(np.concatenate([pruned, kept])):
            q = 0.0 if t < n else float(codes[i, j]) * step
            losses[i, t] = (w[j] - q) ** 2 / (2 * G[j, j])
            if t >= n:
                excess[i, t] = abs(w[j] - q) / step - abs(w[j] / step - np.round(w[j] / step))
            w, G = w - G[:, j] * ((w[j] - q) / G[j, j]), _drop(G, int(j))
    return Replay(losses, excess)
