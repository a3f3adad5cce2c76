"""An answer that carries its own certificate, recomputed from the problem before anybody sees it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from solvers.fields import SCHEMA
from solvers.problem import Array, FloatArray, IntArray, Problem

# "Optimal" means: no choice is better by more than the rounding of float64 sums, relative to `magnitude`.
ROUNDING = 1e-12


class Status(StrEnum):
    """What is known about an answer."""

    OPTIMAL = "optimal"  # no choice is better, up to the rounding of a float64 sum
    FEASIBLE = "feasible"  # within every budget; `gap` says how far from the best it can be
    INFEASIBLE = "infeasible"  # no choice is within the budgets; `smallest_budget` says what would be
    TIME_LIMIT = "time limit"  # the limit was reached; the choice, where there is one, is within every budget
    UNKNOWN = "unknown"  # a heuristic found nothing within the budgets, and proves nothing either


class SolutionError(ValueError):
    """An answer that does not agree with its problem."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A choice with its certificate.

    `choice` (G,) int64: the option of every group, -1 throughout where there is none. `loss`: its objective, inf where
    there is none. `cost` (R,): what it uses of each resource. `bound`: no choice within the budgets has a smaller loss;
    -inf where nothing is proven, inf where the problem is infeasible. `smallest_budget` (R,), where infeasible: the
    least each budget could be with the other budgets as they are; where that would not help, whatever the others are.
    `price` (R,), where a solver knows it: the loss that one more unit of each resource saves. `seconds` of wall clock;
    `iterations` of the solver's own kind.
    """

    choice: IntArray
    loss: float
    cost: Array
    bound: float
    status: Status
    solver: str
    seconds: float = 0.0
    iterations: int = 0
    message: str = ""
    smallest_budget: Array | None = None
    price: FloatArray | None = field(default=None, repr=False)

    @property
    def found(self) -> bool:
        """Whether there is a choice."""
        return bool(len(self.choice)) and int(self.choice[0]) >= 0

    @property
    def gap(self) -> float:
        """How far the loss can be from the best: (loss - bound) / |bound|; 0 where both are 0, inf where nothing is
        proven.
        """
        if not self.found or not math.isfinite(self.bound):
            return math.inf
        if self.loss == self.bound:
            return 0.0
        return (self.loss - self.bound) / abs(self.bound) if self.bound else math.inf

    @classmethod
    def of(cls, problem: Problem, choice: Array, bound: float, status: Status, solver: str, **more: Any) -> Solution:
        """The solution of a choice (G,): loss and cost are computed here, and a bound a rounding above the loss is
        lowered to it.
        """
        choice = np.asarray(choice, dtype=np.int64)
        loss = problem.total_loss(choice)
        if bound > loss and bound - loss <= ROUNDING * magnitude(problem, choice):
            bound = loss
        return cls(choice, loss, problem.total_cost(choice), float(bound), status, solver, **more)

    @classmethod
    def none(cls, problem: Problem, status: Status, solver: str, bound: float = -math.inf, **more: Any) -> Solution:
        """A solution without a choice: infeasible, or nothing found."""
        if status is Status.INFEASIBLE:
            bound = math.inf
            more.setdefault("smallest_budget", problem.smallest())
            more.setdefault("message", advice(problem, more["smallest_budget"]))
        return cls(np.full(problem.groups, -1), math.inf, problem.smallest(), bound, status, solver, **more)

    def check(self, problem: Problem) -> Solution:
        """Recompute everything from `choice` and return self. Raises SolutionError, saying what disagrees.

        Laws: every group has one of its options, fixed ones theirs; every limit holds exactly; loss and cost are those
        of the choice; bound ≤ loss; "optimal" has a bound that is the loss up to rounding; "infeasible" names a budget
        that is larger.
        """
        if self.choice.shape != (problem.groups,):
            raise SolutionError(f"choice has shape {self.choice.shape}; the problem has {problem.groups} groups")
        if not self.found:
            return self._check_none(problem)
        if self.status in (Status.INFEASIBLE, Status.UNKNOWN):
            raise SolutionError(f"status is '{self.status}', but there is a choice")
        for g, j in enumerate(self.choice.tolist()):
            if not 0 <= j < len(problem.loss[g]):
                raise SolutionError(f"{problem.at(g)} has options 0 to {len(problem.loss[g]) - 1}; the choice is {j}")
            if (problem.fixed or {}).get(g, j) != j:
                raise SolutionError(f"{problem.at(g)} is fixed to option {(problem.fixed or {})[g]}; the choice is {j}")
        broken = problem.violated(self.choice)
        if broken:
            raise SolutionError(broken)
        loss, cost = problem.total_loss(self.choice), problem.total_cost(self.choice)
        if self.loss != loss:
            raise SolutionError(f"loss is given as {self.loss!r}; the choice has {loss!r}")
        if not np.array_equal(self.cost, cost):
            raise SolutionError(f"cost is given as {self.cost}; the choice has {cost}")
        if not self.bound <= loss:
            raise SolutionError(f"bound {self.bound!r} is above the loss {loss!r}")
        if self.status is Status.OPTIMAL and loss - self.bound > ROUNDING * magnitude(problem, self.choice):
            raise SolutionError(f"status is 'optimal', but the loss {loss!r} is above the bound {self.bound!r}")
        return self

    def _check_none(self, problem: Problem) -> Solution:
        if self.status in (Status.OPTIMAL, Status.FEASIBLE) or self.loss != math.inf or (self.choice != -1).any():
            raise SolutionError(f"status is '{self.status}' and loss {self.loss!r}, but there is no choice")
        if self.status is Status.INFEASIBLE:
            if self.smallest_budget is None:
                raise SolutionError("an infeasible problem needs its smallest budget")
            over = (self.smallest_budget > problem.budget).any()
            # With several limits it may be that no single budget, however large, would help.
            if not over and problem.lower is None and len(problem.resources) == 1:
                raise SolutionError(
                    f"status is 'infeasible', but the budget {problem.budget} covers {self.smallest_budget}"
                )
        return self

    def save(self, path: str | Path) -> None:
        """Write the solution as JSON; floats round-trip."""
        record = {
            "schema": SCHEMA,
            "choice": self.choice.tolist(),
            "loss": _text(self.loss),
            "cost": self.cost.tolist(),
            "bound": _text(self.bound),
            "status": str(self.status),
            "solver": self.solver,
            "seconds": self.seconds,
            "iterations": self.iterations,
            "message": self.message,
            "smallest_budget": None if self.smallest_budget is None else self.smallest_budget.tolist(),
            "price": None if self.price is None else self.price.tolist(),
        }
        Path(path).write_text(json.dumps(record, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Solution:
        """Read what `save` wrote. Raises SolutionError where the schema is another one."""
        record = json.loads(Path(path).read_text())
        if record.pop("schema", None) != SCHEMA:
            raise SolutionError(f"{path} is not a solution of schema {SCHEMA}")
        record["choice"] = np.array(record["choice"], np.int64)
        for name in ("loss", "bound"):
            record[name] = float(record[name])
        for name in ("cost", "smallest_budget", "price"):
            record[name] = None if record[name] is None else np.array(record[name])
        return cls(**{**record, "status": Status(record["status"])})

    def __str__(self) -> str:
        if not self.found:
            return f"{self.solver}: {self.status}. {self.message}".rstrip()
        gap = "no guarantee" if self.bound == -math.inf else f"bound {self.bound:.6g}, gap {self.gap:.2e}"
        cost = ", ".join(map(str, self.cost.tolist()))
        return f"{self.solver}: {self.status}, loss {self.loss:.6g} ({gap}), cost {cost}"


def magnitude(problem: Problem, choice: Array) -> float:
    """Σ |loss| of a choice and of every group's smallest: what the rounding of sums is measured against."""
    terms = [abs(float(a[j])) for a, j in zip(problem.loss, choice, strict=True)]
    terms += [abs(float(a.min())) for a in problem.loss]
    return math.fsum(terms + [abs(float(p.loss[choice[p.first], choice[p.second]])) for p in problem.pairwise])


def advice(problem: Problem, smallest: Array) -> str:
    """What to ask for instead, in words."""
    parts = [
        f"the cheapest choice needs {need} {resource}, the budget is {have}"
        for resource, need, have in zip(problem.resources, smallest.tolist(), problem.budget.tolist(), strict=True)
        if need > have
    ]
    return "; ".join(parts) or "no choice keeps every limit at once"


def _text(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)
