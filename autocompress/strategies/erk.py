"""Erdős-Rényi-Kernel densities: from the shapes of the layers alone. Needs the curves only.

Source: RigL, arXiv 1911.11134, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from autocompress.measuring import Context
from autocompress.profiling import Profile
from autocompress.strategies.densities import DensityRule

__all__ = ["erk", "erk_densities"]


def erk_densities(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Densities min(1, ε · Σ dims / Π dims) of layers of these shapes, with ε such that `density` of all weights stay.

    A weight (out, in, height, width) has Σ dims / Π dims = (out + in + height + width) / (out · in · height · width):
    small layers stay dense. What a layer would get beyond 1 goes to the others, by the same rule, until none is beyond.
    Source: RigL, arXiv 1911.11134, section 3 (1), and the redistribution in the authors' code.
    """
    size = {name: float(np.prod(shape)) for name, shape in shapes.items()}
    share = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    room, below = density * sum(size.values()), dict(share)
    while below:
        epsilon = max(room, 0.0) / sum(size[n] * share[n] for n in below)
        full = [n for n in below if epsilon * share[n] > 1.0]
        if not full:
            return {n: epsilon * share[n] if n in below else 1.0 for n in shapes}
        for n in full:
            room -= size[n]
            del below[n]
    return dict.fromkeys(shapes, 1.0)


def _densities(profile: Profile, context: Context | None) -> Callable[[float], Mapping[str, float]]:
    shapes = {name: profile.shape(name) for name, layer in profile.layers.items() if layer.reached}
    return lambda t: erk_densities(shapes, t)


erk = DensityRule("erk", _densities, needs="curves")
