"""NSGA-II: the trade-off between bytes and measured loss in one run, for many budgets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from autocompress.batches import batch_digest
from autocompress.measuring import Context
from autocompress.planning import budget_bytes, limits_of, within, within_limits
from autocompress.profiling import Profile
from autocompress.strategies.base import Choice, chosen_plan, searchable, with_context
from autocompress.strategies.searching import solver_for
from autocompress.strategies.weighing import kept
from autocompress.types import Budget, Plan
from solvers import studies

__all__ = ["Nsga2", "octave"]

VERSION = 1
POPULATION = 40  # at most; of few evaluations a sixth, so that there are generations


class Nsga2:
    """The best scored choice within the budget on the front of one evolution over (bytes, KL of the stitched model).

    Genes are the coefficients of `tpe` and a part of the bytes. One run serves every budget of an octave: those between
    1/2^k and 1/2^(k+1) of the dense file, so that an answer does not depend on which budgets were asked for before. Its
    front is kept in the profile's store, by evaluations and seed, and read by the next budget. One evaluation of those
    granted goes to the exact answer on the relative error at the budget itself, which is handed out where no point of
    the front is better. Source: NSGA-II (Deb et al., IEEE TEC 6(2), 2002), by Optuna. Raises MismatchError without a
    context, CalibrationError where nothing is held out to score on.
    """

    needs = "evaluations"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, "nsga2", "scores compressed models")
        asked = searchable(profile, budget)
        exact = asked.choice(asked.first)
        candidates: list[tuple[float, Choice]] = [(asked.score(context)(asked.first), exact)]
        front = self.front(profile, budget, context)
        limits = limits_of(budget, profile)
        for score, _, answer in front:
            rows = asked.choice(np.array(answer, np.int64))
            if within_limits(profile, limits, rows):
                candidates.append((score, rows))
        best = min(range(len(candidates)), key=lambda i: (candidates[i][0], i))
        plan = chosen_plan(profile, budget, candidates[best][1], "nsga2")
        points = ", ".join(f"{size}: {score:.3g}" for score, size, _ in front)
        notes = (
            f"{context.granted} evaluations: the exact answer scored {candidates[0][0]:.6g}, the best of "
            f"{len(candidates) - 1} points of the front within the budget {candidates[best][0]:.6g}",
            f"front (payload bytes: KL): {points}",
        )
        return plan.replace(seed=context.seed, notes=(*plan.notes, *notes))

    def front(self, profile: Profile, budget: Budget, context: Context) -> list[tuple[float, int, list[int]]]:
        """(score, payload bytes, option index of every layer) that no other scored choice of the octave beats in both,
        by rising bytes.
        """
        wide = octave(budget, profile)
        profile = within(profile, wide.size or 0)
        evaluations = max(1, context.granted - 1)
        population = max(4, min(POPULATION, evaluations // 6))

        def run() -> dict[str, Any]:
            asked = searchable(profile, wide)
            found = studies.nsga2(
                asked.problem,
                asked.score(context),
                evaluations=evaluations,
                seed=context.seed,
                population=population,
                solver=solver_for(asked.problem),
            )
            points = [[score, int(cost), answer.tolist()] for answer, score, cost in found.front]
            return {"front": [point for point in points if math.isfinite(point[0])]}

        key = [VERSION, str(wide), evaluations, population, context.seed, *map(batch_digest, context.pieces("all"))]
        return [(score, size, answer) for score, size, answer in kept(profile, "nsga2", key, run)["front"]]


def octave(budget: Budget, profile: Profile) -> Budget:
    """The budget with its bytes raised to the dense file's over the largest power of two that leaves as many."""
    dense, size = profile.template.dense_bytes, budget_bytes(budget, profile)
    top = dense
    while top // 2 >= size:
        top //= 2
    return dataclasses.replace(budget, size=max(top, size), bits_per_weight=None, ratio=None)
