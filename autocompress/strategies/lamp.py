"""Layer-adaptive magnitude pruning: one threshold for scores that say how much of its layer a weight is.

Objective: least distortion of each layer relative to what is left of it, layers treated as alike. Needs the weights.
Source: LAMP, arXiv 2010.07611.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from autocompress.measuring import Context
from autocompress.profiling import Profile
from autocompress.strategies.base import weights_of
from autocompress.strategies.densities import DensityRule, above_one_threshold

__all__ = ["lamp", "lamp_scores"]


def lamp_scores(weight: np.ndarray) -> np.ndarray:
    """Scores w_u² / Σ_v w_v² over all v with |w_v| >= |w_u|, float64 in the weight's shape.

    The share that a weight has of what is left of its layer when all smaller ones are gone: the largest of every layer
    has 1. Of equal weights the first in the array counts as the smaller. Source: LAMP, arXiv 2010.07611, section 3 (4).
    """
    squares = np.asarray(weight, np.float64).ravel() ** 2
    order = np.argsort(squares, kind="stable")
    left = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = squares[order] / np.where(left > 0.0, left, 1.0)
    return scores.reshape(np.shape(weight))


def _densities(profile: Profile, context: Context | None) -> Callable[[float], Mapping[str, float]]:
    return above_one_threshold({n: lamp_scores(w) for n, w in weights_of(profile, context, "lamp").items()})


lamp = DensityRule("lamp", _densities)
