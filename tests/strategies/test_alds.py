"""Rules that set ranks: bounds on the error of a cut, ALDS against every choice there is, baselines by their rule."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from networks import batches, profiled, seeded, small_profile
from torch import nn

import autocompress as ac
from autocompress.compressors import Measured, realise
from autocompress.errors import InfeasibleError, MismatchError, OptionError
from autocompress.planning import within_limits
from autocompress.profiling import Profile
from autocompress.strategies.alds import BOUNDS, Alds, least_worst, local_groups, relative_error
from autocompress.strategies.alds import _Rung as Rung
from autocompress.strategies.ranks import lrank, pca, rank_families, svd, svd_energy
from autocompress.types import Option

RULES = (Alds(), Alds("paper"), Alds("norm"), svd, svd_energy, pca, lrank)


class Stack(nn.Module):
    """Three layers without norms or biases, of different shapes and spectra."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, bias=False)
        self.b = nn.Conv2d(8, 12, 3, bias=False)
        self.c = nn.Linear(12, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


@functools.cache
def stack() -> tuple[nn.Module, list[torch.Tensor], Profile]:
    model, data = seeded(Stack), batches(4, 7, 7)
    names = [f"{s}p" for s in ("rank1", "rank2", "rank3", "rank4", "rank5", "k2r1", "k2r2", "k2r3", "k4r1", "k4r2")]
    return model, data, profiled(model, data, [*names, "rank1pfp16", "rank3pfp16", "k2r2pfp16"])


@functools.cache
def context() -> ac.Context:
    return ac.Context(stack()[0], stack()[1], effort="fast")


def matrix(name: str) -> np.ndarray:
    model, _, found = stack()
    layer = found.layers[name].layer
    return np.asarray(layer.matrix(model.get_parameter(layer.key))[0])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_bounds_hold_and_the_norm_is_that_of_what_is_lost(groups: int) -> None:
    model, _, found = stack()
    for name in ("a", "b"):
        weight = matrix(name)
        problem = found.problem(name, model.get_parameter(f"{name}.weight"))
        for rank in (1, 2):
            option = Option(rank=rank, groups=groups if groups > 1 else None, plain=True)
            lost = weight - realise(problem, option).weight().reshape(weight.shape)
            exact = np.linalg.norm(lost, 2) / np.linalg.norm(weight, 2)
            code, paper, norm = (relative_error(weight, groups, rank, bound) for bound in BOUNDS)
            assert norm == pytest.approx(exact, rel=1e-5)
            assert code <= norm * (1 + 1e-9) <= paper * (1 + 1e-9) ** 2
            assert paper == pytest.approx(groups**0.5 * code)
            assert (code == pytest.approx(norm)) == (groups == 1)


def test_without_the_root_many_groups_look_better_than_a_rank_that_loses_nothing() -> None:
    """Rank 20, 64 x 576, at 40% of the weights: the bound of the code prefers 16 groups to nearly lossless one."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 20)) @ rng.standard_normal((20, 576))
    weight += 0.02 * np.linalg.norm(weight, 2) / 32 * rng.standard_normal(weight.shape)
    rank = {k: int(0.4 * weight.size / (k * 64 + 576)) for k in (1, 16)}
    code, _, norm = ({k: relative_error(weight, k, rank[k], bound) for k in rank} for bound in BOUNDS)
    assert norm[1] < 0.05 < 0.3 < norm[16]
    assert code[16] < 0.6 * norm[16]
    assert code[1] == pytest.approx(norm[1])


def test_zeros_are_cut_without_error() -> None:
    assert [relative_error(np.zeros((4, 6)), 2, 1, bound) for bound in BOUNDS] == [0.0, 0.0, 0.0]
    assert relative_error(np.eye(4, 6), 2, 3, "norm") == 0.0
    with pytest.raises(OptionError, match="there is no bound 'tight'; there are code, paper, norm"):
        Alds("tight")


def rung(size: int, error: float) -> Rung:
    return Rung(Measured(Option(rank=1), 0.0, size, "raw", "none,none", 0.0, 32, 1), error)


@pytest.mark.parametrize("seed", range(40))
def test_the_ranks_for_fixed_groups_are_those_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rungs = {
        str(i): [rung(int(s), float(e)) for s, e in zip(
            np.sort(rng.integers(1, 60, n)), np.sort(rng.choice(12, n))[::-1] / 12, strict=True)]
        for i, n in enumerate(rng.integers(1, 6, 4))
    }  # fmt: skip
    every = [dict(zip(rungs, pick, strict=True)) for pick in itertools.product(*rungs.values())]
    for room in (5, 40, 80, 120, 1000):
        fitting = [pick for pick in every if sum(r.row.bytes for r in pick.values()) <= room]
        found = least_worst(rungs, lambda rows, room=room: sum(r.bytes for r in rows.values()) <= room)  # type: ignore[misc]
        assert (found is None) == (not fitting)
        if found is not None:
            assert sum(r.row.bytes for r in found.values()) <= room
            best = min(max(r.error for r in pick.values()) for pick in fitting)
            assert max(r.error for r in found.values()) == best


def test_the_groups_of_a_layer_are_the_best_for_its_size() -> None:
    own = {1: [rung(10, 0.5), rung(20, 0.3)], 2: [rung(12, 0.4), rung(25, 0.1)], 4: [rung(30, 0.0)]}
    assert [local_groups(own, size, 1) for size in (10, 12, 20, 25, 30)] == [1, 2, 1, 2, 4]
    assert local_groups({1: [rung(5, 0.2)], 2: [rung(5, 0.2)]}, 9, 2) == 2


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("budget", ["1.2x", "1.5x", "2x"])
def test_alds_is_near_every_choice_of_ranks_and_groups(bound: str, budget: str) -> None:
    """With one run of channels exactly the best of all; with more, as good as the best within each fixed number."""
    found, measuring = stack()[2], context()
    floats = {
        n: dataclasses.replace(x, rows=tuple(r for r in x.rows if not r.option.half)) for n, x in found.layers.items()
    }
    for groups in ((1,), (1, 2, 4)):
        rows = {
            n: tuple(r for r in x.rows if r.option.rank is None or (r.option.groups or 1) in groups)
            for n, x in floats.items()
        }
        part = dataclasses.replace(
            found, layers={n: dataclasses.replace(x, rows=rows[n]) for n, x in found.layers.items()}
        )
        plan = Alds(bound)(part, ac.Budget.of(budget), measuring)
        limit = plan.budget_bytes

        def error(name: str, row: Measured) -> float:
            option = row.option
            return 0.0 if option.rank is None else relative_error(matrix(name), option.groups or 1, option.rank, bound)

        errors = {n: {row.option: error(n, row) for row in each} for n, each in rows.items()}
        worst = max(errors[n][o] for n, o in plan.layers.items())
        best = np.inf
        for pick in itertools.product(*rows.values()):
            same = {row.option.groups or 1 for row in pick if row.option.rank is not None}
            largest = max(errors[n][row.option] for n, row in zip(rows, pick, strict=True))
            if len(same) <= 1 and largest < best and within_limits(part, limit, dict(zip(rows, pick, strict=True))):
                best = largest
        assert worst == best if groups == (1,) else worst <= best
        assert plan.strategy == f"{Alds(bound).name}(rank1p)"


@pytest.mark.parametrize("rule", [svd, svd_energy, pca, lrank], ids=lambda rule: rule.name)
def test_a_rule_takes_the_ranks_of_its_largest_parameter_that_fits(rule: Any) -> None:
    found, measuring = stack()[2], context()
    plan = rule(found, ac.Budget.of("1.5x"), measuring)
    value = Option.parse(plan.strategy.partition("(")[2][:-1])
    ladders = next(f for f in rank_families(found, "test") if f.value == value).ladders
    at = rule.ranks(found, measuring)

    def rows(t: float) -> dict[str, Measured]:
        return {n: ladder.at_least(at(t)[n]) for n, ladder in ladders.items()}

    steps = np.linspace(0.0, 1.0, 2001)
    fitting = [t for t in steps if within_limits(found, plan.budget_bytes, rows(t))]
    assert plan.layers == {n: row.option for n, row in rows(max(fitting)).items()}
    ranks = [[at(t)[n] for n in ladders] for t in steps]
    assert all(a <= b for low, high in itertools.pairwise(ranks) for a, b in zip(low, high, strict=True))
    assert all(row.option.rank is None for row in rows(1.0).values())


def test_rules_by_hand() -> None:
    found, measuring = stack()[2], context()
    values = {n: np.linalg.svd(matrix(n), compute_uv=False) for n in ("a", "b", "c")}
    assert svd.ranks(found, measuring)(0.5) == {"a": 4, "b": 6, "c": 5}
    for name, rank in svd_energy.ranks(found, measuring)(0.7).items():
        s = values[name] ** 2
        assert s[:rank].sum() >= 0.7 * s.sum() > s[: rank - 1].sum()
    # L-Rank and PCA at a level are ranks of one multiplier for all layers: one exists that explains them.
    positions = {n: found.positions(n) for n in values}
    ranks = lrank.ranks(found, measuring)(0.55)
    assert len(set(ranks.values())) > 1
    low, high = 0.0, np.inf
    for n, r in ranks.items():
        macs = sum(matrix(n).shape) * positions[n]
        if r * sum(matrix(n).shape) < matrix(n).size:
            high = min(high, values[n][r - 1] ** 2 / macs) if r > 1 else high
            low = max(low, values[n][r] ** 2 / macs if (r + 1) * sum(matrix(n).shape) < matrix(n).size else 0.0)
    assert low <= high
    hessians = {n: found.statistics.layers[n].hessian for n in values}
    ranks = pca.ranks(found, measuring)(0.5)
    ratios = {
        n: np.sort(np.linalg.eigvalsh(matrix(n) @ hessians[n][0] @ matrix(n).T))[::-1]
        / (sum(matrix(n).shape) * positions[n])
        for n in values
    }
    last, following = ([ratios[n][r - 1 + i] for n, r in ranks.items() if 1 < r < len(ratios[n])] for i in (0, 1))
    assert last
    assert min(last) > max(following)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_a_rule_needs_is_said(rule: Any) -> None:
    found = stack()[2]
    with pytest.raises(MismatchError, match="looks at the weights: give a context"):
        rule(found, ac.Budget.of("2x"), None)
    model, data, plain = small_profile()
    with pytest.raises(MismatchError, match=r"no low-rank options.*profile with --options default,lowrank"):
        rule(plain, ac.Budget.of("2x"), ac.Context(model, data))
    with pytest.raises(InfeasibleError, match="no choice of strategy"):
        rule(found, ac.Budget.of(200), context())
    plan = ac.plan(found, "2x", rule, context())
    assert plan.predicted_bytes <= plan.budget_bytes
    assert rule(found, ac.Budget.of("2x, macs=40%"), context()).predicted_bytes <= plan.budget_bytes
