"""Rows of one layer at several widths, 0 bits among them: `mix25/0/25/50/0`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress import obs
from autocompress.compressors.base import LayerProblem, Realised, storable
from autocompress.types import DENSE, MIXED_WIDTHS, Option

__all__ = ["MixedRows", "mixed_grid"]


class MixedRows:
    """Output rows at 0, 2, 4, 6 and 8 bits, by one criterion for pruning and widths: the row's energy ½ w H wᵀ.

    Rows of the least energy get the least bits; where a percentage ends within a row, it is rounded to the nearest one.
    A row of b bits has the grid of `w{b}`, scale · {-2^(b-1), ..., 2^(b-1) - 1}, quantised with error feedback; rows do
    not make up for each other, so that a pruned one is lost whole. Where half precision cannot hold a scale per row,
    all rows share the largest.
    Source: AJPQ, arXiv 2011.06231 (pruning as 0 bits, one importance for both; its own measure is not public). The
    widths are this project's; the quantiser is OBC's, as in `ObcUniform`.
    """

    version = 1
    source = "AJPQ, arXiv 2011.06231, in this project's reading"

    def offers(self, option: Option) -> bool:
        return option.mix is not None and option.rank is None

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        energies = problem.row_errors(np.zeros_like(problem.weight))
        exponent = 2.0 if problem.is_table else 2.4  # as in `ObcUniform`
        # A pruned row's scale multiplies nothing; it has that of the least width.
        scales = {b: obs.search_grid(problem.weight, max(b, 2), exponent=exponent)[0] for b in MIXED_WIDTHS}
        cells: list[obs.Cell] = []
        steps: list[np.ndarray | float] = []
        for option in options:
            widths = row_widths(energies, option)
            scale = np.select([widths == b for b in MIXED_WIDTHS], [scales[b] for b in MIXED_WIDTHS])
            step = storable(scale)
            half = np.where(widths > 0, 2 ** np.maximum(widths - 1, 0), 0)
            cells.append(
                obs.Cell(np.broadcast_to(step.astype(np.float32), widths.shape), -half, np.maximum(half - 1, 0))
            )
            steps.append(step.reshape(-1) if step.ndim else float(step))
        found: list[Realised | None] = []
        for cell, own, codes in zip(cells, steps, problem.quantised(DENSE, cells), strict=True):
            values = codes * cell.step[..., None]
            codes[problem.row_errors(values) > energies] = 0  # no row may lose more than all of it
            found.append(Realised(problem.shape, "entropy", codes=codes.reshape(problem.shape), step=own, mixed=True))
        return found


def row_widths(energies: np.ndarray, option: Option) -> np.ndarray:
    """Bits of every row, int64 in the shape of energies (groups, rows): the least energies get the least."""
    assert option.mix is not None
    ends = np.floor(np.cumsum(option.mix) / 100.0 * energies.size + 0.5).astype(int)
    rank = np.argsort(np.argsort(energies, axis=None, kind="stable"), kind="stable")
    place = np.minimum(np.searchsorted(ends, rank, side="right"), len(MIXED_WIDTHS) - 1)
    return np.array(MIXED_WIDTHS)[place].reshape(energies.shape)


def mixed_grid() -> list[Option]:
    """Eight levels of pruned rows times nine splits of the others, from all at 2 bits to all at 8."""
    splits: list[tuple[float, ...]] = [(1, 0, 0, 0)]
    for k in range(3):  # from one width to the next; between 2 and 4 bits, where a step doubles the bytes, in quarters
        for share in (0.25, 0.5, 0.75, 1.0) if k == 0 else (0.5, 1.0):
            splits.append(tuple((1 - share) * (i == k) + share * (i == k + 1) for i in range(4)))
    found = []
    for pruned in (0, 6, 12, 19, 25, 38, 50, 75):  # whole percents: a row of 16, two, three, four ...
        for split in splits:
            ends = [pruned + round((100 - pruned) * sum(split[: i + 1])) for i in range(4)]
            shares = [pruned, *(b - a for a, b in zip([pruned, *ends], ends, strict=False))]
            found.append(Option(mix=tuple(map(float, shares))))
    return found
