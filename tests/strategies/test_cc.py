"""CC: the fit, the allocation, and choices of channels and singular values against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from networks import grid_profile, small_profile

import autocompress as ac
from autocompress.errors import InfeasibleError, MismatchError
from autocompress.narrowing import WHOLE
from autocompress.strategies.cc import Curve, _curve, _table, _values, allocated, cc, chosen_rows, fitted
from autocompress.types import Budget, Option


def context() -> ac.Context:
    model, data, _ = small_profile()
    return ac.Context(model, data, effort="fast")


def test_an_exponential_is_fitted_exactly_and_noise_where_losses_are_large() -> None:
    gone = np.linspace(0.0, 0.9, 10)
    found = fitted(gone, 3.0 * np.exp(4.0 * gone))
    assert found is not None
    # Divided by the largest loss.
    assert (found.p1, found.p2) == pytest.approx((math.exp(-3.6), 4.0))
    bent = 3.0 * np.exp(4.0 * gone)
    bent[0] *= 0.01
    near = fitted(gone, bent)
    assert near is not None
    plain = np.polyfit(gone, np.log(bent / bent.max()), 1)
    assert abs(near.p2 - 4.0) < abs(float(plain[0]) - 4.0)
    assert fitted(gone, np.zeros(10)) is None
    assert fitted(gone, np.exp(-gone)) is None
    assert fitted(np.zeros(3), np.ones(3)) is None


def test_all_layers_between_their_ends_have_one_slope() -> None:
    curves = {"a": Curve(0.1, 3.0), "b": Curve(0.02, 5.0), "c": Curve(0.5, 1.0), "d": Curve(1e-9, 4.0)}
    parts = allocated(curves, math.log(0.6))
    slopes = {n: x.p1 * x.p2 * math.exp(x.p2 * parts[n]) for n, x in curves.items()}
    assert parts["d"] == 0.95
    assert slopes["d"] < 0.6
    for name in "abc":
        assert 0.0 < parts[name] < 0.95
        assert slopes[name] == pytest.approx(0.6)
    assert allocated(curves, -50.0) == dict.fromkeys("abcd", 0.0)


def test_levels_of_groups_are_the_best_of_all_and_rows_fit_together() -> None:
    """Brute force over the levels of both groups, for parts that are drawn for every layer."""
    found = grid_profile()[2]
    losses = cc._losses(found, context())
    tables = {name: _table(found, name, Option.parse("w4"), losses[name]) for name in found.layers}
    assert {r.row.option.rank is not None for table in tables.values() for r in table} == {False, True}
    kinds, generator = set(), np.random.default_rng(0)
    for _ in range(12):
        parts = {name: float(generator.uniform(-0.5, 0.95)) for name in found.layers}
        rows = chosen_rows(found, tables, parts)
        assert list(rows) == list(found.layers)
        assert found.widths is not None
        mine = found.widths.structure_of({n: r.option for n, r in rows.items()})  # raises where layers disagree
        kinds |= {"rank" for r in rows.values() if r.option.rank} | {"width" for r in rows.values() if r.option.width}

        def score(structure: dict[str, float], parts: dict[str, float] = parts) -> tuple[float, float]:
            missing, loss = 0.0, 0.0
            for name, table in tables.items():
                fit = [
                    (max(parts[name] - r.gone, 0.0), r.loss)
                    for r in table
                    if structure.get(r.link[0], WHOLE) == r.link[1] and structure.get(r.link[2], WHOLE) == r.link[3]
                ]
                least = min(fit)
                missing += least[0] * found.layers[name].layer.size * found.positions(name)
                loss += least[1]
            return missing, loss

        every = itertools.product(*found.levels().values())
        best = min(score(dict(zip(found.levels(), levels, strict=True))) for levels in every)
        got = score({name: mine.get(name, WHOLE) for name in found.levels()})
        assert got == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert kinds == {"rank", "width"}


def test_losses_are_squared_gradients_times_changes() -> None:
    found = grid_profile()[2]
    losses = cc._losses(found, context())
    layer = found.layers["conv3"]
    assert len(losses["conv3"]) == len(layer.rows) + len(layer.narrowed)
    by_option = dict(zip([r.option for r in (*layer.rows, *layer.narrowed)], losses["conv3"], strict=True))
    assert by_option[Option()] == 0.0
    # Outputs that go change nothing here; inputs that go do.
    assert by_option[Option.parse("n100/50w4")] < by_option[Option.parse("w4")]
    assert by_option[Option.parse("n25/100w4")] > by_option[Option.parse("n75/100w4")] > by_option[Option.parse("w4")]
    table = _table(found, "conv3", Option.parse("w4"), losses["conv3"])
    curve = _curve(table)
    assert curve is not None
    assert curve.p2 > 0.0
    assert {r.gone for r in table if r.row.option == Option.parse("n50/100w4")} == {0.5}


def test_losses_of_another_seed_are_not_taken_for_its_own() -> None:
    found, first = grid_profile()[2], context()
    second = first.seeded(1)
    second.kept = first.kept  # as two seeds share a store
    losses = [cc._losses(found, each) for each in (first, second)]
    assert losses[0] != losses[1]
    assert losses == [cc._losses(found, context().seeded(seed)) for seed in (0, 1)]


def test_the_smallest_plan_has_lost_something_and_profiles_without_such_options_are_refused() -> None:
    found = grid_profile()[2]
    assert _values(found) == [Option.parse("fp16"), Option.parse("w4"), Option.parse("w2")]
    with pytest.raises(InfeasibleError, match="no choice of strategy 'cc'") as caught:
        cc(found, Budget(size=100), context())
    plan = cc(found, Budget(size=caught.value.smallest_bytes), context())
    assert plan.strategy == "cc(w2)"
    assert plan.predicted_bytes == caught.value.smallest_bytes
    assert any(o.rank or o.width for o in plan.layers.values())
    with pytest.raises(MismatchError, match="strategy 'cc' removes channels and singular values"):
        cc(small_profile()[2], Budget(size=400), context())
    with pytest.raises(MismatchError, match="strategy 'cc' needs gradients of the model: give a context"):
        cc(found, Budget(size=400), None)
