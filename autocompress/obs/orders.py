"""Quantising a layer in an order of choice: greedy (OBQ), or one of the fixed orders.

Which order is best is a matter of measurement: experiments/results/bench_obs_orders.csv.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from autocompress.obs.pruning import as_groups, greedy, prune_trace
from autocompress.obs.quantising import quantise_salient

__all__ = ["ORDERS", "obq", "quantise"]

#: Orders in which weights are quantised, by name; see `quantise`.
ORDERS = ("obq", "salient", "act", "natural", "pruning")


def obq(
    W: Any,
    H: Any,
    step: np.ndarray | float,
    low: np.ndarray | int,
    high: np.ndarray | int,
    trace: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    threads: int = 0,
    backend: str | None = None,
) -> Any:
    """Codes int32 of greedy quantisation: the weight whose rounding costs least goes next, and others make up for it.

    Step: p = argmin (w_p - q(w_p))²/[H⁻¹]_pp over what is left, with q the nearest of low ... high times step. Weights
    more than half a step from their level go first, farthest first, unless the weight that costs least is exactly zero.

    W (rows, d); H (d, d) positive definite; or both with groups. step, low and high: one, or one per row in the leading
    shape of W; an asymmetric grid has its zero point in low. trace (an order of `prune_trace`) and counts: each row
    loses its first `counts` columns before, refitted as `prune` does; their code is 0. backend: as for `prune_trace`;
    grids are numpy arrays for both. Raises ValueError as
    `prune_trace` does, and where a step is not positive. Source: OBQ, arXiv 2208.11580, algorithm 3; outliers as in its
    published code.
    """
    leading = np.shape(W)[:-1]
    step, low, high = (np.broadcast_to(np.asarray(x, np.float64), leading).copy() for x in (step, low, high))
    if not (step > 0.0).all():
        raise ValueError(f"a step is {float(np.min(step))}, needed steps above 0")
    first = None if trace is None or counts is None else (trace, counts)
    return greedy(W, H, (step, low, high), first, threads, backend)[2]


def quantise(
    W: np.ndarray,
    H: np.ndarray,
    step: np.ndarray | float,
    low: np.ndarray | int,
    high: np.ndarray | int,
    order: str = "salient",
    trace: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    threads: int = 0,
) -> np.ndarray:
    """Codes int32 of one uniform grid, the weights visited in an order of `ORDERS`, each against the error so far.

    obq: see there. salient: what pruning would take last goes first (per row). pruning: the reverse of that. act: the
    largest diagonal of H first, and natural: by column; both with one factor for all rows that lose nothing.

    Shapes and pruning (trace, counts) as in `obq`; without a trace, `prune_trace` finds it where the order needs one.
    Raises ValueError for an unknown order, and as `obq` does. Source: engine.md section 3; act and natural: GPTQ, arXiv
    2210.17323.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, needed one of {', '.join(ORDERS)}")
    if order == "obq":
        return obq(W, H, step, low, high, trace, counts, threads)
    weight, hessian = as_groups(W, H)
    leading = np.shape(W)[:-1]
    counts = np.zeros(leading, np.int64) if counts is None else np.asarray(counts, np.int64)
    if trace is None and (order in ("salient", "pruning") or counts.any()):
        trace = prune_trace(W, H, threads)[0]
    if order != "salient":
        # Passes go from the last column of a row's trace to its first kept one: the last has the greatest rank here.
        match order:
            case "pruning":
                rank = -np.argsort(np.asarray(trace).reshape(weight.shape), axis=-1)
            case "act":
                rank = np.argsort(np.argsort(np.diagonal(hessian, axis1=1, axis2=2), axis=-1, kind="stable"), axis=-1)
            case _:
                rank = -np.arange(weight.shape[-1])[None]
        rank = np.broadcast_to(rank if rank.ndim == 3 else rank[:, None], weight.shape).copy()
        lost = np.arange(weight.shape[-1]) < counts.reshape(*weight.shape[:2], 1)
        if trace is not None:
            columns = np.asarray(trace, np.int64).reshape(weight.shape)
            place = np.arange(weight.shape[-1]) - 2 * weight.shape[-1]
            np.put_along_axis(rank, columns, np.where(lost, place, np.take_along_axis(rank, columns, -1)), -1)
        trace = np.argsort(rank, axis=-1).reshape(np.shape(W))
    assert trace is not None
    return quantise_salient(W, H, trace, counts, np.asarray(step), low, high, threads)
