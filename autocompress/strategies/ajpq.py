"""AJPQ-style: two controllers go through the layers, one for how many channels go, one for the widths of the others."""

from __future__ import annotations

import numpy as np

from autocompress.compressors import Measured
from autocompress.measuring import Context
from autocompress.planning import limits_of
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, with_context
from autocompress.strategies.ddpg import Agent
from autocompress.strategies.episodes import Scores, Walk, episodes_of, geometry, search, undominated
from autocompress.types import MIXED_WIDTHS, Budget, Plan

__all__ = ["Ajpq"]

WIDTHS = np.array(MIXED_WIDTHS[1:], float)
SHARPNESS = 6.0  # of the split over widths: one of them gets up to e^6 times as much as another, so nearly all


class Ajpq:
    """Hierarchical DDPG for the least KL to the dense model. For each layer the layer controller's action is the share
    of rows at 0 bits, the channel controller's the split of the others over 2, 4, 6 and 8 bits (a softmax). Runs the
    model.

    The paper's state, reward, agents, widths and importance are not public: this is a reconstruction, with the state of
    AMC, the limits of AMC's episodes in bytes of the file, the rows' energy for importance (`MixedRows`), and the
    reward -ln KL on the held-out slice, without tuning. What is asked for becomes the nearest of the layer's `mix`
    options, by the share pruned and the cumulative split, that leaves the layers to come their smallest. A layer
    without any has its other options instead, and so have all where no choice of `mix` options is within the budget:
    there the share of zeros stands for pruned rows, and the payload's bits per weight that is not zero for the mean
    width.
    episodes: None for what the effort grants (`EPISODES`). A search that was killed goes on from the profile's store.
    Source: AJPQ, arXiv 2011.06231 (abstract); AMC, arXiv 1802.03494. Raises MismatchError without a context.
    """

    needs = "evaluations"

    def __init__(self, episodes: int | None = None) -> None:
        self.episodes = episodes

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, "ajpq", "measures the model")
        limits = limits_of(budget, profile)
        walk = Walk(profile, limits, undominated(profile, limits, lambda row: row.option.mix is not None))
        points = [
            np.array([_point(rows[i], size) for i in some])
            for some, rows, size in zip(walk.options, walk.rows, walk.sizes, strict=True)
        ]

        def distances(layer: int, actions: np.ndarray) -> np.ndarray:
            split = np.exp(SHARPNESS * actions[1:])
            wanted = np.concatenate([actions[:1], np.cumsum(split / split.sum())[:3]])
            return ((points[layer] - wanted) ** 2).sum(axis=1)

        features = geometry(profile, context)
        rng = np.random.default_rng([context.seed, 1])
        states = features.shape[1] + 2 + 5
        agents = [Agent(states, 1, rng), Agent(states + 1, 4, rng)]
        scores = Scores(walk, context, f"ajpq {context.seed}")
        episodes = self.episodes or episodes_of(context.effort, len(walk.names))
        found = search(walk, features, agents, distances, scores, episodes, rng)
        return chosen_plan(profile, budget, walk.choice(found.rows), "ajpq").replace(notes=(found.note,))


def _point(row: Measured, weights: int) -> np.ndarray:
    """Where an option stands: the share of rows at 0 bits, and of the others those at 2, up to 4 and up to 6 bits."""
    if row.option.mix is not None:
        pruned, split = row.option.mix[0] / 100.0, np.array(row.option.mix[1:])
        return np.array([pruned, *(np.cumsum(split)[:3] / split.sum() if split.any() else np.ones(3))])
    width = min(max(8.0 * row.bytes / max(row.nonzero, 1), WIDTHS[0]), WIDTHS[-1])
    # All rows at the widths beside it, so that their mean is this one.
    return np.array([1.0 - row.nonzero / weights, *np.clip((WIDTHS[1:] - width) / 2.0, 0.0, 1.0)])
