"""Error curves for the page: of every layer and family of options the undominated points, thinned, and the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autocompress.profiling import LayerProfile, Profile
from autocompress.types import Option, Plan

__all__ = ["FAMILIES", "LayerCurve", "family_of", "layer_curves"]

# What the colours of the page mean, in the order of their legend.
FAMILIES = {
    "trellis": "trellis-coded",
    "rd": "rate-distortion",
    "pruned": "pruned, then coded",
    "widths": "plain widths",
    "structured": "N:M, blocks, channels, low rank, codebooks",
    "floats": "floating point",
}
POINTS = 14  # of a family's front: enough for a line, and 56 layers stay a page of a few hundred kilobytes


def family_of(option: Option) -> str:
    """The key in FAMILIES of an option."""
    structures = option.nm, option.block, option.channels, option.out, option.rank, option.words
    if any(value is not None for value in structures):
        return "structured"
    if option.trellis:
        return "trellis"
    if option.sparsity:
        return "pruned"
    if option.step is not None:
        return "rd"
    return "widths" if option.bits is not None or option.mix is not None else "floats"


@dataclass(frozen=True)
class LayerCurve:
    """A layer's errors over bytes: per family the front [(bytes, relative error)], by rising bytes, and the chosen
    point.
    """

    name: str
    weights: int
    fronts: dict[str, list[tuple[int, float]]]
    chosen: Option
    bytes: int
    error: float

    def bits(self, size: float) -> float:
        return 8 * size / self.weights


def layer_curves(plan: Plan, profile: Profile) -> list[LayerCurve]:
    """The curves of every layer that calibration reached, in the order of the model. Points of error 0, the dense
    weights, are left out: logarithms have no place for them.
    """
    made = profile.with_realised(plan)
    found = []
    for name, layer in profile.layers.items():
        if layer.reached and layer.energy > 0.0:
            fronts = {key: _thinned(front) for key in FAMILIES if (front := _front(layer, key))}
            row = made.layers[name].row(plan.layers[name])
            curve = LayerCurve(name, layer.layer.size, fronts, row.option, row.bytes, row.error / layer.energy)
            found.append(curve)
    return found


def _front(layer: LayerProfile, family: str) -> list[tuple[int, float]]:
    rows = (row for row in layer.rows if row.error > 0.0 and row.bytes > 0 and family_of(row.option) == family)
    front: list[tuple[int, float]] = []
    for size, error in sorted((row.bytes, row.error / layer.energy) for row in rows):
        if not front or error < front[-1][1]:
            front.append((size, error))
    return front


def _thinned(front: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most POINTS of them, both ends among them, about evenly spaced in the logarithm of the bytes."""
    if len(front) <= POINTS:
        return list(front)
    low, high = math.log(front[0][0]), math.log(front[-1][0])
    at = [low + (high - low) * i / (POINTS - 1) for i in range(POINTS)]
    near = {min(range(len(front)), key=lambda i: abs(math.log(front[i][0]) - target)) for target in at}
    return [front[i] for i in sorted(near)]
