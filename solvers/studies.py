"""Searches kept in an Optuna storage: stopped, resumed, and shared by several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from solvers.problem import FloatArray, IntArray, Problem, ProblemError
from solvers.registry import Solver
from solvers.search import Found, Score, finish, reweighted, start

# Coefficients are searched on a logarithmic scale, an order of magnitude either way.
DECADES = 1.0
# Budgets at which the trade-off begins with the plain losses: what is bred from weights drawn at random alone seldom
# becomes better than these in a few hundred evaluations.
STARTS = 5


def tpe(
    problem: Problem,
    score: Score,
    *,
    evaluations: int = 200,
    seed: int = 0,
    storage: Any = None,
    study: str = "tpe",
    solver: str | Solver = "exact",
) -> Found:
    """SPDY's coefficients proposed by Optuna's tree-structured Parzen estimator; minimises the score.

    `storage`: any Optuna storage or its URL; None keeps the study in memory. `evaluations` counts all finished trials
    of the study, whoever made them, so a search that was stopped goes on, and processes that share a study share the
    work. A search stopped between trials and resumed makes the same trials as one that was not stopped. Raises
    ProblemError where the study belongs to another problem or seed.
    """
    import optuna

    def sampler(number: int) -> Any:
        return optuna.samplers.TPESampler(seed=_seed(seed, number), n_startup_trials=20)

    def propose(trial: Any) -> IntArray:
        return reweighted(problem, _coefficients(trial, problem.groups), solver)

    def value(choice: IntArray) -> tuple[float, ...]:
        return (_number(score(choice)),)

    with _quiet():
        made = _open(problem, study, storage, ["minimize"], f"tpe {seed}", sampler(0))
        done = _run(made, sampler, propose, value, evaluations, [_ones(problem.groups)])
    best, trace = None, list[tuple[int, float]]()
    for trial in done:
        if best is None or trial.value < best[0]:
            best = trial.value, np.array(trial.user_attrs["choice"], np.int64)
        trace.append((len(trace) + 1, best[0]))
    assert best is not None
    return finish(problem, best[1], best[0], trace, "tpe")


def nsga2(
    problem: Problem,
    score: Score,
    *,
    evaluations: int = 400,
    seed: int = 0,
    storage: Any = None,
    study: str = "nsga2",
    population: int = 40,
    lowest: float = -math.inf,
    solver: str | Solver = "exact",
) -> Found:
    """The trade-off of score against cost by Optuna's NSGA-II: coefficients, and a part of the budget, are the genes.

    Budgets on the first resource are drawn between `lowest`, or the least there is, and the problem's own. The
    trade-off is under `front`, with the cost of the first resource; the choice is its best score. Storage, resuming and
    sharing are as for `tpe`.
    """
    import optuna

    most = min(problem.budget[0], _most(problem))
    least = min(max(problem.smallest()[0], lowest), most)

    def sampler(number: int) -> Any:
        return optuna.samplers.NSGAIISampler(population_size=population, seed=_seed(seed, number))

    def propose(trial: Any) -> IntArray:
        part = trial.suggest_float("part", 0.0, 1.0)
        budget = problem.budget.copy()
        budget[0] = least + np.floor(part * (most - least)) if problem.integer else least + part * (most - least)
        if not problem.integer and part == 1.0:
            budget[0] = most
        coefficients = _coefficients(trial, problem.groups)
        try:
            return reweighted(problem.with_budget(budget), coefficients, solver)
        except ProblemError:  # with so little of the first resource, the others' limits cannot be kept
            return reweighted(problem, coefficients, solver)

    def value(choice: IntArray) -> tuple[float, ...]:
        return _number(score(choice)), float(problem.total_cost(choice)[0])

    start(problem, solver)
    first = [{**_ones(problem.groups), "part": float(part)} for part in np.linspace(1.0, 0.0, STARTS)]
    kind = f"nsga2 {seed} {population}" + (f" from {lowest}" if math.isfinite(lowest) else "")
    with _quiet():
        made = _open(problem, study, storage, ["minimize", "minimize"], kind, sampler(0))
        done = _run(made, sampler, propose, value, evaluations, first)
    scored = [(t.values[0], t.values[1], t.number, np.array(t.user_attrs["choice"], np.int64)) for t in done]
    coefficients = {t.number: 10.0 ** np.array([t.params[f"c{g}"] for g in range(problem.groups)]) for t in done}
    trace, least_score = list[tuple[int, float]](), math.inf
    for entry in scored:
        least_score = min(least_score, entry[0])
        trace.append((len(trace) + 1, least_score))
    front: list[tuple[IntArray, float, float, FloatArray]] = []
    for worth, cost, number, choice in sorted(scored, key=lambda e: (e[1], e[0], e[2])):
        if not front or worth < front[-1][1]:
            front.append((choice, worth, cost, coefficients[number]))
    best = min(scored, key=lambda e: (e[0], e[1], e[2]))
    found = finish(problem, best[3], best[0], trace, "nsga2")
    return Found(found.choice, found.score, found.trace, found.solution, tuple(front))


def _most(problem: Problem) -> Any:
    return sum(a[:, 0].max() for a in problem.cost)


def _number(value: float) -> float:
    # Optuna refuses nan and takes inf; a broken network is as bad as can be.
    return math.inf if math.isnan(float(value)) else float(value)


def _ones(groups: int) -> dict[str, float]:
    return {f"c{g}": 0.0 for g in range(groups)}


def _coefficients(trial: Any, groups: int) -> Any:
    return 10.0 ** np.array([trial.suggest_float(f"c{g}", -DECADES, DECADES) for g in range(groups)])


def _seed(seed: int, number: int) -> int:
    # A trial's proposal depends on the seed, its number and the trials before it, not on which process makes it.
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _open(problem: Problem, name: str, storage: Any, directions: list[Any], kind: str, sampler: Any) -> Any:
    """The study, new or resumed; refused where it was made for another problem or by another search."""
    import optuna

    study = optuna.create_study(
        study_name=name, storage=storage, directions=directions, load_if_exists=True, sampler=sampler
    )
    mine = {"problem": problem.fingerprint, "search": kind}
    for key, wanted in mine.items():
        have = study.user_attrs.get(key)
        if have is None:
            study.set_user_attr(key, wanted)
        elif have != wanted:
            raise ProblemError(
                f"study {name!r} has {key} {have!r}, this search has {wanted!r}; take another study name"
            )
    return study


def _run(
    study: Any,
    sampler: Callable[[int], Any],
    propose: Callable[[Any], IntArray],
    value: Callable[[IntArray], tuple[float, ...]],
    evaluations: int,
    first: list[dict[str, float]],
) -> list[Any]:
    """Ask and tell until the study has `evaluations` finished trials; all of them, in order."""
    from optuna.trial import TrialState

    if evaluations < 1:
        raise ProblemError(f"evaluations is {evaluations}; at least 1 is needed")
    if not study.get_trials(deepcopy=False):
        # The unweighted solution comes first, so a search never ends worse than it.
        for parameters in first:
            study.enqueue_trial(parameters)
    known: dict[bytes, tuple[float, ...]] = {}
    while True:
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(done) >= evaluations:
            return sorted(done, key=lambda t: t.number)[:evaluations]
        for trial in done:
            known[np.array(trial.user_attrs["choice"], np.int64).tobytes()] = tuple(trial.values)
        study.sampler = sampler(len(study.get_trials(deepcopy=False)))
        trial = study.ask()
        try:
            choice = propose(trial)
            values = known.get(choice.tobytes()) or value(choice)
        except BaseException:
            # Interrupted or failed: the trial does not count, and is not taken for finished.
            study.tell(trial, state=TrialState.FAIL)
            raise
        trial.set_user_attr("choice", choice.tolist())
        study.tell(trial, list(values))


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna reports every trial on stderr unless told otherwise."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
