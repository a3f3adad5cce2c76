"""NSGA-II: the trade-off between bytes and measured loss in one run, for many budgets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from autocompress.measuring import Context
from autocompress.planning import budget_bytes, within
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, searchable, with_context
from autocompress.strategies.searching import solver_for
from autocompress.strategies.weighing import kept
from autocompress.types import Budget, Plan
from solvers import studies
from solvers.search import reweighted

__all__ = ["Nsga2", "octave"]

VERSION = 3
AGAIN = 3  # points of the front whose coefficients are solved with and scored at the budget
POPULATION = 40  # at most; of few evaluations a sixth, so that there are generations


class Nsga2:
    """The best scored answer at the budget to the weights on the front of one evolution over (bytes, KL of the stitched
    model).

    Genes are the coefficients of `tpe` and a part of the bytes. One run serves every budget of an octave, those between
    1/2^k and 1/2^(k+1) of the dense file, so that an answer does not depend on which budgets were asked for before. Its
    front is kept in the profile's store, by evaluations and seed, and read by the next budget. No point of it fills a
    budget that it was not drawn for, so what is taken from the three points of the nearest size are their coefficients:
    the allocation is solved with them at the budget. Of the evaluations granted four are left for these three and the
    exact answer on the relative error, scored with norms stored as a file of that size has them; the best is taken.
    Source: NSGA-II (Deb et al., IEEE Transactions on Evolutionary Computation 6(2), 2002), by Optuna. Raises
    MismatchError without a context, CalibrationError where nothing is held out to score on.
    """

    needs = "evaluations"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, "nsga2", "scores compressed models")
        asked = searchable(profile, budget)
        score, room = asked.score(context), int(asked.problem.budget[0])
        front = self.front(profile, budget, context)
        nearest = sorted(front, key=lambda point: (abs(point[1] - room), point[0]))[:AGAIN]
        solver = solver_for(asked.problem)
        answers = [asked.first, *(reweighted(asked.problem, np.array(c), solver) for _, _, c in nearest)]
        scores = [score(answer) for answer in answers]
        best = min(range(len(scores)), key=lambda i: (scores[i], i))
        plan = chosen_plan(profile, budget, asked.choice(answers[best]), "nsga2")
        points = ", ".join(f"{size}: {score:.3g}" for score, size, _ in front)
        notes = (
            f"{context.granted} evaluations: the first scored {scores[0]:.6g}, the best {scores[best]:.6g}, with "
            f"the weights of {len(nearest)} points of the front solved at the budget",
            f"front (payload bytes: KL): {points}",
        )
        return plan.replace(seed=context.seed, notes=(*plan.notes, *notes))

    def front(self, profile: Profile, budget: Budget, context: Context) -> list[tuple[float, int, list[float]]]:
        """(score, payload bytes, coefficient of every layer) that no other scored choice of the octave beats in score
        and bytes, by rising bytes.
        """
        wide = octave(budget, profile)
        profile = within(profile, wide.size or 0)
        evaluations = max(1, context.granted - 1 - AGAIN)
        population = max(4, min(POPULATION, evaluations // 6))

        def run() -> dict[str, Any]:
            asked = searchable(profile, wide)
            found = studies.nsga2(
                asked.problem,
                asked.score(context),
                evaluations=evaluations,
                seed=context.seed,
                population=population,
                lowest=float(asked.problem.budget[0] - (wide.size or 0) // 2),
                solver=solver_for(asked.problem),
            )
            points: list[list[Any]] = []
            for answer, score, _, coefficients in found.front:
                size = sum(row.bytes for row in asked.choice(answer).values())
                points.append([score, size, coefficients.tolist()])
            return {"front": [point for point in points if math.isfinite(point[0])]}

        key = [VERSION, str(wide), evaluations, population, context.seed, context.data_digest]
        return [(score, size, c) for score, size, c in kept(context, profile, "nsga2", key, run)["front"]]


def octave(budget: Budget, profile: Profile) -> Budget:
    """The budget with its bytes raised to the dense file's over the largest power of two that leaves as many."""
    dense, size = profile.template.dense_bytes, budget_bytes(budget, profile)
    top = dense
    while top // 2 >= size:
        top //= 2
    return dataclasses.replace(budget, size=max(top, size), bits_per_weight=None, ratio=None)
