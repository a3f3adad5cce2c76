"""Narrower layers beside all other options in one choice: what `solvers.coupled` has to know of a profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from autocompress.profiling import Profile
from autocompress.records import Template
from solvers import Problem, Solution
from solvers.coupled import Coupling, solve_coupled

__all__ = ["is_coupled", "solve_layers", "vector_bytes"]


def is_coupled(profile: Profile) -> bool:
    """Whether the rows of a profile (see `Profile.joint`) leave a group of channels more than one level."""
    return any(len(levels) > 1 for levels in _levels(profile).values())


def vector_bytes(profile: Profile, group: str, level: float) -> int:
    """What the norms and biases of a group of channels take more at a level than whole: not above 0."""
    weights = set(profile.template.keys.values())

    def total(template: Template) -> int:
        return sum(entry.bytes for entry in template.entries if entry.name not in weights)

    return total(profile.template.narrowed({group: level})) - total(profile.template)


def solve_layers(
    profile: Profile, problem: Problem, gap: float = 1e-4, smallest: bool = False, time_limit: float | None = None
) -> Solution:
    """The answer to the problem of a joint profile (`planning.problem_of`) in which layers agree on their channels.

    What shorter norms and biases save counts in: `problem`'s bytes are those of payloads beside the vectors of the
    whole network. `cost` of the answer is less by it; `choice` has one entry per layer. smallest: losses are bytes, and
    those of vectors are losses too.
    """
    levels = _levels(profile)
    names = list(levels)
    index = {name: {level: i for i, level in enumerate(found)} for name, found in levels.items()}
    scope: list[tuple[int, ...]] = []
    state: list[np.ndarray] = []
    for links in profile.links().values():
        own = list(dict.fromkeys(name for name in (links[0][0], links[0][2]) if name))
        scope.append(tuple(names.index(name) for name in own))
        at = [{above: over, below: under} for below, under, above, over in links]
        table = [[index[name][found[name]] for name in own] for found in at]
        state.append(np.array(table, np.int64).reshape(len(links), len(own)))
    # One group more for each variable: its vectors, whose bytes follow its level alone.
    loss, cost = list(problem.loss), list(problem.cost)
    for v, name in enumerate(names):
        saved = np.zeros((len(levels[name]), len(problem.resources)), np.int64)
        saved[:, 0] = [vector_bytes(profile, name, level) for level in levels[name]]
        loss.append(saved[:, 0] * float(smallest))
        cost.append(saved)
        scope.append((v,))
        state.append(np.arange(len(saved))[:, None])
    whole = Problem(loss, cost, problem.budget, problem.resources)
    found = solve_coupled(
        whole, Coupling([len(levels[n]) for n in names], scope, state), gap=gap, time_limit=time_limit
    )
    return dataclasses.replace(found, choice=found.choice[: problem.groups])


def _levels(profile: Profile) -> Mapping[str, list[float]]:
    """The levels of each group of channels that some row has, the whole first."""
    found: dict[str, set[float]] = {}
    if profile.widths is not None:
        for name, layer in profile.layers.items():
            for row in layer.rows:
                inputs, below, outputs, above = profile.widths.link(name, row.option)
                for group, level in ((inputs, below), (outputs, above)):
                    if group:
                        found.setdefault(group, set()).add(level)
    return {group: sorted(levels, reverse=True) for group, levels in found.items()}
