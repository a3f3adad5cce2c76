"""NSGA-II: the trade-off between bytes and measured loss in one run, for many budgets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from autocompress.measuring import Context
from autocompress.planning import budget_bytes, limits_of, within, within_limits
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, searchable, with_context
from autocompress.strategies.searching import solver_for
from autocompress.strategies.weighing import kept
from autocompress.types import Budget, Plan
from solvers import studies

__all__ = ["Nsga2", "octave"]

VERSION = 2
AGAIN = 3  # points of the front that are scored once more at the budget
POPULATION = 40  # at most; of few evaluations a sixth, so that there are generations


class Nsga2:
    """The best scored choice within the budget on the front of one evolution over (bytes, KL of the stitched model).

    Genes are the coefficients of `tpe` and a part of the bytes. One run serves every budget of an octave, those between
    1/2^k and 1/2^(k+1) of the dense file, so that an answer does not depend on which budgets were asked for before. Its
    front is kept in the profile's store, by evaluations and seed, and read by the next budget. Of the evaluations
    granted four are left for the budget itself: the exact answer on the relative error and the best three points of the
    front that fit are scored once more, with norms stored as a file of that size has them; the best of these is taken.
    Source: NSGA-II (Deb et al., IEEE Transactions on Evolutionary Computation 6(2), 2002), by Optuna. Raises
    MismatchError without a context, CalibrationError where nothing is held out to score on.
    """

    needs = "evaluations"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, "nsga2", "scores compressed models")
        asked = searchable(profile, budget)
        score, limits = asked.score(context), limits_of(budget, profile)
        front = self.front(profile, budget, context)
        answers = [np.array(answer, np.int64) for _, _, answer in sorted(front)]
        fitting = [a for a in answers if within_limits(profile, limits, asked.rows_of(a))][:AGAIN]
        scores = [score(answer) for answer in (asked.first, *fitting)]
        best = min(range(len(scores)), key=lambda i: (scores[i], i))
        plan = chosen_plan(profile, budget, asked.choice((asked.first, *fitting)[best]), "nsga2")
        points = ", ".join(f"{size}: {score:.3g}" for score, size, _ in front)
        notes = (
            f"{context.granted} evaluations: the first scored {scores[0]:.6g}, the best {scores[best]:.6g}, with "
            f"{len(fitting)} points of the front tried within the budget",
            f"front (payload bytes: KL): {points}",
        )
        return plan.replace(seed=context.seed, notes=(*plan.notes, *notes))

    def front(self, profile: Profile, budget: Budget, context: Context) -> list[tuple[float, int, list[int]]]:
        """(score, payload bytes, option index of every layer) that no other scored choice of the octave beats in both,
        by rising bytes.
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
                solver=solver_for(asked.problem),
            )
            points: list[list[Any]] = []
            for answer, score, _ in found.front:
                rows = asked.choice(answer)
                indices = [rows_of.index(row) for rows_of, row in zip(asked.rows, rows.values(), strict=True)]
                points.append([score, sum(row.bytes for row in rows.values()), indices])
            return {"front": [point for point in points if math.isfinite(point[0])]}

        key = [VERSION, str(wide), evaluations, population, context.seed, context.data_digest]
        return [(score, size, answer) for score, size, answer in kept(context, profile, "nsga2", key, run)["front"]]


def octave(budget: Budget, profile: Profile) -> Budget:
    """The budget with its bytes raised to the dense file's over the largest power of two that leaves as many."""
    dense, size = profile.template.dense_bytes, budget_bytes(budget, profile)
    top = dense
    while top // 2 >= size:
        top //= 2
    return dataclasses.replace(budget, size=max(top, size), bits_per_weight=None, ratio=None)
