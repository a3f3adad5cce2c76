"""`auto`: what it measures, and what rounding may not decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from networks import small_profile

import autocompress as ac
from autocompress.measuring import Context
from autocompress.planning import energy_losses
from autocompress.profiling import Profile
from autocompress.strategies.auto import NOISE, Auto


class OneObjective(Auto):
    """Several names for one objective."""

    def objectives(self, profile: Profile, context: Context) -> dict[str, Mapping[str, np.ndarray]]:
        return dict.fromkeys(("first", "second", "third"), energy_losses(profile))


def test_a_plan_that_two_objectives_share_is_measured_once() -> None:
    model, data, found = small_profile()
    context = Context(model, data)
    plan = OneObjective()(found, ac.Budget.parse("4x"), context)
    assert [trial.label for trial in context.log if "searched" not in trial.label] == ["auto(first)"]
    assert plan.notes[1:3] == ("second: the plan of first", "third: the plan of first")
    assert plan.notes[0].startswith("first: KL ")


@pytest.mark.parametrize(("factor", "winner"), [(1.0 - 0.1 * NOISE, "kl^0"), (1.0 - 10 * NOISE, "kl^1")])
def test_rounding_does_not_decide_between_plans(monkeypatch: pytest.MonkeyPatch, factor: float, winner: str) -> None:
    model, data, found = small_profile()

    class TwoPlans(Auto):
        def objectives(self, profile: Profile, context: Context) -> dict[str, Mapping[str, np.ndarray]]:
            losses = energy_losses(profile)
            return {
                "kl^0": losses,
                "kl^1": {name: loss * (100.0 if name == "linear" else 1.0) for name, loss in losses.items()},
            }

        def _nearby(self, *args: Any) -> None:
            return None

    judged: list[tuple[float, float]] = []

    def judge(context: Context, small: Any, part: str = "held") -> tuple[float, float]:
        judged.append((1.0, 1.0) if len(judged) < 2 else (factor, factor))  # two parts of the data for each plan
        return judged[-1]

    monkeypatch.setattr(Context, "judge", judge)
    plan = TwoPlans()(found, ac.Budget.parse("6x"), Context(model, data))
    assert len(judged) == 4, "these objectives have two plans"
    assert plan.strategy == f"auto({winner})"
