"""Budgeted choice: what is asked (`Problem`), and an answer that checks itself (`Solution`, in `solution.py`)."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from solvers.fields import (
    INTEGER_LIMIT,
    SCHEMA,
    Array,
    Deadline,
    FloatArray,
    IntArray,
    Pairwise,
    ProblemError,
    read_costs,
    read_fixed,
    read_labels,
    read_losses,
    read_names,
    read_pair,
)

__all__ = ["Array", "Deadline", "Flat", "FloatArray", "IntArray", "Pairwise", "Problem", "ProblemError"]


@dataclass(frozen=True, eq=False)
class Flat:
    """All options that may still be chosen, end to end: N rows, group g owning rows start[g] to start[g + 1].

    `loss` (N,) float64; `cost` (N, K) int64 or float64 and `limit` (K,), the rows of Σ cost ≤ limit: one per resource,
    and one negated row per lower bound; `option` (N,) the index of the option within its group; `group` (N,); `start`
    (G + 1,).
    """

    loss: FloatArray
    cost: Array
    limit: Array
    option: IntArray
    start: IntArray

    @cached_property
    def sizes(self) -> IntArray:
        return np.diff(self.start)

    @cached_property
    def group(self) -> IntArray:
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def choice(self, rows: IntArray) -> IntArray:
        """The option chosen in every group, from one row per group."""
        return self.option[rows]


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one option in each of G groups: least loss within every budget (a multiple-choice knapsack).

    minimise   Σ_g loss[g][x_g] + Σ_p pairwise_p[x_g, x_h]    (objective "sum"; "max" takes the largest loss of a group)
    subject to lower[r] ≤ Σ_g cost[g][x_g, r] ≤ budget[r]     for every resource r;   x_g = fixed[g] where that is given

    `loss`: G arrays (n_g,), finite, any sign. `cost`: G arrays (n_g,) or (n_g, R); where all are integers they stay
    int64, so bytes are exact. `budget`: one number or (R,); inf means no limit. `resources`: R names with their units,
    such as "bytes". `names`: G names of groups. `options`: per group the n_g printable names of its options.
    `pairwise`: (g, h, matrix) triples, the matrix (n_g, n_h). `lower`: like budget, -inf means no limit. `fixed`:
    {group index: option index}. Raises ProblemError, saying what was got and what is needed.
    """

    loss: Sequence[Any]
    cost: Sequence[Any]
    budget: Any
    resources: Sequence[str] = ("bytes",)
    names: Sequence[str] | None = None
    options: Sequence[Sequence[str]] | None = None
    pairwise: Sequence[Any] = ()
    lower: Any = None
    fixed: Mapping[int, int] | None = None
    objective: str = "sum"

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        put("resources", (self.resources,) if isinstance(self.resources, str) else tuple(self.resources))
        if len(self.loss) == 0:
            raise ProblemError("the problem has no groups; at least one is needed")
        if len(self.loss) != len(self.cost):
            raise ProblemError(
                f"{len(self.loss)} groups have losses but {len(self.cost)} have costs; both need one array per group"
            )
        if self.objective not in ("sum", "max"):
            raise ProblemError(f"objective is {self.objective!r}; it must be 'sum' or 'max'")
        put("names", read_names(self.names, len(self.loss)))
        put("loss", tuple(read_losses(self.at(g), a) for g, a in enumerate(self.loss)))
        put("cost", read_costs(self.names or (), self.loss, self.cost, self.resources))
        put("budget", self._limits("budget", self.budget, np.floor))
        lower = -np.inf if self.lower is None else self.lower
        put("lower", None if np.all(np.asarray(lower) == -np.inf) else self._limits("lower", lower, np.ceil))
        put("options", read_labels(self.names or (), self.loss, self.options))
        put("pairwise", tuple(read_pair(self.loss, p) for p in self.pairwise))
        put("fixed", read_fixed(self.names or (), self.loss, self.fixed))
        if self.objective == "max" and self.pairwise:
            raise ProblemError("pairwise terms need the objective 'sum'; this problem has the objective 'max'")

    def at(self, g: int) -> str:
        """What messages call group g."""
        assert self.names is not None
        return f"group {self.names[g]!r}"

    @property
    def groups(self) -> int:
        return len(self.loss)

    @property
    def integer(self) -> bool:
        """Whether costs are integers, and so exact."""
        return self.cost[0].dtype == np.int64

    def _limits(self, word: str, value: Any, rounding: Any) -> Array:
        limits = np.atleast_1d(np.asarray(value))
        R = len(self.resources)
        if limits.shape != (R,):
            raise ProblemError(
                f"{word} has shape {limits.shape} but the resources {list(self.resources)} need one number each"
            )
        if limits.dtype == object or not (np.issubdtype(limits.dtype, np.number) and not np.iscomplexobj(limits)):
            raise ProblemError(f"{word} is {value!r}; it needs real numbers that fit 64 bits")
        if np.issubdtype(limits.dtype, np.floating) and np.isnan(limits).any():
            raise ProblemError(
                f"{word} for {self.resources[int(np.isnan(limits).argmax())]!r} is nan; it needs a number"
            )
        if not self.integer:
            return limits.astype(np.float64)
        if np.issubdtype(limits.dtype, np.floating):
            # A whole number of bytes obeys 10.7 exactly where it obeys 10.
            limits = np.clip(rounding(limits), -float(INTEGER_LIMIT), float(INTEGER_LIMIT))
        return np.clip(limits, -INTEGER_LIMIT, INTEGER_LIMIT).astype(np.int64)

    @cached_property
    def flat(self) -> Flat:
        """The options that may be chosen, end to end (see Flat)."""
        assert isinstance(self.fixed, dict)
        option = [np.array([self.fixed[g]]) if g in self.fixed else np.arange(len(a)) for g, a in enumerate(self.loss)]
        start = np.concatenate([[0], np.cumsum([len(j) for j in option])]).astype(np.int64)
        whole = not self.fixed
        loss = np.concatenate(self.loss if whole else [a[j] for a, j in zip(self.loss, option, strict=True)])
        cost = np.concatenate(self.cost if whole else [a[j] for a, j in zip(self.cost, option, strict=True)])
        limit = self.budget
        if self.lower is not None:
            held = self.lower > (-INTEGER_LIMIT if self.integer else -np.inf)
            cost = np.concatenate([cost, -cost[:, held]], axis=1)
            limit = np.concatenate([limit, -self.lower[held]])
        return Flat(loss, cost, limit, np.concatenate(option).astype(np.int64), start)

    def total_loss(self, choice: Array) -> float:
        """The objective of a choice (G,), the sum correctly rounded."""
        terms = [float(a[j]) for a, j in zip(self.loss, choice, strict=True)]
        if self.objective == "max":
            return max(terms)
        return math.fsum(terms + [float(p.loss[choice[p.first], choice[p.second]]) for p in self.pairwise])

    def total_cost(self, choice: Array) -> Array:
        """What a choice (G,) costs, (R,): exact for integers, correctly rounded for floats."""
        rows = np.stack([a[j] for a, j in zip(self.cost, choice, strict=True)])
        return rows.sum(axis=0) if self.integer else np.array([math.fsum(c) for c in rows.T])

    def violated(self, choice: Array) -> str:
        """Which limit a choice (G,) breaks, in words, or "". Exact: integers are added as integers, and floats by their
        sign.
        """
        rows = np.stack([a[j] for a, j in zip(self.cost, choice, strict=True)])
        for r, resource in enumerate(self.resources):
            column = rows[:, r].tolist()
            if _excess(column, self.budget[r]) > 0:
                return f"{resource}: {_add(column)!r} is over the budget of {self.budget[r]}"
            if self.lower is not None and _excess(column, self.lower[r]) < 0:
                return f"{resource}: {_add(column)!r} is under the lower bound of {self.lower[r]}"
        return ""

    def feasible(self, choice: Array) -> bool:
        """Whether a choice (G,) keeps every limit, exactly."""
        return not self.violated(choice)

    def smallest(self) -> Array:
        """The least each budget can be, (R,), whatever the others are."""
        flat = self.flat
        least = np.minimum.reduceat(flat.cost[:, : len(self.resources)], flat.start[:-1], axis=0)
        return least.sum(axis=0) if self.integer else np.array([_sum_up(c.tolist()) for c in least.T])

    def with_budget(self, budget: Any) -> Problem:
        """The same problem under another budget; arrays are shared."""
        new = object.__new__(Problem)
        for field in self.__dataclass_fields__:
            object.__setattr__(new, field, getattr(self, field))
        object.__setattr__(new, "budget", self._limits("budget", budget, np.floor))
        return new

    def with_loss(self, loss: Sequence[FloatArray]) -> Problem:
        """The same problem with other losses, G arrays of the same shapes, and without pairwise terms; costs are
        shared.
        """
        return Problem(
            loss,
            self.cost,
            self.budget,
            self.resources,
            self.names,
            self.options,
            lower=self.lower,
            fixed=self.fixed,
            objective=self.objective,
        )

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of everything that makes the problem; equal for equal problems."""
        digest = hashlib.sha256(repr((self.resources, self.names, self.options, self.fixed, self.objective)).encode())
        for array in [*self.loss, *self.cost, self.budget, *([] if self.lower is None else [self.lower])]:
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        for p in self.pairwise:
            digest.update(f"{p.first} {p.second}".encode() + np.ascontiguousarray(p.loss).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the problem as one npz file: flat arrays, and a JSON header under the name `header`; no pickle."""
        header = {
            "schema": SCHEMA,
            "resources": list(self.resources),
            "names": list(self.names or ()),
            "options": None if self.options is None else [list(o) for o in self.options],
            "pairwise": [[p.first, p.second] for p in self.pairwise],
            "fixed": sorted((self.fixed or {}).items()),
            "objective": self.objective,
        }
        arrays = {
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
            "sizes": np.array([len(a) for a in self.loss], np.int64),
            "loss": np.concatenate(self.loss),
            "cost": np.concatenate(self.cost),
            "budget": self.budget,
        }
        if self.lower is not None:
            arrays["lower"] = self.lower
        for k, p in enumerate(self.pairwise):
            arrays[f"pairwise_{k}"] = p.loss
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        Path(path).write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Problem:
        """Read what `save` wrote. Raises ProblemError where the schema is another one."""
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(data["header"].tobytes().decode())
            if header.get("schema") != SCHEMA:
                raise ProblemError(f"{path} has schema {header.get('schema')!r}; this version reads schema {SCHEMA}")
            cuts = np.cumsum(data["sizes"])[:-1]
            return cls(
                loss=np.split(data["loss"], cuts),
                cost=np.split(data["cost"], cuts),
                budget=data["budget"],
                resources=header["resources"],
                names=header["names"],
                options=header["options"],
                pairwise=[(g, h, data[f"pairwise_{k}"]) for k, (g, h) in enumerate(header["pairwise"])],
                lower=data["lower"] if "lower" in data else None,
                fixed=dict(header["fixed"]),
                objective=header["objective"],
            )


def _excess(column: list[Any], limit: Any) -> Any:
    """Σ column - limit: exact for integers; for floats correctly rounded, so that its sign is exact."""
    if isinstance(column[0], int):
        return sum(column) - int(limit)
    return -limit if math.isinf(limit) else math.fsum([*column, -float(limit)])


def _sum_up(column: list[float]) -> float:
    """The smallest float that is at least Σ column."""
    total = math.fsum(column)
    return math.nextafter(total, math.inf) if math.fsum([*column, -total]) > 0 else total


def _add(column: list[Any]) -> Any:
    return sum(column) if isinstance(column[0], int) else math.fsum(column)
