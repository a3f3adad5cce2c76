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

    Sources: FP8 formats for deep learning, arXiv 2209.05433 (e4m3); OBS error feedback as in `obs.salient_cells`.
    """

    version = 1
    source = "FP8 formats for deep learning, arXiv 2209.05433"

    def offers(self, option: Option) -> bool:
        return option.fp8 and option.rank is None and option.width is None

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        if problem.row_weights is not None:  # rows that weigh differently take no levels
            return [None] * len(options)
        levels = np.concatenate([-E4M3[:0:-1], E4M3]).astype(np.float32)
        found: dict[Option, Realised | None] = {}
        for structure, wanted in by_structure(options):
            if not problem.takes(structure):
                found |= dict.fromkeys(wanted)
                continue
            weight = problem.refitted(structure)
            step = storable(np.abs(weight).max(axis=-1, initial=0.0) / E4M3[-1])
            steps = np.broadcast_to(step.astype(np.float32), weight.shape[:-1])
            none = np.zeros(weight.shape[:-1], np.int64)
            chosen = problem.quantised(structure, [obs.Cell(steps, none, none, levels=levels)])[0]
            codes = np.concatenate([[0.0], levels])[chosen]
            for o in wanted:
                found[o] = Realised(
                    problem.shape,
                    "fp8",
                    codes=codes.reshape(problem.shape).astype(np.float32),
                    step=step.reshape(-1) if step.ndim else float(step),
                )
        return [found[o] for o in options]
