"""Rate-distortion OBS: `rd(step,lam)`, `rd(step,lam)s60`, `rd(step,lam)2:4`. Each code is chosen by the error it causes
and the bits it costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress.compressors.base import LayerProblem, Realised, by_structure
from autocompress.types import Option

__all__ = ["RateDistortion", "default_grid"]


class RateDistortion:
    """Uniform grid with one step per layer, entropy-coded, after exact pruning to a structure; see
    `obs.rate_distortion_cells`.

    step is in units of the layer's root mean square weight, so that one option means the same for every layer. Rows of
    a table have steps that go with how often they are used.
    Source: engine.md section 4 (OBS error feedback with entropy-constrained scalar quantisation).
    """

    version = 2
    source = "this project: entropy-constrained quantisation inside OBS"

    def offers(self, option: Option) -> bool:
        return option.step is not None and not option.trellis and option.rank is None and option.width is None

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        rms, scales = problem.rms, problem.step_scales
        if scales is not None and not _in_half(rms * scales, options):
            scales = None
        found: dict[Option, Realised | None] = {}
        for structure, wanted in by_structure(options):
            if not problem.takes(structure):
                found |= dict.fromkeys(wanted)
                continue
            steps = [float(np.float32((o.step or 0.0) * rms)) for o in wanted]
            grid = [(s, o.lam or 0.0) for o, s in zip(wanted, steps, strict=True)]
            cells = problem.rate_distortion_cells(structure, grid, scales)
            codes = problem.quantised(structure, cells)
            for o, s, cell, q in zip(wanted, steps, cells, codes, strict=True):
                own = s if scales is None else cell.step.reshape(-1).astype(np.float16)
                found[o] = Realised(problem.shape, "entropy", codes=q.reshape(problem.shape), step=own)
        return [found[o] for o in options]


def _in_half(unit: np.ndarray, options: Sequence[Option]) -> bool:
    """Whether half precision holds every step of every option, `unit` times its own."""
    steps = [o.step or 0.0 for o in options]
    limits = np.finfo(np.float16)
    return min(steps) * unit.min() >= limits.tiny and max(steps) * unit.max() <= limits.max


def default_grid() -> list[Option]:
    """Sparsity x step x λ offered by default. What no solve of ResNet-20 or digits from 6x to 80x misses is left
    out (experiments/grid_trial.py): small steps where most is pruned, and a high price where little is.
    """
    steps = [round(0.1 * 2 ** (k / 2), 3) for k in range(11)]
    found = []
    for sparsity in (0, 35, 60, 77.5, 90, 97):
        own = steps if sparsity < 50 else steps[5:]
        prices = (0.1, 0.3) if sparsity < 80 else (0.1, 0.3, 0.7)
        found += [Option(sparsity=float(sparsity), step=t, lam=lam) for t in own for lam in prices]
    return found
