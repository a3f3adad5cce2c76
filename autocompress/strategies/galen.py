"""Galen-style: one policy decides sparsity and width of a layer together, and is told how sensitive the layers are."""

from __future__ import annotations

import math

import numpy as np

from autocompress.compressors import Measured
from autocompress.measuring import Context
from autocompress.planning import limits_of
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, with_context
from autocompress.strategies.ddpg import Agent
from autocompress.strategies.episodes import Scores, Walk, episodes_of, geometry, search, undominated, unit
from autocompress.types import MIXED_WIDTHS, Budget, Plan

__all__ = ["Galen"]

LEVELS = tuple(float(f"{level:.2g}") for level in np.geomspace(0.002, 0.6, 10))  # relative errors of the curves
WIDEST = 8.0


class Galen:
    """One DDPG agent for the least KL to the dense model; for each layer its actions are a sparsity and a width of the
    weights, which become the layer's nearest option of any kind. Runs the model.

    The joint agent of Galen with bytes for latency and weights alone: state of geometry, what is left of the budget,
    last actions, and each layer's sensitivity curve, the KL with that layer alone at ten relative errors. Reward -ln KL
    - β max(0, bytes asked for / budget - 1), the one-sided form (its r7), β = 3 as in its example of a logarithmic
    reward; to honour the budget in every episode, not at the end on average, what is asked for is besides cut down to
    what leaves the layers to come their smallest options. Where an option stands: the share of its weights that are
    zero, and its name's bits, the mean width of rows that are not pruned, or else the payload's bits per weight that is
    not zero.
    episodes: None for what the effort grants (`EPISODES`). A search that was killed goes on from the profile's store.
    Source: Galen, arXiv 2212.07818, and its published code. Raises MismatchError without a context.
    """

    needs = "evaluations"

    def __init__(self, episodes: int | None = None, excess: float = 3.0) -> None:
        self.episodes, self.excess = episodes, excess

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, "galen", "measures the model")
        limits = limits_of(budget, profile)
        walk = Walk(profile, limits, undominated(profile, limits))
        points = [
            np.array([(1.0 - rows[i].nonzero / size, _width(rows[i]) / WIDEST) for i in some])
            for some, rows, size in zip(walk.options, walk.rows, walk.sizes, strict=True)
        ]

        def distances(layer: int, actions: np.ndarray) -> np.ndarray:
            return ((points[layer] - actions) ** 2).sum(axis=1)

        features = np.hstack([geometry(profile, context), self.curves(profile, context)])
        rng = np.random.default_rng([context.seed, 2])
        agents = [Agent(features.shape[1] + 2 + 2, 2, rng)]
        scores = Scores(walk, context, f"galen {context.seed}")
        episodes = self.episodes or episodes_of(context.effort, len(walk.names))
        found = search(walk, features, agents, distances, scores, episodes, rng, self.excess)
        return chosen_plan(profile, budget, walk.choice(found.rows), "galen").replace(notes=(found.note,))

    def curves(self, profile: Profile, context: Context) -> np.ndarray:
        """ln KL of every layer alone at each of `LEVELS`, (layers, 10), between the measured points; all in [0, 1]."""
        measured = context.sensitivities(profile, LEVELS)
        table = []
        for name, layer in profile.layers.items():
            points = sorted((math.log(error / layer.energy), math.log(max(kl, 1e-12))) for error, kl in measured[name])
            errors, kls = zip(*points, strict=True) if points else ((0.0,), (math.log(1e-12),))
            table.append(np.interp(np.log(LEVELS), errors, kls))
        return unit(np.array(table).reshape(-1, 1)).reshape(-1, len(LEVELS))


def _width(row: Measured) -> float:
    """Bits of a weight that is not zero, at most 8."""
    if row.option.mix is not None:
        kept = sum(row.option.mix[1:])
        return float(np.dot(row.option.mix, MIXED_WIDTHS)) / kept if kept else 0.0
    own = row.option.bits if row.option.words is None else None
    bits = own or 8.0 * row.bytes / max(row.nonzero, 1)
    return min(float(bits), WIDEST)
