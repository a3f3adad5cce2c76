"""Global magnitude: the largest weights of the network stay, whatever their layer, which sets the layers' densities.

Objective: least Σ w² of what goes, for a number of weights that stay. Needs the weights. Source: Han et al., arXiv
1506.02626, with one threshold for all layers, as Frankle and Carbin, arXiv 1803.03635, have it for deep networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from autocompress.measuring import Context
from autocompress.profiling import Profile
from autocompress.strategies.base import weights_of
from autocompress.strategies.densities import DensityRule, above_one_threshold

__all__ = ["magnitude"]


def _densities(profile: Profile, context: Context | None) -> Callable[[float], Mapping[str, float]]:
    return above_one_threshold({n: np.abs(w) for n, w in weights_of(profile, context, "magnitude").items()})


magnitude = DensityRule("magnitude", _densities)
