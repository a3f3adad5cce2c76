"""Trellis-coded OBS: `tcq(step,lam)`. As `rd(step,lam)`, but each code's parity picks the quantiser of the next one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress import obs
from autocompress.compressors.base import LayerProblem, Realised
from autocompress.types import Option

__all__ = ["TrellisCoded", "trellis_grid"]


class TrellisCoded:
    """Dependent quantisation with one step per layer, entropy-coded; see `obs.trellis_codes`.

    step is in units of the layer's root mean square weight, as for `rd`, but it is half the distance between the codes
    of a state. No pruning first: zeros come from the price of a bit. Source: this project (dependent quantisation
    inside the OBS error feedback).
    """

    version = 1
    source = "this project: dependent (trellis-coded) quantisation inside OBS"

    def offers(self, option: Option) -> bool:
        return option.trellis and option == Option(step=option.step, lam=option.lam, trellis=True)

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        # Rows that are not the stored rows would leave the trellis.
        stored = problem.weight.shape[0] * problem.weight.shape[1] == problem.shape[0] and len(problem.shape) >= 2
        if not stored or problem.row_weights is not None:  # one factor serves all rows, however many columns they have
            return [None] * len(options)
        steps = [float(np.float32((o.step or 0.0) * problem.rms)) for o in options]
        grid = [(step, o.lam or 0.0) for o, step in zip(options, steps, strict=True)]
        codes = obs.trellis_codes(problem.weight, problem.shared_hessian(), grid, threads=1)
        return [
            Realised(problem.shape, "trellis", codes=q.reshape(problem.shape), step=step)
            for q, step in zip(codes, steps, strict=True)
        ]


def trellis_grid() -> list[Option]:
    """Step x λ offered by default: steps a quarter of an octave apart (experiments/trellis_trial.py)."""
    steps = [round(0.12 * 2 ** (k / 4), 3) for k in range(17)]
    return [Option(step=t, lam=lam, trellis=True) for t in steps for lam in (0.25, 0.55)]
