"""Uniform grids after exact OBS pruning: `w4`, `s75w4`, `2:4w8g64a`. Optimal Brain Compression with a fixed order per
row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress import obs
from autocompress.compressors.base import LayerProblem, Realised, by_structure, storable
from autocompress.types import Option

__all__ = ["ObcUniform"]

SIGNS = np.array([0, -1, 1], np.int32)  # what codes of a grid of -1 and 1 stand for


class ObcUniform:
    """Uniform b-bit grid, quantised with error feedback along several paths on what a structure's pruning left.

    Grid and suffixes as `Option` says: scale · {-2^(b-1), ..., 2^(b-1) - 1} with half-precision scales, found by OBC's
    shrink search on the refitted weights; an asymmetric grid has its zero among the codes, which is why the file needs
    no zero points. Source: OBC, arXiv 2208.11580 (pruning, grid search); the order is engine.md section 3's, not OBQ's
    greedy one. A layer without a Hessian has 8 bits, rounded to the nearest.
    """

    version = 3
    source = "OBC, arXiv 2208.11580"

    def offers(self, option: Option) -> bool:
        special = option.rank, option.words, option.width
        return option.bits is not None and special == (None, None, None)

    def needs_data(self, option: Option) -> bool:
        # With 8 bits a weight moves by some thousandths of its row's largest: harmless wherever it is used.
        return option != Option(bits=8)

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        if problem.hessian is None and not any(self.needs_data(o) for o in options):
            return [_nearest(problem) for _ in options]
        found: dict[Option, Realised | None] = {}
        for structure, wanted in by_structure(options):
            if not problem.takes(structure):
                found |= dict.fromkeys(wanted)
                continue
            weight = problem.refitted(structure)
            grids = {o: _Grid(weight, o, 2.0 if problem.is_table else 2.4, problem.row_weights is None) for o in wanted}
            # One factorisation serves all grids.
            has = [o for o in wanted if grids[o].cell is not None]
            codes = problem.quantised(structure, [c for o in has if (c := grids[o].cell) is not None])
            found |= dict.fromkeys(wanted)
            for o, chosen in zip(has, codes, strict=True):
                grid = grids[o]
                if grid.binary:
                    chosen = SIGNS[chosen]
                else:  # 0 is on the grid: no row may lose more than all of it
                    values = chosen * np.repeat(grid.stored, grid.size, axis=-1)[..., : chosen.shape[-1]]
                    chosen[problem.row_errors(values) > problem.row_errors(np.zeros_like(values))] = 0
                found[o] = Realised(
                    problem.shape, "entropy", codes=chosen.reshape(problem.shape), step=grid.step, group=grid.group
                )
        return [found[o] for o in options]


def _nearest(problem: LayerProblem) -> Realised:
    """8 bits per weight, each rounded to the nearest."""
    grid = _Grid(problem.weight, Option(bits=8), 2.0)
    steps = np.where(grid.steps > 0.0, grid.steps, 1.0)
    codes = np.clip(np.rint(problem.weight / steps), -128, 127).astype(np.int32).reshape(problem.shape)
    return Realised(problem.shape, "entropy", codes=codes, step=grid.step)


class _Grid:
    """The grid of one option on refitted weights (groups, rows, d): steps as they are stored, and limits of codes.

    The scales minimise Σ |w - ŵ|^exponent: 2.4 is OBC's, 2 the error itself where columns are on their own. runs:
    whether a cell may have a step for each of a row's runs.
    """

    def __init__(self, weight: np.ndarray, option: Option, exponent: float, runs: bool = False) -> None:
        groups, rows, d = weight.shape
        bits = option.bits or 8
        size = option.group or d
        vectors = weight.reshape(1, 1, 1, -1) if option.per_tensor else obs.column_runs(weight, size)
        scale, low = obs.search_grid(vectors, bits, option.asymmetric, option.minmax, exponent)
        steps = np.asarray(scale.max() or 1.0, np.float32) if option.per_tensor else storable(scale)
        self.binary = bits == 1 and not option.asymmetric
        self.group = option.group if steps.ndim and option.group else None
        self.step: np.ndarray | float
        self.step = float(steps) if not steps.ndim else steps.reshape(groups * rows, -1 if self.group else 1)
        if isinstance(self.step, np.ndarray) and self.group is None:
            self.step = self.step[:, 0]
        full = (groups, rows, scale.shape[2])
        self.stored = np.broadcast_to(steps.astype(np.float32), full)
        self.steps = np.where(np.broadcast_to(scale > 0, full), self.stored, 0)
        self.low = np.broadcast_to(low, full)
        self.high = self.low + 2**bits - 1
        self.size, self.cell = size, None
        if scale.shape[2] == 1 and not self.binary:
            self.cell = obs.Cell(self.stored[..., 0], self.low[..., 0], self.high[..., 0])
        elif runs:
            low, high = (np.where(self.steps > 0, x, 0) for x in (self.low, self.high))  # a run of zeros has codes 0
            levels = SIGNS[1:].astype(np.float32) if self.binary else None
            steps = self.steps if self.binary else self.stored
            self.cell = obs.Cell(steps.astype(np.float32), low, high, run=size, levels=levels)
