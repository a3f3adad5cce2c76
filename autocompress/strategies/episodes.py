"""Plans made layer by layer: the walk that learning strategies take, its exact limits, its scores, and the search."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from autocompress.compressors import Measured
from autocompress.errors import StoreError
from autocompress.measuring import Context
from autocompress.planning import Limits, allocate, energy_losses, row_costs, within_limits
from autocompress.profiling import Profile
from autocompress.strategies.ddpg import Agent

__all__ = ["EPISODES", "Found", "Scores", "Walk", "episodes_of", "geometry", "search", "undominated"]

# Episodes by effort: at most so many, and so many for each layer, as an episode teaches a step per layer.
EPISODES = {"fast": (60, 3), "normal": (300, 15), "max": (1000, 50)}
WARM_UP = 0.15  # share of the episodes that are drawn at random, before anything is learnt
FIRST_NOISE, LAST_NOISE = 0.15, 0.03  # of actions in [0, 1]; falls by the same factor with every episode
SCORES_VERSION = 1
log = logging.getLogger(__name__)

Choice = tuple[int, ...]  # a row of the profile for each layer, in its order


def episodes_of(effort: str, layers: int) -> int:
    """How many episodes an effort grants a network of so many layers."""
    most, each = EPISODES[effort]
    return max(1, min(most, each * layers))


def undominated(
    profile: Profile, limits: Limits, only: Callable[[Measured], bool] = lambda row: True
) -> list[list[int]]:
    """Of every layer the rows, by number, that `only` takes (all of them where it takes none) and that no other of
    these beats in error, bytes and every limited running cost at once: a controller could only lose by them.
    """
    running = [row_costs(profile, name) for name in limits.running]
    found = []
    for name, layer in profile.layers.items():
        taken = [i for i, row in enumerate(layer.rows) if only(row)] or list(range(len(layer.rows)))
        facts = np.array([[layer.rows[i].error, layer.rows[i].bytes, *(r[name][i] for r in running)] for i in taken])
        keep: dict[tuple[float, ...], int] = {}
        for i, own in zip(taken, facts, strict=True):
            if not ((facts <= own).all(axis=1) & (facts < own).any(axis=1)).any():
                keep.setdefault(tuple(own), i)  # of equal rows the first
        found.append(list(keep.values()))
    return found


class Walk:
    """A profile's layers in order, each given one of its options, so that every walk ends within the limits.

    `base`: a choice within the limits that leaves later layers as much room as there is. A layer may take a row if the
    file with the rows chosen so far, that one, and the base's for all layers to come is within the limits, exactly
    (`Template.file_bytes`); so its row of the base can always be taken. `options`: of every layer the rows that may be
    chosen, by number; where their cheapest are not within the limits, all rows of the profile.
    Raises InfeasibleError where nothing is.
    """

    def __init__(self, profile: Profile, limits: Limits, options: Sequence[Sequence[int]]) -> None:
        self.profile, self.limits = profile, limits
        self._fitting: dict[Choice, bool] = {}
        self.names = list(profile.layers)
        self.rows = [profile.layers[name].rows for name in self.names]
        costs = [
            np.array([r.bytes for r in rows]) / limits.bytes
            + sum(row_costs(profile, cost)[name] / limit for cost, limit in limits.running.items())
            for name, rows in zip(self.names, self.rows, strict=True)
        ]
        self.options = [list(some) for some in options]
        self.base = tuple(min(some, key=lambda i: (c[i], i)) for some, c in zip(self.options, costs, strict=True))
        if not self.fits(self.base):
            self.options = [list(range(len(rows))) for rows in self.rows]
            self.base = tuple(int(c.argmin()) for c in costs)
        if not self.fits(self.base):
            found = allocate(profile, limits, energy_losses(profile)).rows
            self.base = tuple(rows.index(found[n]) for n, rows in zip(self.names, self.rows, strict=True))
        self.sizes = np.array([math.prod(profile.shape(name)) for name in self.names])
        payload = sum(rows[i].bytes for rows, i in zip(self.rows, self.base, strict=True))
        self._room = max(limits.bytes - self.file_bytes(self.base) + payload, 1)  # of the base's header

    def choice(self, rows: Choice) -> dict[str, Measured]:
        return {name: found[i] for name, found, i in zip(self.names, self.rows, rows, strict=True)}

    def file_bytes(self, rows: Choice) -> int:
        return self.profile.template.file_bytes(self.choice(rows))

    def fits(self, rows: Choice) -> bool:
        if rows not in self._fitting:
            self._fitting[rows] = within_limits(self.profile, self.limits, self.choice(rows))
        return self._fitting[rows]

    def nearest(self, taken: Sequence[int], distances: np.ndarray, free: bool = False) -> int:
        """The next layer's row: of its options (distances in their order) the nearest that may be taken; free: of all
        of them.
        """
        here = len(taken)
        order = [self.options[here][k] for k in np.argsort(distances, kind="stable")]
        if free:
            return order[0]
        rest = self.base[here + 1 :]
        return next((i for i in order if self.fits((*taken, i, *rest))), self.base[here])

    def room(self, taken: Sequence[int]) -> tuple[float, float]:
        """What is left when these layers are done: the part of the budget's payload, and bytes for each weight to
        come.
        """
        left = self._room - sum(rows[i].bytes for rows, i in zip(self.rows, taken, strict=False))
        weights = max(int(self.sizes[len(taken) :].sum()), 1)
        return left / self._room, min(left / weights, 4.0)


def geometry(profile: Profile, context: Context | None = None) -> np.ndarray:
    """AMC's features of every layer, (layers, 9), each scaled to [0, 1] over the network: index, and the logarithms of
    outputs n, inputs c, kernel positions k, stride, weights, positions, energy per weight, share of the bytes so far.

    Source: AMC, arXiv 1802.03494, section 3.1.
    """
    columns = []
    for index, (name, found) in enumerate(profile.layers.items()):
        layer, shape = found.layer, profile.shape(name)
        size = math.prod(shape)
        stats = profile.statistics.layers.get(name)
        stride = 1 if context is None else getattr(context.model.get_submodule(layer.owners[0]), "stride", None) or 1
        sizes = (
            shape[0],
            math.prod(shape[1:2]),
            math.prod(shape[2:]),
            float(np.prod(stride)),
            size,
            1 if stats is None else max(stats.positions, 1),
        )
        energy = math.log(found.energy / size) if found.energy > 0.0 else 0.0
        columns.append([float(index), *(math.log(x) for x in sizes), energy])
    table = np.array(columns)
    weights = np.array([math.prod(profile.shape(name)) for name in profile.layers], float)
    table = np.column_stack([table, np.cumsum(weights) / weights.sum()])
    return unit(table)


def unit(table: np.ndarray) -> np.ndarray:
    """Every column moved and scaled to [0, 1]; 0 where it is the same everywhere."""
    low, high = table.min(axis=0), table.max(axis=0)
    return (table - low) / np.where(high > low, high - low, 1.0)


class Scores:
    """KL of choices on the held-out slice (`Context.score`), each measured once; in the profile's store, where there is
    one, so that a search that was killed comes to the same choices again without measuring them.

    Named by all that a score depends on, and by the search, which is one writer. `measured` counts what was not known.
    """

    def __init__(self, walk: Walk, context: Context, search: str) -> None:
        self.walk, self.context = walk, context
        profile, data = walk.profile, context.data_digest
        facts = [SCORES_VERSION, profile.key, profile.template.bits, data, search, str(walk.limits)]
        self.path = f"extra/episodes-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
        self.measured = 0
        stored = None if profile.store is None else profile.store.read_json(self.path)
        self._prepared = False
        self.known: dict[Choice, float] = {tuple(rows): float(kl) for rows, kl in stored or ()}

    def __call__(self, rows: Choice) -> float:
        if rows not in self.known:
            walk = self.walk
            if not self._prepared:
                pool = zip(walk.names, walk.rows, walk.options, strict=True)
                self.context.prepare(walk.profile, {n: [found[i].option for i in some] for n, found, some in pool})
                self._prepared = True
            layers = {name: row.option for name, row in walk.choice(rows).items()}
            kl = self.context.score(walk.profile, layers)
            self.known[rows] = math.inf if math.isnan(kl) else kl
            self.measured += 1
            self._keep()
        return self.known[rows]

    def _keep(self) -> None:
        store = self.walk.profile.store
        if store is None:
            return
        try:
            with store.writing():
                store.write_json(self.path, [[list(rows), str(kl)] for rows, kl in self.known.items()])
        except StoreError as error:  # the next score is kept with this one
            log.info("a score is not kept: %s", error)


@dataclass(frozen=True)
class Found:
    """The best choice of a search and its score; `trace`: (score of the episode, best so far) by episode; `choices`:
    how many different ones there were.
    """

    rows: Choice
    score: float
    trace: tuple[tuple[float, float], ...] = field(repr=False)
    choices: int

    @property
    def note(self) -> str:
        """How the search went, for a plan's notes."""
        marks = [max(1, round(len(self.trace) * part)) for part in (1 / 6, 1 / 3, 2 / 3, 1)]
        curve = ", ".join(f"{self.trace[mark - 1][1]:.6g} after {mark}" for mark in dict.fromkeys(marks))
        return f"{len(self.trace)} episodes, {self.choices} choices; least KL when scored: {curve}"


def search(
    walk: Walk,
    features: np.ndarray,
    agents: Sequence[Agent],
    distances: Callable[[int, np.ndarray], np.ndarray],
    score: Callable[[Choice], float],
    episodes: int,
    rng: np.random.Generator,
    excess: float = 0.0,
) -> Found:
    """The best choice of some episodes of one or several agents, each of which sees what those before it decided.

    A layer's state: its row of `features` (layers, f), what is left (`Walk.room`), and the actions at the layer before.
    distances(layer, actions): how far each of the layer's options is from what the agents ask for. The first episode is
    the base. A share of the episodes is then random: each draws one action for all layers and moves it a little at each
    of them, which finds even allocations that independent draws would not. After that actors act with noise that falls,
    and learn half as many steps as there are layers. Reward: -ln(score) - excess · max(0, asked / budget - 1), in bytes
    of the file that was asked for.
    """
    layers, warm = len(walk.names), max(1, round(WARM_UP * episodes))
    best, trace, seen = (math.inf, walk.base), [], set()
    for episode in range(episodes):
        taken: list[int] = []
        asked: list[int] = []
        steps: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in agents]
        done = max(episode - warm, 0) / max(episodes - warm - 1, 1)
        noise = FIRST_NOISE * (LAST_NOISE / FIRST_NOISE) ** done
        common = [rng.random(agent.actions) for agent in agents]
        last = np.zeros(sum(agent.actions for agent in agents))
        for layer in range(layers):
            state = np.concatenate([features[layer], walk.room(taken), last])
            for agent, drawn, own in zip(agents, common, steps, strict=True):
                action = agent.explored(drawn, 0.1) if episode <= warm else agent.act(state, noise)
                own.append((state, action))
                state = np.concatenate([state, action])
            last = state[-len(last) :]
            far = distances(layer, last)
            asked.append(walk.nearest(taken, far, free=True))
            taken.append(walk.base[layer] if episode == 0 else walk.nearest(taken, far))
        rows = tuple(taken)
        value = score(rows)
        seen.add(rows)
        best = min(best, (value, rows))
        trace.append((value, best[0]))
        if episode == 0:
            continue
        reward = -math.log(min(max(value, 1e-12), 1e12))
        if excess:
            reward -= excess * max(0.0, walk.file_bytes(tuple(asked)) / walk.limits.bytes - 1.0)
        for agent, own in zip(agents, steps, strict=True):
            agent.remember([s for s, _ in own], [a for _, a in own], reward)
            if episode >= warm:
                agent.learn(max(1, layers // 2))
    return Found(best[1], best[0], tuple(trace), len(seen))
