"""Narrower layers: `n75/50`, `n75/50w4`, `n50/100tcq(0.34,0.4)`. Input channels go and the rest makes up for them,
outputs go, and what stays is compressed as any layer is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autocompress.compressors.base import Compressor, LayerProblem, Realised
from autocompress.types import Option

__all__ = ["Narrow", "narrow_grid"]

LEVELS = (100.0, 75.0, 50.0, 25.0)  # percent of a group's channels that stay


class Narrow:
    """Another option on a layer of which the columns A and the rows B stay.

    Columns R go at once, with the exact refit of the rest, W'_A = W_A + W_R H_RA H_AA⁻¹ (OBS for a block of weights);
    W'_A with its Hessian H_AA is a layer of its own, whose optimum it is. It is compressed by the inner option, and
    rows B are taken of that, so that one refit and one pass serve every width of the output. The error of removal and
    the error of compression add up: ½ tr(ΔW H ΔWᵀ) over the rows that stay. Rows that go cost nothing here: layers that
    read them pay. Which columns and rows stay at a level is the problem's (`inputs`, `outputs`). Source: OBC, arXiv
    2208.11580, section 4, with the structure of DepGraph, arXiv 2301.12900.
    """

    version = 1
    source = "OBC, arXiv 2208.11580; DepGraph, arXiv 2301.12900"

    def __init__(self, inner: Callable[[Option], Compressor]) -> None:
        self.inner = inner

    def offers(self, option: Option) -> bool:
        return option.width is not None

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        found: dict[Option, Realised | None] = dict.fromkeys(options)
        by_input: dict[float, list[Option]] = {}
        for option in options:
            if option.width is not None and problem.row_weights is None and problem.cut(option.width) is not None:
                by_input.setdefault(option.width[0], []).append(option)
        for level, wanted in by_input.items():
            own = self._compressed(refitted(problem, level), list(dict.fromkeys(o.inner for o in wanted)))
            for option in wanted:
                whole = own[option.inner]
                found[option] = None if whole is None else _rows(problem, whole, option)
        return [found[option] for option in options]

    def _compressed(self, problem: LayerProblem, options: Sequence[Option]) -> Mapping[Option, Realised | None]:
        found: dict[Option, Realised | None] = {}
        compressors = {option: self.inner(option) for option in options}
        for compressor in dict.fromkeys(compressors.values()):
            mine = [option for option in options if compressors[option] is compressor]
            found |= dict(zip(mine, compressor.realise_all(problem, mine), strict=True))
        return found


def narrow_grid() -> list[Option]:
    """Five widths of integers, ten points on the trellis and four behind a sparsity, at every pair of levels."""
    values = [Option(bits=b) for b in (3, 4, 5, 6, 8)]
    values += [Option(step=round(0.17 * 2 ** (k / 3), 3), lam=0.4, trellis=True) for k in range(10)]
    values += [Option(sparsity=s, step=t, lam=0.3) for s, t in ((35.0, 0.4), (60.0, 0.57), (77.5, 0.8), (90.0, 1.13))]
    pairs = [(a, b) for a in LEVELS for b in LEVELS if (a, b) != (100.0, 100.0)]
    return [dataclasses.replace(value, width=pair) for pair in pairs for value in values]


def refitted(problem: LayerProblem, level: float) -> LayerProblem:
    """The layer with the input channels of a level, all its rows, refitted, and the Hessian of what stays."""

    def find() -> LayerProblem:
        if level == 100.0:
            return problem
        columns = problem.inputs[level]
        gone = np.setdiff1d(np.arange(problem.weight.shape[-1]), columns)
        hessian = problem.shared_hessian()
        inner = np.ascontiguousarray(hessian[:, columns[:, None], columns])
        cross = hessian[:, columns[:, None], gone] @ problem.weight[..., gone].swapaxes(1, 2)
        weight = problem.weight[..., columns] + np.linalg.solve(inner, cross).swapaxes(1, 2)
        positions = int(np.prod(problem.shape[2:]))
        shape = (problem.shape[0], len(columns) // positions, *problem.shape[2:])
        limit = problem.exact_limit
        return LayerProblem(problem.name, shape, weight, inner, exact_limit=limit, factorable=problem.factorable)

    return problem.once(("narrower", level), find)


def _rows(problem: LayerProblem, whole: Realised, option: Option) -> Realised:
    """Of a compressed weight of all rows, those that stay."""
    assert option.width is not None
    cut = problem.cut(option.width)
    assert cut is not None
    rows, count = cut[1], whole.shape[0]

    def taken(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.ascontiguousarray(array.reshape(count, -1)[rows])

    step = whole.step if np.ndim(whole.step) == 0 else np.asarray(whole.step)[rows]
    shape = (len(rows), *whole.shape[1:])
    return dataclasses.replace(
        whole, shape=shape, codes=taken(whole.codes), step=step, values=taken(whole.values), cut=cut
    )
