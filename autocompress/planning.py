"""From a profile and a budget to an allocation: exact file sizes, a `solvers.Problem`, and the choice with its
certificate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.compressors import Measured
from autocompress.errors import BudgetError, InfeasibleError
from autocompress.profiling import Profile
from autocompress.records import LEAST_BITS, Template, vector_bits
from autocompress.storage.bits import least_bytes as least_payload
from autocompress.types import Budget, Option, Plan
from solvers import Problem, Solution, solve

__all__ = [
    "Allocation",
    "allocate",
    "budget_bytes",
    "coarsest",
    "energy_losses",
    "infeasible",
    "least_bytes",
    "limit_bytes",
    "make_plan",
    "single_options",
    "size_range",
    "within",
]

NAME_BYTES = 4  # what an option's name may save in the compressed header, at most


def budget_bytes(budget: Budget, profile: Profile) -> int:
    """The limit on the file in bytes. Raises BudgetError for limits that are not on the file's size."""
    return limit_bytes(budget, profile.template)


def limit_bytes(budget: Budget, template: Template) -> int:
    """The same before there is a profile."""
    other = [n for n in ("macs", "bops", "latency_ms") if getattr(budget, n) is not None]
    limit = budget.bytes(template.dense_bytes, template.parameters)
    if other or limit is None:
        raise BudgetError(
            f"budget {str(budget)!r} limits {', '.join(other)}; this version allocates the file's size only"
        )
    return limit


def within(profile: Profile, budget: int) -> Profile:
    """The profile with norms and biases stored as a file of `budget` bytes has them.

    `vector_bits` says how; where the smallest file would not fit with so many, they get fewer, down to six.
    """
    bits = vector_bits(budget, profile.template.parameters)
    found = profile.with_vectors(bits)
    while bits > LEAST_BITS and size_range(found)[0] > budget:
        bits = min(bits - 1, 13)
        found = profile.with_vectors(bits)
    return found


def least_bytes(template: Template) -> int:
    """A size that no file of this model can be below, known without a profile: what no choice changes, header left out,
    and the shortest payload that a weight of that many values can have.
    """
    weights = set(template.keys.values())
    entries = template.at(LEAST_BITS).entries
    return sum(least_payload(e.numel) if e.name in weights else e.bytes for e in entries)


def size_range(profile: Profile) -> tuple[int, int]:
    """Lengths of the smallest and of the largest file that the profile's options make."""
    ends = [
        {name: end(layer.rows, key=lambda row: row.bytes) for name, layer in profile.layers.items()}
        for end in (min, max)
    ]
    return profile.template.file_bytes(ends[0]), profile.template.file_bytes(ends[1])


def coarsest(options: Sequence[Option]) -> list[Option]:
    """The options, of any sparsity, that no other one is coarser than: the smallest file is made of these."""

    def coarser(a: Option, b: Option) -> bool:
        of_a, of_b = ((o.step or 0.0, o.lam or 0.0, -(o.bits or 32)) for o in (a, b))
        return of_a != of_b and all(x >= y for x, y in zip(of_a, of_b, strict=True))

    given = list(dict.fromkeys(options))
    return [o for o in given if not any(coarser(other, o) for other in given)]


def _smallest(profile: Profile) -> tuple[dict[str, Measured], int]:
    """The rows that make the smallest file, and its length.

    Payloads count first. Where they are nearly equal, names decide, as one name in many layers makes the shortest
    header: tried is every option, in each layer where it costs no more than `NAME_BYTES` over the shortest.
    """
    least = {name: min(layer.rows, key=lambda row: row.bytes) for name, layer in profile.layers.items()}
    near = {
        name: {row.option: row for row in layer.rows if row.bytes <= least[name].bytes + NAME_BYTES}
        for name, layer in profile.layers.items()
    }
    found = [least]
    for favourite in dict.fromkeys(option for rows in near.values() for option in rows):
        for room in (0, NAME_BYTES):
            rows = {n: near[n].get(favourite, least[n]) for n in least}
            found.append({n: row if row.bytes <= least[n].bytes + room else least[n] for n, row in rows.items()})
    sizes = [profile.template.file_bytes(rows) for rows in found]
    return min(zip(found, sizes, strict=True), key=lambda pair: pair[1])


def infeasible(profile: Profile, budget: int, smallest: int, what: str = "no allocation") -> InfeasibleError:
    """The refusal of a budget, with the smallest size that is not refused, as a ratio too (rounded down, so that it
    works), and what keeps the file large where something does.
    """
    ratio = profile.template.dense_bytes * 10 // smallest / 10
    unreached = [layer for layer in profile.layers.values() if not layer.reached]
    note = ""
    if unreached:
        size = sum(min(row.bytes for row in layer.rows) for layer in unreached)
        note = (
            f"; {len(unreached)} layers that calibration never reached have only options that need no data "
            f"(at least {size:,} bytes)"
        )
    return InfeasibleError(
        f"{what} fits in {budget:,} bytes: the smallest file has {smallest:,} bytes ({ratio:.1f}x){note}", smallest
    )


@dataclass(frozen=True)
class Allocation:
    """One row per layer, the solver's answer, and the file that it makes. `payload_bytes` is what the budget leaves
    beside this file's header; `bound` and `gap` are over all allocations whose payloads fit into that.
    """

    rows: Mapping[str, Measured]
    loss: float
    bound: float
    gap: float
    file_bytes: int
    payload_bytes: int
    solution: Solution | None = None

    @property
    def options(self) -> dict[str, Option]:
        return {name: row.option for name, row in self.rows.items()}

    @property
    def fixed_bytes(self) -> int:
        """What of the file no choice changes: header, biases, norms."""
        return self.file_bytes - sum(row.bytes for row in self.rows.values())


def make_plan(profile: Profile, budget: Budget, found: Allocation, strategy: str) -> Plan:
    """The plan of an allocation, not measured yet."""
    return Plan(
        layers=found.options,
        budget=budget,
        budget_bytes=budget_bytes(budget, profile),
        strategy=strategy,
        predicted_loss=found.loss,
        predicted_bytes=found.file_bytes,
        fixed_bytes=found.fixed_bytes,
        bound=found.bound,
        gap=found.gap,
        fingerprint=profile.fingerprint,
        vector_bits=profile.template.bits,
    )


def energy_losses(profile: Profile) -> dict[str, np.ndarray]:
    """Error over the layer's energy for every option of every layer: the fraction of its output that a layer loses.

    Raw squared errors are not comparable between layers. Layers without a Hessian, or of energy 0, have losses of 0.
    Source: OBC, arXiv 2208.11580, section 6 (normalised squared error), here over the energy itself instead of the
    worst level.
    """
    return {
        name: np.array([row.error / layer.energy if layer.energy > 0 else 0.0 for row in layer.rows])
        for name, layer in profile.layers.items()
    }


def allocate(
    profile: Profile,
    budget: int,
    losses: Mapping[str, np.ndarray],
    solver: str = "exact",
) -> Allocation:
    """Choose one row per layer with the least sum of losses such that the whole file is at most `budget` bytes.

    The header's length depends a little on the choice, in a way that no solver knows. So payloads get what the leanest
    header leaves, and then less, until the file fits: more budget never makes an exact answer worse. The bound is one
    on all allocations whose payloads fit into what the header of this one leaves.
    Raises InfeasibleError, with the smallest budget that is not, where even the smallest options do not fit.
    """
    names = list(profile.layers)
    rows = [profile.layers[n].rows for n in names]
    smallest = {n: min(r, key=lambda row: row.bytes) for n, r in zip(names, rows, strict=True)}
    smallest_file = profile.template.file_bytes(smallest)
    if smallest_file > budget:
        smallest, smallest_file = _smallest(profile)
    if smallest_file > budget:
        raise infeasible(profile, budget, smallest_file)
    losses = {n: np.asarray(losses[n]) for n in names}

    def answer(payload: int) -> tuple[Solution, dict[str, Measured] | None]:
        problem = Problem(
            loss=[losses[n] for n in names],
            cost=[np.array([row.bytes for row in r], np.int64) for r in rows],
            budget=payload,
            resources=("bytes",),
            names=names,
            options=[[str(row.option) for row in r] for r in rows],
        )
        solution = solve(problem, solver)
        if not solution.found:
            return solution, None
        return solution, {n: r[int(i)] for n, r, i in zip(names, rows, solution.choice, strict=True)}

    # Payloads are tried in steps that depend on the profile alone; what lies between an answer's own payload and its
    # allowance has the same answer.
    grain = max(1, profile.template.dense_bytes >> 22)
    allowed = (budget - _leanest_header(profile)) // grain * grain
    while True:
        solution, chosen = answer(allowed)
        if chosen is None:
            loss = _total(losses, profile, smallest)
            return Allocation(smallest, loss, -math.inf, math.inf, smallest_file, budget - _header(profile, smallest))
        size = profile.template.file_bytes(chosen)
        if size <= budget:
            break
        allowed = (_payload(chosen) - 1) // grain * grain
    room = budget - _header(profile, chosen)
    bound = solution.bound if room <= allowed else answer(room)[0].bound
    loss = float(solution.loss)
    return Allocation(chosen, loss, float(bound), _gap(loss, float(bound)), size, room, solution)


def _payload(rows: Mapping[str, Measured]) -> int:
    return sum(row.bytes for row in rows.values())


def _header(profile: Profile, rows: Mapping[str, Measured]) -> int:
    return profile.template.file_bytes(rows) - _payload(rows)


def _leanest_header(profile: Profile) -> int:
    """A header's length where one name is in all layers: allocations with different names have longer ones."""
    plans = [[layer.rows[i % len(layer.rows)] for layer in profile.layers.values()] for i in (0, 1, -1)]
    return min(_header(profile, dict(zip(profile.layers, rows, strict=True))) for rows in plans)


def _gap(loss: float, bound: float) -> float:
    if loss <= bound:
        return 0.0
    return (loss - bound) / abs(bound) if math.isfinite(bound) and bound else math.inf


def _total(losses: Mapping[str, np.ndarray], profile: Profile, chosen: Mapping[str, Measured]) -> float:
    return float(sum(losses[n][profile.layers[n].rows.index(row)] for n, row in chosen.items()))


def single_options(profile: Profile, budget: int, undominated: bool = True) -> list[dict[str, Measured]]:
    """Every single-option plan that fits and that no other one beats in every layer, smallest predicted loss first.

    A single-option plan gives every layer the same option; layers that calibration never reached have their
    smallest where they lack it.
    """
    reached = [layer for layer in profile.layers.values() if layer.reached] or list(profile.layers.values())
    tables = [{row.option: row for row in layer.rows} for layer in reached]
    shared = [o for o in tables[0] if all(o in t for t in tables)]
    rest = [layer for layer in profile.layers.values() if layer not in reached]
    plans: list[dict[str, Measured]] = []
    for option in shared:
        plan = {layer.layer.name: table[option] for layer, table in zip(reached, tables, strict=True)}
        for layer in rest:
            known = {row.option: row for row in layer.rows}
            plan[layer.layer.name] = known.get(option) or min(layer.rows, key=lambda row: row.bytes)
        if sum(row.bytes for row in plan.values()) <= budget and profile.template.file_bytes(plan) <= budget:
            plans.append({name: plan[name] for name in profile.layers})
    errors = np.array(
        [[plan[layer.layer.name].error / max(layer.energy, 1e-300) for layer in reached] for plan in plans]
    )
    keep = _undominated(errors) if undominated else range(len(plans))
    order = sorted(keep, key=lambda i: (float(errors[i].sum()), i))
    return [plans[i] for i in order]


def _undominated(errors: np.ndarray) -> Sequence[int]:
    """Rows that no other row is at or below everywhere (of equal rows, the first stays)."""
    keep = []
    for i, row in enumerate(errors):
        below = (errors <= row).all(axis=1)
        below[i] = False
        equal = (errors == row).all(axis=1)
        if not (below & ~equal).any() and not (below & equal)[:i].any():
            keep.append(i)
    return keep
