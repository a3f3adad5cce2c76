"""Hessians that differ between rows by a multiple of the identity: embeddings, whose rows are tokens used unequally
often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from autocompress.obs.kernels import choose

if TYPE_CHECKING:
    from autocompress.obs.quantising import Cell

__all__ = ["RowHessian", "search_square"]

STEP_EXPONENT = 0.5
LEAST = 2.0**-8  # of the mean diagonal of the shared part: weights below it are all alike


@dataclass(frozen=True)
class RowHessian:
    """H_r = shared + weights[r] I for each row r of one matrix: error ½ tr(ΔW shared ΔWᵀ) + ½ Σ_r weights[r] |ΔW_r|².

    weights (rows,), positive; shared (d, d), symmetric positive semi-definite, None for zero. It goes wherever the
    functions of this package take a Hessian (d, d) or (1, d, d). Without a shared part every column is on its own: the
    order is by magnitude, nothing is refitted, and nothing costs more than a pass over the weights. With one, rows are
    dealt into parts whose weights agree within a factor of √2 either way, and each part takes its mean weight for the
    order and the updates; errors are those of the exact weights.
    """

    weights: np.ndarray
    shared: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> RowHessian:
        """The Hessians of some rows."""
        return RowHessian(self.weights[rows], self.shared)

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers, one Hessian (d, d) for all of them), with a shared part only."""
        assert self.shared is not None
        level = float(np.mean(np.diag(self.shared))) or 1.0
        octave = np.rint(np.log2(np.maximum(self.weights / level, LEAST)))
        for value in np.unique(octave):
            rows = np.flatnonzero(octave == value)
            yield rows, self.shared + float(self.weights[rows].mean()) * np.eye(len(self.shared))

    def log_dets(self) -> np.ndarray:
        """Mean logarithm of the eigenvalues of each row's Hessian, (rows,)."""
        if self.shared is None:
            return np.log(self.weights)
        values = np.maximum(np.linalg.eigvalsh(self.shared), 0.0)
        return np.array([np.log(values + c).mean() for c in self.weights])

    def step_scales(self, exponent: float = STEP_EXPONENT) -> np.ndarray:
        """Factors (rows,) for the steps of rows: (u/u_r)^exponent, u_r the geometric mean of a row's eigenvalues and u
        that over all rows, as powers of √2 between 1/64 and 4.

        At high rate the least sum of errors for the bits has steps ∝ u_r^(-1/2). On MiniLM's embedding that saves 1.1
        bits per weight at a relative error of 1% over one step for all (experiments/results/row_steps.csv).
        """
        logs = self.log_dets()
        halves = np.rint(2.0 * exponent * (logs.mean() - logs) / np.log(2.0))
        return 2.0 ** (np.clip(halves, -12, 4) / 2.0)

    def error(self, delta: np.ndarray) -> float:
        """½ tr(ΔW shared ΔWᵀ) + ½ Σ_r weights[r] |ΔW_r|² of delta (1, rows, d), float64."""
        return float(self.row_errors(delta).sum())

    def row_errors(self, delta: np.ndarray) -> np.ndarray:
        """What every row contributes to `error`, (1, rows)."""
        found = np.einsum("rd,rd,r->r", delta[0], delta[0], self.weights)
        if self.shared is not None:
            found += np.einsum("rd,rd->r", delta[0] @ self.shared, delta[0])
        return 0.5 * found[None]


def trace(weight: np.ndarray, H: RowHessian, core: Callable[..., tuple[np.ndarray, np.ndarray]]) -> tuple:
    """`prune_trace` of weight (1, rows, d); `core` is that function for one Hessian."""
    order, losses = np.empty(weight.shape, np.int32), np.empty(weight.shape, np.float64)
    if H.shared is None:
        order[0] = np.argsort(np.abs(weight[0]), axis=1, kind="stable")
        losses[0] = np.take_along_axis(weight[0], order[0], 1) ** 2
        losses[0] *= 0.5 * H.weights[:, None]
    else:
        for rows, hessian in H.parts():
            order[0, rows], losses[0, rows] = core(weight[0, rows], hessian)
    return order, losses


def cells(
    weight: np.ndarray,
    H: RowHessian,
    order: np.ndarray,
    counts: np.ndarray,
    given: Sequence[Cell],
    core: Callable[..., tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """`salient_cells` of weight (1, rows, d); `core` is that function for one Hessian."""
    from autocompress.obs.quantising import Cell

    codes = np.zeros((len(given), *weight.shape), np.int32)
    refits = np.zeros(weight.shape)
    if H.shared is not None:
        for rows, hessian in H.parts():
            some = [Cell(c.step[:, rows], c.low[:, rows], c.high[:, rows], c.price, c.bits, c.offset) for c in given]
            parts = weight[:, rows], hessian[None], order[:, rows], counts[:, rows]
            codes[:, :, rows], refits[:, rows] = core(*parts, some)
        return codes, refits
    np.put_along_axis(
        refits[0],
        order[0],
        np.where(np.arange(weight.shape[2]) < counts[0, :, None], 0.0, np.take_along_axis(weight[0], order[0], 1)),
        1,
    )
    magnitude = float(np.abs(weight).max(initial=0.0)) or 1.0
    level = float(H.weights.mean())
    w32, c32 = (refits[0] / magnitude).astype(np.float32), (H.weights / level).astype(np.float32)
    nothing = np.zeros(1, np.float32)
    for i, cell in enumerate(given):
        _round_rows(
            w32,
            order[0],
            counts[0],
            c32,
            (cell.step[0] / magnitude).astype(np.float32),
            cell.low[0],
            cell.high[0],
            np.float32(cell.price / (magnitude**2 * level)),
            nothing if cell.bits is None else cell.bits,
            cell.offset,
            codes[i, 0],
        )
    return codes, refits


@njit(nogil=True, cache=True)
def _round_rows(
    weight: np.ndarray,
    order: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    step: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    price: float,
    bits: np.ndarray,
    offset: int,
    codes: np.ndarray,
) -> None:
    """Codes of what each row keeps: the neighbour on the grid, or zero, of least c (q step - w)²/2 + price bits(q)."""
    for r in range(weight.shape[0]):
        for j in range(counts[r], weight.shape[1]):
            a = order[r, j]
            codes[r, a] = choose(weight[r, a], weights[r], step[r], low[r], high[r], price, bits, offset)


def search_square(weight: np.ndarray, bits: int, shrinks: int = 80) -> np.ndarray:
    """`search_scale` for the squared error, which is the error itself where columns are on their own; (..., d)."""
    flat = np.ascontiguousarray(weight.reshape(-1, weight.shape[-1]), np.float64)
    return _search_square(flat, 2 ** (bits - 1), shrinks).reshape(weight.shape[:-1])


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _search_square(weight: np.ndarray, half: int, shrinks: int) -> np.ndarray:
    chosen = np.ones(weight.shape[0])
    line = np.empty(weight.shape[1], np.float32)
    for r in range(weight.shape[0]):
        top = np.abs(weight[r]).max() if weight.shape[1] else 0.0
        if top == 0.0:
            chosen[r] = 2.0 / (2 * half - 1)
            continue
        for j in range(weight.shape[1]):
            line[j] = weight[r, j] / top
        least = np.float32(np.inf)
        for i in range(shrinks):
            scale = np.float32(2.0 * (1.0 - i / 100.0) / (2 * half - 1))
            error = np.float32(0.0)
            for j in range(line.shape[0]):
                q = np.rint(line[j] / scale)
                q = min(max(q, np.float32(-half)), np.float32(half - 1))
                error += (line[j] - q * scale) ** 2
            if error < least:
                least = error
                chosen[r] = 2.0 * (1.0 - i / 100.0) / (2 * half - 1) * top
    return chosen
