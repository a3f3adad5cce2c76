"""Uniform grids after exact OBS pruning: `w4`, `s75w4`. Optimal Brain Compression with a fixed order per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress import obs
from autocompress.compressors.base import LayerProblem, Realised
from autocompress.types import Option

__all__ = ["ObcUniform"]


class ObcUniform:
    """Symmetric b-bit grid per output row, quantised most-salient-first with error feedback on what pruning left.

    Grid -2^(b-1) ... 2^(b-1) - 1 times a half-precision step per row, found by OBC's shrink search on the refitted
    weights. Source: OBC, arXiv 2208.11580 (pruning, grid search); the order is engine.md section 3's, not OBQ's greedy
    one.
    """

    version = 2
    source = "OBC, arXiv 2208.11580"

    def offers(self, option: Option) -> bool:
        bits = option.bits
        return bits is not None and 2 <= bits <= 8 and option == Option(sparsity=option.sparsity, bits=bits)

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        found: dict[Option, Realised] = {}
        for sparsity in sorted({o.sparsity for o in options}):
            counts = problem.counts(sparsity)
            weight = problem.weight
            if sparsity > 0.0:
                weight = problem.pruned(counts)
            wanted = [o for o in options if o.sparsity == sparsity]
            steps = [_storable(obs.search_scale(weight, o.bits or 8), weight) for o in wanted]
            cells = [
                obs.Cell(
                    np.broadcast_to(s, counts.shape).astype(np.float32),
                    np.full(counts.shape, -(2 ** ((o.bits or 8) - 1))),
                    np.full(counts.shape, 2 ** ((o.bits or 8) - 1) - 1),
                )
                for o, s in zip(wanted, steps, strict=True)
            ]
            codes = problem.quantised(counts, cells)
            for o, s, q in zip(wanted, steps, codes, strict=True):
                step = s.reshape(-1) if s.ndim else float(s)
                found[o] = Realised(problem.shape, "entropy", codes=q.reshape(problem.shape), step=step)
        return [found[o] for o in options]


def _storable(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The steps as they will be stored: half precision per row, or one float32 where that cannot hold them."""
    zero = ~weight.any(axis=-1)
    if not zero.all():  # a row of zeros fits any step: let it not be the one that decides
        scale = np.where(zero, scale[~zero].min(), scale)
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if np.isfinite(half).all() and (half >= np.finfo(np.float16).tiny).all():
        return half
    return np.asarray(scale.max(), np.float32)
