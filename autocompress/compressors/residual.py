"""Low rank and what it leaves: `rank4w6+w2`, `k2r4w4+s75w4`, `rank2fp16+rd(1.6,0.1)`. Two thin layers, and a third."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from autocompress.compressors.base import Compressor, LayerProblem, Realised
from autocompress.compressors.lowrank import LowRank
from autocompress.types import Option

__all__ = ["LowRankResidual", "residual_grid"]


class LowRankResidual:
    """W ≈ A B + S: A B as `LowRank` makes it, S any other option of what it leaves, all with the layer's own Hessian.

    In turns: A B of least error for W - S, beginning with S = 0; then S for W - A B, by the option's own compressor, so
    that its error feedback makes up for what A and B lost to rounding too. That is done twice (`rounds`), and of all
    pairs (A B, S) the one of least ½ tr((W - AB - S) H (W - AB - S)ᵀ) stays. Steps of rate-distortion options are in
    units of the root mean square of what is left. None where `LowRank` or the other option has none.
    experiments/residual_layers.py compares rounds and what the third layer is for.
    Sources: CALDERA, arXiv 2405.18886 (in turns, on the Hessian); LQER, arXiv 2402.02446, and OATS, arXiv 2409.13652
    (what a low rank is good for beside few bits, and beside sparsity).
    """

    version = 1
    source = "CALDERA, arXiv 2405.18886; LQER, arXiv 2402.02446"

    def __init__(self, inner: Callable[[Option], Compressor], rounds: int = 2) -> None:
        self.inner, self.rounds = inner, rounds

    def offers(self, option: Option) -> bool:
        return option.residual is not None and LowRank().offers(dataclasses.replace(option, residual=None))

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        found: dict[Option, Realised | None] = dict.fromkeys(options)
        fronts = list(dict.fromkeys(dataclasses.replace(o, residual=None) for o in options))
        for front, pair in zip(fronts, LowRank().realise_all(problem, fronts), strict=True):
            if pair is None:
                continue
            wanted = [o for o in options if dataclasses.replace(o, residual=None) == front]
            left = _without(problem, pair)
            for option in wanted:
                assert option.residual is not None
                found[option] = self._improved(problem, front, pair, left, option.residual)
        return [found[o] for o in options]

    def _improved(
        self, problem: LayerProblem, front: Option, pair: Realised, left: LayerProblem, behind: Option
    ) -> Realised | None:
        compressor = self.inner(behind)
        found: list[tuple[float, Realised]] = []
        (rest,) = compressor.realise_all(left, [behind])
        while rest is not None:
            assert pair.factors is not None
            whole = Realised(problem.shape, pair.codec, factors=(*pair.factors, rest))
            found.append((problem.error(whole.weight()), whole))
            (again,) = LowRank().realise_all(_without(problem, rest), [front])
            if again is None or len(found) == self.rounds:
                break
            pair = again
            (rest,) = compressor.realise_all(_without(problem, pair), [behind])
        return min(found, key=lambda way: way[0])[1] if found else None


def residual_grid() -> list[Option]:
    """Ranks 1, 2, 4 and 8 with factors of 4 and 6 bits, beside two to four bits, two of four, three quarters or nine
    tenths pruned, and four rate-distortion codes.
    """
    fronts = [Option(rank=r, bits=b) for r in (1, 2, 4, 8) for b in (4, 6)]
    values = [Option(bits=b) for b in (2, 3, 4)]
    values += [Option(nm=(2, 4), bits=4), Option(sparsity=75.0, bits=4), Option(sparsity=90.0, bits=4)]
    values += [Option(step=round(0.57 * 2 ** (k / 2), 3), lam=0.1) for k in range(4)]
    return [dataclasses.replace(front, residual=value) for front in fronts for value in values]


def _without(problem: LayerProblem, part: Realised) -> LayerProblem:
    """The layer whose weight is what a part of it leaves, with the same Hessian."""
    weight = problem.weight - part.weight().astype(np.float64).reshape(problem.weight.shape)
    return LayerProblem(problem.name, problem.shape, weight, problem.hessian, exact_limit=problem.exact_limit)
