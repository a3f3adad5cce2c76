"""Black-box searches: never worse than their start, seeded, traced, resumable, shareable, within budget throughout."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solvers import Problem, ProblemError, solve
from solvers.instances import curves, several
from solvers.search import Found, evolve, levels, nearby, spdy
from solvers.studies import nsga2, tpe

PROBLEM = curves(8, 12, 3)
WEIGHTS = np.random.default_rng(5).lognormal(0, 1.5, 8)
SEARCHES: list[tuple[Callable[..., Found], int]] = [(spdy, 60), (nearby, 60), (evolve, 60), (tpe, 12), (nsga2, 12)]
NAMED = pytest.mark.parametrize(("search", "n"), SEARCHES, ids=lambda v: getattr(v, "__name__", v))


def score(choice: np.ndarray) -> float:
    """What is truly lost: the profiled losses, each layer weighing something else."""
    return float(sum(w * a[j] for w, a, j in zip(WEIGHTS, PROBLEM.loss, choice, strict=True)))


@NAMED
def test_search_laws(search: Callable[..., Found], n: int) -> None:
    seen: list[np.ndarray] = []

    def watched(choice: np.ndarray) -> float:
        seen.append(choice)
        return score(choice)

    found = search(PROBLEM, watched, evaluations=n, seed=1)
    assert all(PROBLEM.feasible(c) for c in seen)
    assert len({c.tobytes() for c in seen}) == len(seen)  # no choice is scored twice
    assert seen[0].tolist() == solve(PROBLEM).choice.tolist()
    assert found.trace[0] == (1, score(seen[0]))
    assert [k for k, _ in found.trace] == list(range(1, len(found.trace) + 1))
    assert len(found.trace) <= n
    best = [s for _, s in found.trace]
    assert best == sorted(best, reverse=True)
    assert found.score == best[-1] == score(found.choice) == min(map(score, seen))
    assert found.solution.bound == -math.inf
    again = search(PROBLEM, score, evaluations=n, seed=1)
    assert again.trace == found.trace
    assert again.choice.tolist() == found.choice.tolist()
    order = [c.tobytes() for c in seen]
    seen.clear()
    search(PROBLEM, watched, evaluations=n, seed=2)
    assert [c.tobytes() for c in seen] != order


def test_spdy_and_evolution_find_most_of_what_weights_hide() -> None:
    start = score(solve(PROBLEM).choice)
    weighted = PROBLEM.with_loss([w * a for w, a in zip(WEIGHTS, PROBLEM.loss, strict=True)])
    best = solve(weighted).loss
    for search, part in ((spdy, 0.8), (evolve, 0.5)):
        found = search(PROBLEM, score, evaluations=400, seed=0)
        assert start - found.score >= part * (start - best)


def test_spdy_searches_even_below_ten_groups() -> None:
    """⌊0.1 G⌋ coordinates are none for G = 8; here they are one."""
    drawn = spdy(PROBLEM, score, evaluations=150, initial=2, patience=0, seed=0)
    found = spdy(PROBLEM, score, evaluations=150, initial=2, seed=0)
    assert found.evaluations > drawn.evaluations
    assert found.score < drawn.score


def test_nan_scores_are_the_worst() -> None:
    calls = []

    def broken(choice: np.ndarray) -> float:
        calls.append(1)
        return math.nan if len(calls) % 2 else score(choice)

    assert math.isfinite(evolve(PROBLEM, broken, evaluations=20, seed=0).score)
    calls.clear()
    assert math.isfinite(tpe(PROBLEM, broken, evaluations=6, seed=0).score)


def test_searches_take_several_resources() -> None:
    problem = several(6, 6, 2, 1)
    found = evolve(problem, problem.total_loss, evaluations=30, seed=0, solver="milp")
    assert problem.feasible(found.choice)
    assert len(levels(problem)) == 6


def test_evolution_starts_where_it_is_told() -> None:
    cheapest = np.array([int(c[:, 0].argmin()) for c in PROBLEM.cost])
    assert evolve(PROBLEM, score, evaluations=5, seed=0, first=cheapest).trace[0] == (1, score(cheapest))
    dearest = np.array([int(c[:, 0].argmax()) for c in PROBLEM.cost])
    with pytest.raises(ProblemError, match=r"the first choice is over: bytes: .* is over the budget"):
        evolve(PROBLEM, score, first=dearest)


def test_nothing_to_search() -> None:
    with pytest.raises(ProblemError, match="there is nothing to search: the cheapest choice needs"):
        spdy(PROBLEM.with_budget(0), score)
    for search, _ in SEARCHES:
        with pytest.raises(ProblemError, match="evaluations is 0; at least 1 is needed"):
            search(PROBLEM, score, evaluations=0)


def journal(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(path)))


@pytest.mark.parametrize("search", [tpe, nsga2])
def test_stopped_and_resumed_is_as_if_never_stopped(search: Callable[..., Found], tmp_path: Path) -> None:
    whole = search(PROBLEM, score, evaluations=9, seed=4)
    search(PROBLEM, score, evaluations=4, seed=4, storage=journal(tmp_path / "s"))
    resumed = search(PROBLEM, score, evaluations=9, seed=4, storage=journal(tmp_path / "s"))
    assert resumed.trace == whole.trace
    assert resumed.choice.tolist() == whole.choice.tolist()


def test_an_interrupted_trial_does_not_count(tmp_path: Path) -> None:
    calls = []

    def stops(choice: np.ndarray) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(choice)

    with pytest.raises(KeyboardInterrupt):
        tpe(PROBLEM, stops, evaluations=6, seed=4, storage=journal(tmp_path / "s"))
    resumed = tpe(PROBLEM, score, evaluations=6, seed=4, storage=journal(tmp_path / "s"))
    assert resumed.evaluations == 6
    assert resumed.score <= score(solve(PROBLEM).choice)


def test_a_study_of_another_problem_is_refused(tmp_path: Path) -> None:
    tpe(PROBLEM, score, evaluations=2, seed=0, storage=journal(tmp_path / "s"))
    with pytest.raises(ProblemError, match=r"study 'tpe' has problem '.*', this search has"):
        tpe(curves(8, 12, 4), score, evaluations=2, seed=0, storage=journal(tmp_path / "s"))
    with pytest.raises(ProblemError, match="study 'tpe' has search 'tpe 0', this search has 'tpe 1'"):
        tpe(PROBLEM, score, evaluations=2, seed=1, storage=journal(tmp_path / "s"))


def _worker(path: str) -> None:
    tpe(PROBLEM, score, evaluations=10, seed=0, storage=journal(Path(path)))


def test_processes_share_a_study(tmp_path: Path) -> None:
    tpe(PROBLEM, score, evaluations=1, seed=0, storage=journal(tmp_path / "s"))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(str(tmp_path / "s"),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = tpe(PROBLEM, score, evaluations=10, seed=0, storage=journal(tmp_path / "s"))
    assert found.evaluations == 10  # nothing was left to do
    assert PROBLEM.feasible(found.choice)


def solve_at(cost: float, coefficients: np.ndarray) -> float:
    """The least weighted loss of all choices of at most that cost."""
    weighted = PROBLEM.with_loss([c * a for c, a in zip(coefficients, PROBLEM.loss, strict=True)])
    return float(solve(weighted.with_budget(np.array([int(cost)]))).loss)


def test_nsga2_front_is_a_trade_off() -> None:
    found = nsga2(PROBLEM, score, evaluations=30, seed=0, population=8)
    costs, scores = [c for _, _, c, _ in found.front], [s for _, s, _, _ in found.front]
    assert costs == sorted(set(costs))
    assert scores == sorted(set(scores), reverse=True)
    for choice, worth, cost, coefficients in found.front:
        assert worth == score(choice)
        assert cost == PROBLEM.total_cost(choice)[0] <= PROBLEM.budget[0]
        weighted = sum(c * a[j] for c, a, j in zip(coefficients, PROBLEM.loss, choice, strict=True))
        assert weighted <= solve_at(cost, coefficients) * (1 + 1e-9)
    assert len(found.front) > 2
    # Budgets below the range are not drawn: an answer leaves no more unused than its cheapest step.
    half = PROBLEM.budget[0] / 2
    upper = nsga2(PROBLEM, score, evaluations=30, seed=0, population=8, lowest=half)
    assert min(costs) < 0.8 * half
    assert all(cost > 0.8 * half for _, _, cost, _ in upper.front)


def test_ties_and_single_options_end_the_search() -> None:
    only = Problem([[1.0], [2.0]], [[1], [1]], 2)
    assert evolve(only, lambda c: 0.0, evaluations=50).evaluations == 1
    assert spdy(only, lambda c: 0.0, evaluations=50, patience=10).evaluations == 1
