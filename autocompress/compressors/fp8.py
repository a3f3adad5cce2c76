"""Eight-bit floats: `fp8`, `s50fp8`. e4m3 numbers times a scale per output row, chosen with OBS error feedback."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress import obs
from autocompress.compressors.base import LayerProblem, Realised, by_structure, storable
from autocompress.storage import E4M3
from autocompress.types import Option

__all__ = ["Fp8"]


class Fp8:
    """The largest weight of a row becomes 448, the largest e4m3 number; the others take the nearest to their target.

    Sources: FP8 formats for deep learning, arXiv 2209.05433 (e4m3); OBS error feedback as in `obs.quantise_levels`.
    """

    version = 1
    source = "FP8 formats for deep learning, arXiv 2209.05433"

    def offers(self, option: Option) -> bool:
        return option.fp8 and option.rank is None and option.width is None

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        if not problem.takes_levels:
            return [None] * len(options)
        levels = np.concatenate([-E4M3[:0:-1], E4M3])
        found: dict[Option, Realised] = {}
        for structure, wanted in by_structure(options):
            weight = problem.refitted(structure)
            step = storable(np.abs(weight).max(axis=-1, initial=0.0) / E4M3[-1])
            steps = step.astype(np.float64)[..., None] if step.ndim else step
            codes = obs.quantise_levels(
                problem.weight, problem.shared_hessian(), *problem.kept(structure), steps, levels=levels
            )
            for o in wanted:
                found[o] = Realised(
                    problem.shape,
                    "fp8",
                    codes=codes.reshape(problem.shape).astype(np.float32),
                    step=step.reshape(-1) if step.ndim else float(step),
                )
        return [found[o] for o in options]
