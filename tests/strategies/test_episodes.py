"""Walks under exact limits, and the search for the best of them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from networks import convnet, images, profiled, small_profile

import autocompress as ac
from autocompress import measuring
from autocompress.errors import InfeasibleError
from autocompress.planning import Limits, allocate, energy_losses, limits_of, running_cost
from autocompress.profiling import Profile
from autocompress.strategies.ddpg import Agent
from autocompress.strategies.episodes import EPISODES, Found, Scores, Walk, episodes_of, geometry, search, undominated
from autocompress.types import Budget


@functools.cache
def rich() -> Profile:
    """Many options for each layer, so that a search has something to find."""
    return profiled(convnet(), images(), ["mixed", "surface"])


class Blind(Agent):
    """Draws its actions and never learns: what a search has to beat."""

    def act(self, state: np.ndarray, noise: float = 0.0) -> np.ndarray:
        return self.rng.random(self.actions)

    def learn(self, updates: int) -> None:
        pass


def sizes_and_zeros(walk: Walk) -> list[np.ndarray]:
    """Every option by the share of zeros and the bits of a weight that is none, over 8."""
    return [
        np.array([(1 - rows[i].nonzero / size, min(rows[i].bytes / max(rows[i].nonzero, 1), 1.0)) for i in some])
        for some, rows, size in zip(walk.options, walk.rows, walk.sizes, strict=True)
    ]


def searched(kind: type[Agent], budget: str, seed: int, episodes: int = 120) -> tuple[Walk, Found, list[Any]]:
    profile = rich()
    limits = limits_of(Budget.parse(budget), profile)
    walk = Walk(profile, limits, undominated(profile, limits))
    points, losses = sizes_and_zeros(walk), list(energy_losses(profile).values())
    seen: list[Any] = []

    def score(rows: tuple[int, ...]) -> float:
        seen.append(rows)
        return float(sum(loss[i] for loss, i in zip(losses, rows, strict=True)))

    features = geometry(profile)
    rng = np.random.default_rng(seed)
    agents = [kind(features.shape[1] + 4, 2, rng)]
    found = search(
        walk, features, agents, lambda n, a: ((points[n] - a) ** 2).sum(axis=1), score, episodes, rng, excess=3.0
    )
    return walk, found, seen


def test_what_is_learnt_beats_what_is_drawn() -> None:
    """The score is a sum over layers, so the exact answer is known, and nothing is below it."""
    found = {kind: [searched(kind, "4.5x", seed, 100)[1].score for seed in range(3)] for kind in (Agent, Blind)}
    exact = allocate(rich(), limits_of(Budget.parse("4.5x"), rich()), energy_losses(rich())).loss
    assert exact <= min(min(scores) for scores in found.values()) * (1 + 1e-9)
    assert np.mean(found[Agent]) < np.mean(found[Blind]) / 3, (found, exact)


@pytest.mark.parametrize("budget", ["4x", "8x", "5x,bops=9%"])
def test_every_episode_is_within_the_limits_to_the_byte(budget: str) -> None:
    walk, found, seen = searched(Agent, budget, 0, 40)
    assert len(seen) == len(found.trace) == 40
    assert found.choices == len(set(seen)) > 10
    assert seen[0] == walk.base
    limits = limits_of(Budget.parse(budget), rich())
    for rows in seen:
        choice = walk.choice(rows)
        assert walk.profile.template.file_bytes(choice) <= limits.bytes
        for name, limit in limits.running.items():
            assert running_cost(walk.profile, name, {n: row.option for n, row in choice.items()}) <= limit
    best = [b for _, b in found.trace]
    assert best == sorted(best, reverse=True)
    assert found.score == best[-1] == min(s for s, _ in found.trace)


def test_the_same_seed_walks_the_same_way() -> None:
    once, twice, other = (searched(Agent, "6x", seed, 30)[2] for seed in (0, 0, 1))
    assert once == twice
    assert once != other


def test_a_layer_takes_the_nearest_row_that_leaves_the_others_their_cheapest() -> None:
    profile = rich()
    some = undominated(profile, Limits(10**9))
    smallest = [min(profile.layers[n].rows, key=lambda r: r.bytes) for n in profile.layers]
    least = profile.template.file_bytes(dict(zip(profile.layers, smallest, strict=True)))
    walk = Walk(profile, Limits(least + 40), some)
    assert sum(profile.layers[n].rows[i].bytes for n, i in zip(walk.names, walk.base, strict=True)) == sum(
        row.bytes for row in smallest
    )
    wide = np.array([-float(walk.rows[0][i].bytes) for i in walk.options[0]])  # the longest first
    taken = walk.nearest([], wide)
    assert walk.nearest([], wide, free=True) == walk.options[0][int(wide.argmin())]
    longer = [i for i in walk.options[0] if walk.rows[0][i].bytes > walk.rows[0][taken].bytes]
    assert walk.fits((taken, *walk.base[1:]))
    assert longer
    assert not any(walk.fits((i, *walk.base[1:])) for i in longer)
    with pytest.raises(InfeasibleError):
        Walk(profile, Limits(least - 40), some)


def test_options_that_others_beat_in_everything_are_left_out() -> None:
    profile = rich()
    free, limited = (undominated(profile, limits) for limits in (Limits(10**9), Limits(10**9, {"bops": 1e9})))
    for layer, few, more in zip(profile.layers.values(), free, limited, strict=True):
        facts = [(row.bytes, row.error) for row in layer.rows]
        for i, own in enumerate(facts):
            beaten = any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in facts)
            assert (i in few) == (not beaten and facts.index(own) == i)
        assert set(few) <= {*more} | {i for i in few if facts.count(facts[i]) > 1}
        assert len(more) >= len(few)
    mixed = undominated(profile, Limits(10**9), lambda row: row.option.mix is not None)
    assert all(x.rows[i].option.mix for x, some in zip(profile.layers.values(), mixed, strict=True) for i in some)


def test_features_are_in_the_unit_cube_and_know_the_layers() -> None:
    table = geometry(rich(), ac.Context(convnet(), images()))
    assert table.shape == (4, 9)
    assert (table.min(), table.max()) == (0.0, 1.0)
    assert list(np.argsort(table[:, 0])) == [0, 1, 2, 3]
    assert len({tuple(row) for row in table}) == 4


def test_scores_are_kept_in_the_store_and_not_measured_again(tmp_path: Any) -> None:
    model, data, _ = small_profile()
    profile = profiled(model, data, store=tmp_path)
    limits = limits_of(Budget.parse("5x"), profile)
    walk = Walk(profile, limits, undominated(profile, limits))
    first = Scores(walk, ac.Context(model, data), "a search")
    kl = first(walk.base)
    assert (
        first(walk.base)
        == kl
        == ac.Context(model, data).score(profile, {n: row.option for n, row in walk.choice(walk.base).items()})
    )
    assert first.measured == 1
    again = Scores(walk, ac.Context(model, data), "a search")
    assert (again(walk.base), again.measured) == (kl, 0)
    for other in (
        Scores(walk, ac.Context(model, data), "another"),
        Scores(walk, ac.Context(model, data, seed=1), "a search"),
        Scores(walk, ac.Context(model, data, embedding=scores_of), "a search"),
    ):
        assert other.known == {}
    assert profile.store is not None
    with profile.store.writing():  # somebody else's turn: the score is there all the same
        rows = (*walk.base[:-1], next(i for i in walk.options[-1] if i != walk.base[-1]))
        assert again(rows) > 0.0
    assert rows not in Scores(walk, ac.Context(model, data), "a search").known


def scores_of(output: torch.Tensor, batch: Any) -> torch.Tensor:
    """An `embedding` of a task."""
    return output


def _nothing_to_make(model: Any, profile: Any, layers: Any) -> dict[str, Any]:
    assert not layers
    return {}


def test_weights_that_are_made_at_once_are_those_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = convnet(), images()
    profile = profiled(model, data, ["mixed", "rd(0.5,0.3)s60", "fp16"])
    choices = [{name: layer.rows[i].option for name, layer in profile.layers.items()} for i in (1, 7, 40, -1)]
    plain = [ac.Context(model, data).build(profile, layers).state_dict() for layers in choices]
    once, full = ac.Context(model, data), ac.Context(model, data)
    every = {name: [row.option for row in layer.rows] for name, layer in profile.layers.items()}
    monkeypatch.setattr(measuring, "CACHE_BYTES", 1000)
    full.prepare(profile, every)
    assert not full._weights
    monkeypatch.undo()
    once.prepare(profile, every)
    # Nothing is left to make.
    monkeypatch.setattr(measuring, "realised_layers", _nothing_to_make)
    for layers, wanted in zip(choices, plain, strict=True):
        found = once.build(profile, layers).state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_efforts_grant_episodes_by_the_layer() -> None:
    assert [episodes_of(effort, 20) for effort in ("fast", "normal", "max")] == [60, 300, 1000]
    assert list(EPISODES) == list(measuring.EVALUATIONS)
    assert episodes_of("normal", 2) == 30
    assert episodes_of("normal", 200) == 300
