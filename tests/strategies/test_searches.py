"""What strategies add to searches: scores, grants, one front for many budgets; and ALDS's objective."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import profiled, small_profile

import autocompress as ac
from autocompress.errors import MismatchError
from autocompress.planning import energy_losses, within
from autocompress.profiling import Profile
from autocompress.strategies import STRATEGIES
from autocompress.strategies.base import searchable, solved_plan
from autocompress.strategies.nsga2 import Nsga2, octave
from autocompress.strategies.searching import searched
from solvers import Problem, solve
from solvers.search import Found

SEARCHES = ["spdy", "evopress", "tpe", "nsga2"]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_keeps_to_its_grant_and_never_scores_worse_than_the_exact_answer(name: str) -> None:
    model, data, found = small_profile()
    context = ac.Context(model, data, effort="fast")
    budget = ac.Budget(ratio=6.0)
    profile = within(found, found.template.dense_bytes // 6)
    plan = STRATEGIES[name](profile, budget, context)
    assert 0 < context.evaluations <= context.granted
    exact = STRATEGIES["exact"](profile, budget, None)
    scored, best = context.score(profile, exact.layers), context.score(profile, plan.layers)
    assert best <= scored
    first, last = map(float, re.findall(r"the (?:first scored|best) ([\d.e-]+?)(?=,|$)", plan.notes[0]))
    assert (first, last) == (pytest.approx(scored, rel=1e-5), pytest.approx(best, rel=1e-5))
    assert plan.seed == 0
    assert ac.Plan.from_json(plan.to_json()) == plan


def test_where_no_scored_choice_fits_the_exact_answer_stays() -> None:
    model, data, found = small_profile()
    budget = ac.Budget(ratio=6.0)

    def hopeless(problem: Problem, score: Any, **options: Any) -> Found:
        largest = np.array([int(np.argmax(cost[:, 0])) for cost in problem.cost])
        solution = solve(problem.with_budget(np.array([10**9])), "uniform")
        return Found(largest, float("inf"), ((1, float("inf")),), solution)

    plan = searched(found, budget, ac.Context(model, data), "hopeless", hopeless, {})
    assert plan.layers == STRATEGIES["exact"](found, budget, None).layers


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_asks_for_a_context(name: str) -> None:
    with pytest.raises(MismatchError, match=f"strategy '{name}' scores compressed models: give a context"):
        ac.plan(small_profile()[2], "6x", name)


def test_one_front_serves_the_budgets_of_an_octave(tmp_path: Path) -> None:
    model, data, _ = small_profile()
    found = profiled(model, data, store=tmp_path)
    dense = found.template.dense_bytes
    assert octave(ac.Budget(ratio=5.0), found).size == octave(ac.Budget(ratio=7.9), found).size == dense // 4
    assert octave(ac.Budget(ratio=8.0), found).size == dense // 4 // 2
    assert octave(ac.Budget(size=dense // 4), found).size == dense // 4
    first, second = ac.Context(model, data, effort="fast"), ac.Context(model, data, effort="fast")
    six = Nsga2()(found, ac.Budget(ratio=6.0), first)
    five = Nsga2()(found, ac.Budget(ratio=5.0), second)
    assert first.evaluations > 4 >= second.evaluations > 0
    assert six.notes[1] == five.notes[1]
    # The answer is the same whichever budget came first.
    assert Nsga2()(profiled(model, data), ac.Budget(ratio=5.0), ac.Context(model, data, effort="fast")) == five


WEIGHTS = {"conv1": 30.0, "conv2": 1.0, "conv3": 0.03, "linear": 1.0}


class Weighted(ac.Context):
    """Scores are sums over layers that weigh otherwise than the profile thinks, so the best answer is known."""

    def score(self, profile: Profile, layers: Mapping[str, ac.Option], part: str = "held") -> float:
        self.evaluations += 1
        found = ((WEIGHTS[n], profile.layers[n], profile.layers[n].row(option)) for n, option in layers.items())
        return sum(weight * row.error / layer.energy for weight, layer, row in found)


def test_nsga2_improves_on_its_start_all_over_an_octave() -> None:
    """Five budgets of one run, for two seeds: most are better than the exact answer, by two fifths of what can be."""
    model, data, _ = small_profile()
    profile = profiled(model, data, ["surface"])
    losses = {n: w * energy_losses(profile)[n] for n, w in WEIGHTS.items()}
    gained = []
    for context in (Weighted(model, data), Weighted(model, data).seeded(1)):
        for budget in (ac.Budget(ratio=ratio) for ratio in (5.0, 5.7, 6.5, 7.2, 7.9)):
            plans = STRATEGIES["exact"](profile, budget, None), Nsga2()(profile, budget, context)
            before, after = (context.score(profile, plan.layers) for plan in plans)
            gained.append((before - after) / (before - solved_plan(profile, budget, losses, "best").predicted_loss))
    assert sum(part > 0.01 for part in gained) >= 7, gained
    assert np.mean(gained) > 0.4, gained


def largest(output: torch.Tensor, batch: Any) -> torch.Tensor:
    """An `embedding` of a task."""
    return 100.0 * output.amax(1, keepdim=True)


def test_a_front_of_other_outputs_is_another_front() -> None:
    model, data, found = small_profile()
    plain, judged = ac.Context(model, data, effort="fast"), ac.Context(model, data, effort="fast", embedding=largest)
    first = Nsga2().front(found, ac.Budget(ratio=6.0), plain)
    judged.kept = plain.kept  # as in a store
    second = Nsga2().front(found, ac.Budget(ratio=6.0), judged)
    assert judged.evaluations > 4
    assert [score for score, *_ in second] != [score for score, *_ in first]


def test_an_answer_whose_header_is_too_long_gives_way_by_as_little_as_it_can() -> None:
    found = small_profile()[2]
    sizes, tried = [], 0
    for size in range(360, 700, 20):
        asked = searchable(found, ac.Budget(size=size))
        for answer in map(np.array, itertools.product(*(range(len(rows)) for rows in asked.rows))):
            if not asked.problem.feasible(answer):
                continue
            raw = {n: r[i] for n, r, i in zip(found.layers, asked.rows, answer, strict=True)}
            rows = asked.choice(answer)
            if (excess := found.template.file_bytes(raw) - size) <= 0:
                assert rows == raw
                continue
            tried += 1
            sizes.append(found.template.file_bytes(rows))
            assert sizes[-1] <= size
            assert all(rows[n].bytes <= raw[n].bytes for n in rows)
            losses = energy_losses(found)

            def loss(choice: Mapping[str, Any], losses: Mapping[str, np.ndarray] = losses) -> float:
                return float(sum(losses[n][found.layers[n].rows.index(row)] for n, row in choice.items()))

            # Where one change of the least loss is enough, it is the one.
            single = [
                {**raw, n: row}
                for n, layer in found.layers.items()
                for row in layer.rows
                if raw[n].bytes - row.bytes >= excess
            ]
            if single and found.template.file_bytes(best := min(single, key=loss)) <= size:
                assert loss(rows) == pytest.approx(loss(best))
    assert tried > 20


def test_minimax_against_trying_all() -> None:
    found = small_profile()[2]
    losses = energy_losses(found)
    names = list(found.layers)
    choices = list(itertools.product(*(range(len(found.layers[n].rows)) for n in names)))
    for budget in (380, 450, 600, 900):
        plan = STRATEGIES["alds_minimax"](found, ac.Budget(size=budget), None)

        def figures(choice: tuple[int, ...]) -> tuple[float, float, int]:
            rows = [found.layers[n].rows[i] for n, i in zip(names, choice, strict=True)]
            mine = [float(losses[n][i]) for n, i in zip(names, choice, strict=True)]
            return max(mine), sum(mine), sum(row.bytes for row in rows)

        every = list(map(figures, choices))
        payload = plan.predicted_bytes - plan.fixed_bytes
        indices = {n: [r.option for r in found.layers[n].rows].index(o) for n, o in plan.layers.items()}
        mine = [float(losses[n][i]) for n, i in indices.items()]
        worst = min(most for most, _, size in every if size + plan.fixed_bytes <= budget)
        assert plan.predicted_loss == max(mine) == worst
        assert plan.bound == plan.predicted_loss
        assert plan.gap == 0.0
        assert sum(mine) == pytest.approx(min(s for most, s, size in every if most <= worst and size <= payload))
