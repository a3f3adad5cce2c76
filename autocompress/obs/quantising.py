"""Quantising what pruning left, each weight against the error of those before it, along several paths side by side.

One factorisation per row and sparsity serves every cell: every width of a uniform grid, every (step, λ) of
rate-distortion OBS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from autocompress.obs import blas, kernels, weighted
from autocompress.obs.pruning import as_groups, over_rows, scaled_hessian
from autocompress.obs.rounding import rounding_errors
from autocompress.obs.weighted import RowHessian
from autocompress.threads import single_threaded

__all__ = ["Cell", "quantise_salient", "rate_distortion_cells", "rd_quantise", "salient_cells", "search_scale"]

CODE_LIMIT = 32767  # codes stay within int16; a grid that needs more is clipped there
SAMPLE_ROWS = 16  # rows that a rate table is learned from
TABLE_ROWS = 256  # the same where rows have weights of their own, and so codes of different size


@dataclass(frozen=True)
class Cell:
    """One way to quantise a layer. Code q stands for q · step; low <= q <= high; a bit costs `price` in units of the
    layer error.

    step float32, low and high int, all (groups, rows), or (groups, rows, runs) for runs of `run` consecutive columns;
    bits float32 (table,): length of code q at q + offset. A `RowHessian` takes no runs. levels, where there are any, in
    place of low and high: ascending, code q > 0 stands for levels[q - 1] · step. A weight whose step is 0 has code 0.
    """

    step: np.ndarray
    low: np.ndarray
    high: np.ndarray
    price: float = 0.0
    bits: np.ndarray | None = None
    offset: int = 0
    run: int = 0
    levels: np.ndarray | None = None


def salient_cells(
    W: np.ndarray,
    H: np.ndarray | RowHessian,
    order: np.ndarray,
    counts: np.ndarray,
    cells: Sequence[Cell],
    threads: int = 0,
    paths: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of every cell, int32 (cells, *W.shape), and the pruned weights that they quantise, float64 in the shape of
    W.

    Visit the kept columns from the last pruned to the first; the target of a is w_a - Σ_b C_ba (ŵ_b - w_b)/C_aa over
    the visited b, H_RR = C Cᵀ in that order; choosing ŵ_a costs C_aa² (ŵ_a - target)²/2. Pruned weights have code 0.
    paths: so many choices are followed side by side, the cheapest at each column (the M-algorithm); with one, each
    column takes the code that is cheapest for it. Shapes as in `prune_trace`; counts in the leading shape. Raises
    ValueError if H over a row's kept columns is not positive definite. Source: OBS error feedback as in OBQ (arXiv
    2208.11580) and GPTQ (arXiv 2210.17323), with one order per row; several paths: this project, after Anderson and
    Mohan, IEEE Transactions on Communications 32(2), 1984.
    """
    weight, hessian = as_groups(W, H)
    groups, rows, d = weight.shape
    order = np.ascontiguousarray(order, np.int64).reshape(weight.shape)
    counts = np.asarray(counts, np.int64).reshape(groups, rows)
    n = len(cells)
    if isinstance(hessian, RowHessian):
        core = partial(salient_cells, threads=threads, paths=paths)
        found = weighted.cells(weight, hessian, order, counts, cells, core)
        return found[0].reshape(n, *np.shape(W)), found[1].reshape(np.shape(W))
    table = max((c.bits.size for c in cells if c.bits is not None), default=1)
    bits = np.zeros((n, table), np.float32)
    for i, cell in enumerate(cells):
        if cell.bits is not None:
            bits[i, : cell.bits.size] = cell.bits
            bits[i, cell.bits.size :] = cell.bits[-1]
    offset, length = (np.array([x(c) for c in cells], np.int64) for x in (lambda c: c.offset, lambda c: c.run or d))
    limits = [c.low for c in cells], [c.high for c in cells]
    known = [np.zeros(0, np.float32) if c.levels is None else c.levels for c in cells]
    count = np.array([x.size for x in known], np.int64)
    levels = np.zeros((n, count.max(initial=0)), np.float32)
    for own, given in zip(levels, known, strict=True):
        own[: given.size] = given
    codes = np.zeros((n, groups, rows, d), np.int32)
    refits = np.zeros(weight.shape, np.float64)
    magnitude = float(np.abs(weight).max(initial=0.0)) or 1.0  # one scale for the layer: steps are shared by its rows
    for g in range(groups):
        h, h_scale = scaled_hessian(hessian[g])
        h32 = h.astype(np.float32)
        w32 = (weight[g] / magnitude).astype(np.float32)
        price = np.array([c.price / (magnitude**2 * h_scale) for c in cells], np.float32)
        step = _side_by_side([c.step[g] / magnitude for c in cells], (n, rows), np.float32)
        low, high = (_side_by_side([x[g] for x in of], (n, rows), np.int64) for of in limits)
        out = np.zeros((rows, d), np.float32)
        failed: list[int] = []

        def run(
            p: slice, g=g, h32=h32, w32=w32, price=price, step=step, low=low, high=high, out=out, failed=failed
        ) -> None:
            part = np.zeros((n, p.stop - p.start, d), np.int32)
            bad = kernels.salient_rows(
                blas.POTRF,
                h32,
                w32[p],
                order[g, p],
                counts[g, p],
                step[:, p],
                low[:, p],
                high[:, p],
                length,
                price,
                bits,
                offset,
                levels,
                count,
                part,
                out[p],
                paths,
            )
            codes[:, g, p] = part
            if bad >= 0:
                failed.append(p.start + bad)

        over_rows(run, rows, threads)
        if failed:
            raise ValueError(f"the Hessian is not positive definite over what row {min(failed)} keeps; add damping")
        refits[g] = out.astype(np.float64) * magnitude
    return codes.reshape(n, *np.shape(W)), refits.reshape(np.shape(W))


def _side_by_side(values: Sequence[np.ndarray], shape: tuple[int, int], dtype: type) -> np.ndarray:
    """(cells, rows, runs) of every cell's (rows,) or (rows, runs), with zeros behind those that have fewer runs."""
    found = np.zeros((*shape, max((np.shape(v)[1] for v in values if np.ndim(v) == 2), default=1)), dtype)
    for own, value in zip(found, values, strict=True):
        value = np.reshape(value, (shape[1], -1))
        own[:, : value.shape[1]] = value
    return found


def quantise_salient(
    W: np.ndarray,
    H: np.ndarray,
    order: np.ndarray,
    counts: np.ndarray,
    step: np.ndarray,
    low: np.ndarray | int,
    high: np.ndarray | int,
    threads: int = 0,
    paths: int = 1,
) -> np.ndarray:
    """Codes int32 of one uniform grid after pruning to `counts`; step, low, high (rows,) or scalar. See
    `salient_cells`.
    """
    leading = np.shape(W)[:-1]
    cell = Cell(
        step=np.broadcast_to(np.asarray(step, np.float32), leading).reshape(-1, leading[-1]),
        low=np.full(leading, low).reshape(-1, leading[-1]),
        high=np.full(leading, high).reshape(-1, leading[-1]),
    )
    return salient_cells(W, H, order, counts, [cell], threads, paths)[0][0]


def rd_quantise(
    W: np.ndarray,
    H: np.ndarray,
    order: np.ndarray,
    counts: np.ndarray,
    step: float,
    lam: float,
    threads: int = 0,
    paths: int = 1,
) -> np.ndarray:
    """Rate-distortion codes int32 of one (step, λ); `step` is absolute, `lam` as in `rate_distortion_cells`."""
    passes = partial(salient_cells, paths=paths)
    cells = rate_distortion_cells(W, H, order, counts, [(step, lam)], threads=threads, passes=passes)
    return passes(W, H, order, counts, cells, threads=threads)[0][0]


def rate_distortion_cells(
    W: np.ndarray,
    H: np.ndarray | RowHessian,
    order: np.ndarray,
    counts: np.ndarray,
    grid: Sequence[tuple[float, float]],
    threads: int = 0,
    scales: np.ndarray | None = None,
    passes: Callable[..., tuple[np.ndarray, np.ndarray]] = salient_cells,
) -> list[Cell]:
    """Cells of rate-distortion OBS for (step, λ) pairs, with rate tables learned from a sample of the layer's rows.

    A code costs C_aa² (q step - target)²/2 + price · bits(q), price = λ · u · step²/2, u = exp(log det H / d) the
    geometric mean of the squared pivots of H: λ is the price of a bit in units of the error of one whole step. bits()
    is the symmetrised histogram of a first pass over at most 16 rows (pruned zeros included, for they are coded too),
    mixed with 1% of a two-sided geometric law so that no code is free of charge or forbidden. `scales` (rows,): row r
    has the step scales[r] · step, rounded to half precision, at the same price. `passes` is what
    makes that pass: `salient_cells`, or `shared_cells` for wide layers. Source: engine.md section
    4; ECSQ (Chou, Lookabaugh, Gray 1989) inside OBS.
    """
    weight, hessian = as_groups(W, H)
    groups, rows, d = weight.shape
    order = np.asarray(order).reshape(weight.shape)
    counts = np.asarray(counts).reshape(groups, rows)
    with single_threaded():
        if isinstance(hessian, RowHessian):
            log_det = float(hessian.log_dets().mean())
        else:
            log_det = np.mean([_log_det(h) / d for h in hessian])
    unit = 0.5 * float(np.exp(log_det))
    peak = float(np.abs(weight).max(initial=0.0))
    shape, sampled = (groups, rows), SAMPLE_ROWS

    def steps(step: float) -> np.ndarray:
        if scales is None:
            return np.full(shape, step, np.float32)
        return np.broadcast_to((step * scales).astype(np.float16), shape).astype(np.float32)

    few = np.arange(rows)
    if isinstance(hessian, RowHessian):  # a table may have more rows than any histogram needs
        few = np.unique(np.linspace(0, rows - 1, min(rows, TABLE_ROWS)).astype(int))
        weight, hessian, order, counts = weight[:, few], hessian.take(few), order[:, few], counts[:, few]
        rows, sampled = len(few), TABLE_ROWS
    zeroed = weight.copy()
    kept_first = np.arange(d)[None, None, :] < counts[:, :, None]
    np.put_along_axis(
        zeroed,
        order.astype(np.int64),
        np.where(kept_first, 0.0, np.take_along_axis(weight, order.astype(np.int64), 2)),
        2,
    )

    def cell(step: float, lam: float, codes: np.ndarray) -> Cell:
        own = steps(step)
        size = int(min(np.ceil(1.25 * peak / own.min()) + 2, CODE_LIMIT))
        return Cell(
            step=own,
            low=np.full(shape, -CODE_LIMIT),
            high=np.full(shape, CODE_LIMIT),
            price=lam * unit * step * step,
            bits=rate_table(codes, size),
            offset=size,
        )

    cells = [
        cell(step, lam, np.rint(np.clip(zeroed / at[..., None], -CODE_LIMIT, CODE_LIMIT)).astype(np.int32))
        for (step, lam), at in ((pair, steps(pair[0])[:, few]) for pair in grid)
    ]
    priced = [i for i, (_, lam) in enumerate(grid) if lam > 0.0]
    if priced:
        take = np.unique(np.linspace(0, rows - 1, min(rows, sampled)).astype(int))
        some = np.unique(np.linspace(0, groups - 1, min(groups, SAMPLE_ROWS)).astype(int))
        sample = [
            Cell(
                c.step[np.ix_(some, few[take])],
                c.low[np.ix_(some, few[take])],
                c.high[np.ix_(some, few[take])],
                c.price,
                c.bits,
                c.offset,
            )
            for c in (cells[i] for i in priced)
        ]
        codes, _ = passes(
            weight[np.ix_(some, take)],
            hessian if isinstance(hessian, RowHessian) or len(some) == groups else hessian[some],
            order[np.ix_(some, take)],
            counts[np.ix_(some, take)],
            sample,
            threads=threads,
        )
        for j, i in enumerate(priced):
            cells[i] = cell(*grid[i], codes[j])
    return cells


def _log_det(H: np.ndarray) -> float:
    """log det H of a positive definite matrix. Raises LinAlgError where it is none."""
    factor = np.array(H, np.float64, order="C")  # the one copy that is made of it
    if not blas.in_place(blas.DPOTRF, factor, len(factor)):
        raise np.linalg.LinAlgError("the Hessian is not positive definite; add damping (calibrate does)")
    return 2.0 * float(np.log(np.diag(factor)).sum())


def rate_table(codes: np.ndarray, size: int) -> np.ndarray:
    """Ideal code length in bits of q = -size ... size under the symmetrised histogram of `codes`, float32 (2 size +
    1,).
    """
    magnitude = np.minimum(np.abs(codes.ravel()), size)
    count = np.bincount(magnitude, minlength=size + 1).astype(np.float64)
    total = max(magnitude.size, 1)
    mean = magnitude.mean() if magnitude.size else 0.0
    ratio = mean / (1.0 + mean)  # geometric law of the magnitudes with the same mean
    law = (1.0 - ratio) * ratio ** np.arange(size + 1) + 1e-12
    share = 0.01
    p = (1.0 - share) * count / total + share * law / law.sum()
    half = -np.log2(p)
    half[1:] += 1.0  # the sign
    return np.concatenate([half[:0:-1], half]).astype(np.float32)


def search_scale(weight: np.ndarray, bits: int, exponent: float = 2.4, shrinks: int = 80) -> np.ndarray:
    """Step per row of the symmetric grid -2^(b-1) ... 2^(b-1) - 1 that minimises Σ |w - ŵ|^2.4 over shrink factors 1 -
    i/100.

    weight (..., d); returns float64 in the leading shape (1 where a row is zero). Source: OBC's published code (grid
    search with exponent 2.4), arXiv 2208.11580.
    """
    top = np.abs(weight).max(axis=-1, initial=0.0)
    top = np.where(top == 0.0, 1.0, top)
    unit = np.ascontiguousarray(weight / top[..., None], np.float64).reshape(-1, np.shape(weight)[-1])
    high = 2 ** (bits - 1) - 1
    scales = 2.0 * (1.0 - np.arange(shrinks) / 100.0) / (2**bits - 1)
    errors = np.empty((len(unit), shrinks))
    rounding_errors(unit, scales, -high - 1, high, exponent, errors)
    return scales[errors.argmin(axis=1)].reshape(top.shape) * top
