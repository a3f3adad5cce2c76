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
    one. A layer without a Hessian has 8 bits, rounded to the nearest.
    """

    version = 3
    source = "OBC, arXiv 2208.11580"

    def offers(self, option: Option) -> bool:
        bits = option.bits
        return bits is not None and 2 <= bits <= 8 and option == Option(sparsity=option.sparsity, bits=bits)

    def needs_data(self, option: Option) -> bool:
        # With 8 bits a weight moves by some thousandths of its row's largest: harmless wherever it is used.
        return option != Option(bits=8)

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        if problem.hessian is None and not any(self.needs_data(o) for o in options):
            return [_nearest(problem) for _ in options]
        hessian = problem.known_hessian()
        order, _ = problem.trace()
        found: dict[Option, Realised] = {}
        for sparsity in sorted({o.sparsity for o in options}):
            counts = problem.counts(sparsity)
            weight = problem.weight
            if sparsity > 0.0:
                weight = obs.prune(weight, hessian, order, counts, threads=1)
            wanted = [o for o in options if o.sparsity == sparsity]
            alone = isinstance(hessian, obs.RowHessian) and hessian.shared is None
            search = obs.search_square if alone else obs.search_scale
            steps = [_storable(search(weight, o.bits or 8), weight) for o in wanted]
            cells = [
                obs.Cell(
                    np.broadcast_to(s, counts.shape).astype(np.float32),
                    np.full(counts.shape, -(2 ** ((o.bits or 8) - 1))),
                    np.full(counts.shape, 2 ** ((o.bits or 8) - 1) - 1),
                )
                for o, s in zip(wanted, steps, strict=True)
            ]
            codes, _ = obs.salient_cells(problem.weight, hessian, order, counts, cells, threads=1)
            for o, s, q in zip(wanted, steps, codes, strict=True):
                step = s.reshape(-1) if s.ndim else float(s)
                found[o] = Realised(problem.shape, "entropy", codes=q.reshape(problem.shape), step=step)
        return [found[o] for o in options]


def _nearest(problem: LayerProblem) -> Realised:
    """8 bits per weight, each rounded to the nearest."""
    steps = _storable(obs.search_square(problem.weight, 8), problem.weight)
    codes = np.rint(problem.weight / (steps.astype(np.float64)[..., None] if steps.ndim else float(steps)))
    codes = np.clip(codes, -128, 127).astype(np.int32).reshape(problem.shape)
    return Realised(problem.shape, "entropy", codes=codes, step=steps.reshape(-1) if steps.ndim else float(steps))


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
