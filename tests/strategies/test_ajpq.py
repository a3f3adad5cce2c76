"""The two learning strategies: what they ask for, and that a search that was killed comes to the same end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import convnet, images, profiled, small_profile

import autocompress as ac
from autocompress.errors import MismatchError
from autocompress.strategies import STRATEGIES
from autocompress.strategies.ajpq import Ajpq, _point
from autocompress.strategies.galen import LEVELS, Galen, _width
from autocompress.types import Budget, Option

BOTH = [Ajpq(episodes=25), Galen(episodes=25)]
NAMES = ["ajpq", "galen"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("strategy", BOTH, ids=NAMES)
def test_a_search_that_was_killed_ends_in_the_same_plan(strategy: Any, tmp_path: Path) -> None:
    model, data = convnet(), images()
    wanted = strategy(profiled(model, data, ["mixed", "w4"]), Budget.parse("6x"), ac.Context(model, data))
    profile = profiled(model, data, ["mixed", "w4"], store=tmp_path)
    left = [7]

    class Mortal(ac.Context):
        scored = 0

        def score(self, *arguments: Any) -> float:
            if not left[0]:
                raise Killed
            left[0] -= 1
            self.scored += 1
            return super().score(*arguments)

    with pytest.raises(Killed):
        strategy(profile, Budget.parse("6x"), Mortal(model, data))
    left[0] = 10**6
    second = Mortal(model, data)
    assert strategy(profile, Budget.parse("6x"), second) == wanted
    assert f"{7 + second.scored} choices" in wanted.notes[0]
    third = Mortal(model, data)
    assert strategy(profile, Budget.parse("6x"), third) == wanted
    assert third.scored == 0


@pytest.mark.parametrize("strategy", BOTH, ids=NAMES)
def test_the_seed_is_the_contexts(strategy: Any) -> None:
    model, data = convnet(), images()
    profile = profiled(model, data, ["mixed"])
    notes = {strategy(profile, Budget.parse("6x"), ac.Context(model, data, seed=0)).notes for _ in range(2)}
    assert len(notes) == 1
    other = profiled(model, data, ["mixed"], seed=1)
    assert strategy(other, Budget.parse("6x"), ac.Context(model, data, seed=1)).notes not in notes


def test_ajpq_takes_mixed_rows_where_there_are_any() -> None:
    model, data = convnet(), images()
    profile = profiled(model, data, ["mixed", "rd(0.5,0.3)", "w4"])
    plan = Ajpq(episodes=12)(profile, Budget.parse("6x"), ac.Context(model, data))
    assert all(option.mix is not None for option in plan.layers.values())
    assert plan.strategy == "ajpq"
    assert plan.bound <= plan.predicted_loss
    plan = Ajpq(episodes=12)(small_profile()[2], Budget.parse("6x"), ac.Context(*small_profile()[:2]))
    assert all(option.mix is None for option in plan.layers.values())


def test_points_are_what_the_controllers_speak_of() -> None:
    model, data = convnet(), images()
    profile = profiled(model, data, ["mixed", "w4", "fp16"])
    layer = profile.layers["conv1"]

    def row(name: str) -> Any:
        return layer.row(Option.parse(name))

    np.testing.assert_allclose(_point(row("mix25/0/75/0/0"), 216), [0.25, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(_point(row("mix0/25/75/0/0"), 216), [0.0, 0.25, 1.0, 1.0])
    np.testing.assert_allclose(_point(row("mix50/0/0/0/50"), 216), [0.5, 0.0, 0.0, 0.0])
    assert _width(row("mix50/0/25/25/0")) == 5.0
    assert _width(row("w4")) == 4.0
    assert _width(row("fp16")) == 8.0
    plain = row("w4")
    found = _point(plain, layer.layer.size)
    assert found[0] == 1 - plain.nonzero / layer.layer.size
    # The mean width of its split is what the payload spends on a weight that is not zero.
    widths = np.array([2, 4, 6, 8]) @ np.diff([0.0, *found[1:], 1.0])
    assert widths == pytest.approx(min(8 * plain.bytes / plain.nonzero, 8.0))


def test_galen_sees_ten_points_of_every_layers_curve() -> None:
    model, data, profile = small_profile()
    table = Galen().curves(profile, ac.Context(model, data))
    assert table.shape == (4, len(LEVELS)) == (4, 10)
    assert (table.min(), table.max()) == (0.0, 1.0)
    assert (np.diff(table, axis=1).sum(axis=1) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_they_need_a_context(name: str) -> None:
    with pytest.raises(MismatchError, match=f"strategy '{name}' measures the model: give a context"):
        ac.plan(small_profile()[2], "5x", name)
    assert STRATEGIES[name].needs == "evaluations"  # type: ignore[attr-defined]
