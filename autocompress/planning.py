"""From a profile and a budget to an allocation: exact file sizes, a `solvers.Problem`, and the choice with its
certificate.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np

from autocompress import costs
from autocompress.compressors import Measured
from autocompress.coupling import is_coupled, solve_layers
from autocompress.errors import BudgetError, InfeasibleError, MismatchError
from autocompress.profiling import LayerProfile, Profile
from autocompress.records import LEAST_BITS, Template, vector_bits
from autocompress.storage.bits import least_bytes as least_payload
from autocompress.types import MIXED_WIDTHS, RUNNING_COSTS, Budget, Option, Plan, exact
from solvers import SOLVERS, Problem, Solution, solve

__all__ = [
    "Allocation",
    "Limits",
    "allocate",
    "budget_bytes",
    "coarsest",
    "cost_facts",
    "dense_cost",
    "energy_losses",
    "fixed_cost",
    "infeasible",
    "keeps_limits",
    "least_bytes",
    "limit_bytes",
    "limits_of",
    "make_plan",
    "paper_bytes",
    "problem",
    "problem_of",
    "relative_error",
    "relative_gap",
    "row_costs",
    "running_cost",
    "single_options",
    "size_range",
    "within",
    "within_limits",
]

SHAPE_BYTES = 8  # what narrower shapes may save of a layer's part of the compressed header, at most
ADVICE_SECONDS = 10.0  # for what a refusal says would do: sums of costs alone can be as hard as any
NAME_BYTES = 4  # what an option's name may save in the compressed header, at most
NANOSECONDS = 10**6  # of a millisecond: solvers add up whole numbers, so that no limit is passed by a rounding
WORDS = {"macs": "{:,} MACs", "bops": "{:,} BOPs", "latency_ms": "{:.6f} ms"}


@dataclass(frozen=True)
class Limits:
    """What a file and a forward pass may cost, all at once: `bytes`, and by name of a running cost its limit (MACs,
    BOPs, ms).
    """

    bytes: int
    running: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Limits | int) -> Limits:
        return value if isinstance(value, Limits) else cls(value)

    def without(self, name: str) -> Limits:
        return Limits(self.bytes, {n: limit for n, limit in self.running.items() if n != name})

    def __str__(self) -> str:
        return " and ".join([f"{self.bytes:,} bytes", *(_amount(n, limit) for n, limit in self.running.items())])


def limits_of(budget: Budget, profile: Profile) -> Limits:
    """A budget in the units of its profile, percentages taken of the dense model's costs.

    Raises BudgetError where milliseconds are limited and the profile has no table of them.
    """
    running = {}
    for name in RUNNING_COSTS:
        if getattr(budget, name) is not None:
            limit = budget.limit(name, dense_cost(profile, name))
            assert limit is not None
            running[name] = limit
    return Limits(budget_bytes(budget, profile), running)


def budget_bytes(budget: Budget, profile: Profile) -> int:
    """The limit on the file in bytes; where the budget has none, the length of the largest file there is."""
    limit = limit_bytes(budget, profile.template)
    return size_range(profile)[1] if limit is None else limit


def limit_bytes(budget: Budget, template: Template) -> int | None:
    """The limit on the file before there is a profile; None where the budget has none."""
    return budget.bytes(template.dense_bytes, template.parameters)


def row_costs(profile: Profile, name: str) -> dict[str, np.ndarray]:
    """What every option of every layer takes of a running cost, int64: MACs, BOPs, nanoseconds over the dense model's.

    Raises BudgetError where there is no table of times.
    """
    cost = _row_cost(profile, name)
    return {n: np.array([cost(n, row) for row in x.rows], np.int64) for n, x in profile.layers.items()}


def _row_cost(profile: Profile, name: str) -> Callable[[str, Measured], int]:
    """What a row of a layer takes of a running cost, in the units of `row_costs`."""
    if name == "macs":
        return profile.macs
    if name == "bops":
        return profile.bops
    if profile.latency is None:
        raise BudgetError(
            "a budget in milliseconds needs a measured table of times: compress makes one, plan with --task too, "
            "and in Python timing.timed(profile, model, example)"
        )
    extra = profile.latency.extra_ms
    return lambda layer, row: math.ceil(NANOSECONDS * extra[layer][row.option])


def fixed_cost(profile: Profile, name: str) -> int:
    """What of a running cost no choice changes, in the units of `row_costs`."""
    return math.ceil(NANOSECONDS * profile.latency.dense_ms) if name == "latency_ms" and profile.latency else 0


def dense_cost(profile: Profile, name: str) -> float:
    """What the dense model takes of a running cost, in the budget's unit."""
    if name == "macs":
        return sum(profile.macs(n) for n in profile.layers)
    if name == "bops":
        return sum(costs.bops(profile.macs(n)) for n in profile.layers)
    row_costs(profile, name)
    assert profile.latency is not None
    return profile.latency.dense_ms


def running_cost(profile: Profile, name: str, layers: Mapping[str, Option]) -> float:
    """What a choice of options takes of a running cost, in the budget's unit, rounded up."""
    cost = _total_of(profile, name)(layers)
    return cost / NANOSECONDS if name == "latency_ms" else cost


def cost_facts(profile: Profile, budget: Budget, layers: Mapping[str, Option]) -> dict[str, dict[str, float | None]]:
    """By running cost: what a choice of options takes (`predicted`), what the dense model takes, and the limit, if any;
    milliseconds only where the profile has a table of them.
    """
    found = {}
    for name in RUNNING_COSTS:
        if name != "latency_ms" or profile.latency is not None:
            dense = dense_cost(profile, name)
            taken = running_cost(profile, name, layers)
            found[name] = {"predicted": taken, "dense": dense, "limit": budget.limit(name, dense)}
    return found


def _total_of(profile: Profile, name: str) -> Callable[[Mapping[str, Option]], int]:
    """What choices of options take of a running cost, in the units of `row_costs`."""
    cost, fixed = _row_cost(profile, name), fixed_cost(profile, name)
    # There are no times of narrower layers.
    narrowed = name != "latency_ms"
    table = {
        n: {row.option: cost(n, row) for row in (*x.rows, *(x.narrowed if narrowed else ()))}
        for n, x in profile.layers.items()
    }
    return lambda layers: fixed + sum(table[n][option] for n, option in layers.items())


def _scaled(name: str, limit: float) -> int:
    """A limit in the units of `row_costs`, rounded down from the number as it was written."""
    return math.floor(exact(limit) * (NANOSECONDS if name == "latency_ms" else 1))


def _amount(name: str, value: float) -> str:
    """A running cost for people; rounded so that a limit of what is said can be met."""
    return WORDS[name].format(value if name == "latency_ms" else math.ceil(value))


def paper_bytes(profile: Profile, plan: Plan) -> int:
    """Bytes of a plan as papers count them: the codes of all layers, rounded up; positions, steps, biases, norms and
    the header are free.

    Σ b · nnz / 8, b the bits of a code (32 of a float32) and nnz the weights that are not zero. Codes of entropy-coded
    options count by what holds the largest of them; rows that have widths of their own by those. Of a codebook of K
    words of v weights, N weights count as N / v indices of log2 K bits and K v numbers of b bits.
    Sources: Yang et al., arXiv 1910.05897; Kernel Quantization, arXiv 2003.05148.
    """
    profile = profile.with_realised(plan)
    return math.ceil(sum(_paper_bits(profile.layers[n], profile.layers[n].row(o)) for n, o in plan.layers.items()) / 8)


def _paper_bits(layer: LayerProfile, row: Measured) -> float:
    option, weights = row.option, layer.layer.size if row.multiplied is None else row.multiplied
    if option.words:
        length = option.vector or math.prod(layer.layer.stored_shape[2:])  # of kernel quantisation a whole kernel
        return weights / length * math.log2(option.words) + option.words * length * (option.bits or row.width)
    return row.bits if row.row_bits is not None else row.nonzero * (option.bits or row.width)


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
    """Lengths of the smallest and of the largest file that the profile's options make; where widths are open, of the
    whole network and of the narrowest.
    """
    if is_coupled(profile):
        sizes = list(size_range(profile.whole()))
        with contextlib.suppress(MismatchError):  # where a layer has no option that is narrow on both sides
            sizes += size_range(profile.at({group: levels[-1] for group, levels in profile.levels().items()}))
        return min(sizes), max(sizes)
    ends = [
        {name: end(layer.rows, key=lambda row: row.bytes) for name, layer in profile.layers.items()}
        for end in (min, max)
    ]
    return profile.template.file_bytes(ends[0]), profile.template.file_bytes(ends[1])


def coarsest(options: Sequence[Option]) -> list[Option]:
    """The options, of any sparsity, that no other one is coarser than: the smallest file is made of these.

    Of low-rank ones and codebooks, which not every layer has, one of fewer channels or words is coarser, and what they
    leave; they leave all others in, as do codebooks of other vectors.
    """

    def kind(o: Option) -> tuple[object, ...]:
        return o.rank is None, o.residual and kind(o.residual), o.words is None, o.vector

    def facts(o: Option) -> tuple[float, ...]:
        bits = 16 if o.half else o.bits or 32
        if o.rank:
            return (-bits, -o.rank * (o.groups or 1), *(facts(o.residual) if o.residual else ()))
        if o.words:
            return (-bits, -o.words, o.price)
        shares = accumulate(o.mix or (0.0,) * len(MIXED_WIDTHS))
        return (o.step or 0.0, o.lam or 0.0, -(o.bits or 32), *shares)

    def coarser(a: Option, b: Option) -> bool:
        if kind(a) != kind(b):
            return False
        of_a, of_b = facts(a), facts(b)
        return of_a != of_b and all(x >= y for x, y in zip(of_a, of_b, strict=True))

    given = [o for o in dict.fromkeys(options) if o.width is None]  # narrower layers only come with a structure
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


def relative_error(profile: Profile, layers: Mapping[str, Option]) -> float:
    """The sum over layers of error over energy of a choice of options, of layers that are narrower too."""
    rows = [(layer, layer.row(layers[name])) for name, layer in profile.layers.items()]
    return float(sum(row.error / layer.energy for layer, row in rows if layer.energy > 0))


def allocate(
    profile: Profile,
    budget: Limits | int,
    losses: Mapping[str, np.ndarray],
    solver: str = "exact",
    objective: str = "sum",
) -> Allocation:
    """Choose one row per layer with the least sum of losses (objective "max": the least largest loss) such that the
    whole file is at most `budget` bytes, and running costs are within their limits.

    The header's length depends a little on the choice, in a way that no solver knows. So payloads get what the leanest
    header leaves, and then less, until the file fits: more budget never makes an exact answer worse. The bound is one
    on all allocations whose payloads fit into what the header of this one leaves. Where running costs are limited too,
    a solver that takes a single resource is replaced by `milp`, and the answer's `solver` says so.
    Raises InfeasibleError, with the smallest budget that is not, where even the smallest options do not fit.
    """
    limits = Limits.of(budget)
    if is_coupled(profile):
        if objective != "sum":
            raise BudgetError("narrower layers are chosen for the sum of losses; take a structure (Profile.at) first")
        return _allocate_coupled(profile, limits, losses)
    found = _allocate(profile, limits, losses, solver, objective)
    if found is None:
        raise _infeasible_together(profile, limits)
    return found


def _allocate(
    profile: Profile,
    limits: Limits,
    losses: Mapping[str, np.ndarray],
    solver: str = "exact",
    objective: str = "sum",
) -> Allocation | None:
    """The same; None where limits that can be met one by one cannot be met at once, or running costs not at all."""
    names = list(profile.layers)
    rows = [profile.layers[n].rows for n in names]
    smallest = {n: min(r, key=lambda row: row.bytes) for n, r in zip(names, rows, strict=True)}
    smallest_file = profile.template.file_bytes(smallest)
    if smallest_file > limits.bytes:
        smallest, smallest_file = _smallest(profile)
    if smallest_file > limits.bytes:
        raise infeasible(profile, limits.bytes, smallest_file)
    losses = {n: np.asarray(losses[n]) for n in names}
    running = limits.running

    def answer(payload: int) -> tuple[Solution, dict[str, Measured] | None]:
        problem = replace(problem_of(profile, limits, losses, payload), objective=objective)
        solution = solve(problem, "milp" if running and SOLVERS[solver].why_not(problem) else solver)
        if not solution.found:
            return solution, None
        return solution, {n: r[int(i)] for n, r, i in zip(names, rows, solution.choice, strict=True)}

    # Payloads are tried in steps that depend on the profile alone; what lies between an answer's own payload and its
    # allowance has the same answer.
    grain = max(1, profile.template.dense_bytes >> 22)
    allowed = (limits.bytes - _leanest_header(profile)) // grain * grain
    while True:
        solution, chosen = answer(allowed)
        if chosen is None:
            if running:
                return None
            loss = _total(losses, profile, smallest, objective)
            room = limits.bytes - _header(profile, smallest)
            return Allocation(smallest, loss, -math.inf, math.inf, smallest_file, room)
        size = profile.template.file_bytes(chosen)
        if size <= limits.bytes:
            break
        allowed = (_payload(chosen) - 1) // grain * grain
    room = limits.bytes - _header(profile, chosen)
    bound = solution.bound if room <= allowed else answer(room)[0].bound
    loss = float(solution.loss)
    return Allocation(chosen, loss, float(bound), relative_gap(loss, float(bound)), size, room, solution)


def _allocate_coupled(profile: Profile, limits: Limits, losses: Mapping[str, np.ndarray]) -> Allocation:
    """`allocate` where layers can be narrower: those that share channels agree on them (`coupling.solve_layers`).

    Payloads get what the header of the whole network leaves. A narrower network's is shorter by the norms and biases
    that go, which the solver knows, and by a few digits of shapes, which the bound has room for.
    """
    names, template = list(profile.layers), profile.template
    allowed = limits.bytes - _leanest_header(profile.whole()) + SHAPE_BYTES * len(names)
    while True:
        solution = solve_layers(profile, problem_of(profile, limits, losses, allowed))
        if not solution.found:
            rows, size = _smallest_coupled(profile)
            if size > limits.bytes or not _keeps(profile, limits)({n: row.option for n, row in rows.items()}):
                raise _infeasible_coupled(profile, limits)
            loss = _total(losses, profile, rows, "sum")
            return Allocation(rows, loss, -math.inf, math.inf, size, limits.bytes - _header(profile, rows))
        chosen = {n: profile.layers[n].rows[int(i)] for n, i in zip(names, solution.choice, strict=True)}
        size = template.file_bytes(chosen)
        if size <= limits.bytes:
            break
        allowed = min(allowed, int(solution.cost[0])) - (size - limits.bytes)
    # What payloads beside this file's header, norms and biases could take: none of them is better than the bound.
    room = limits.bytes - (size - int(solution.cost[0]))
    if room > allowed:
        solution = replace(solution, bound=solve_layers(profile, problem_of(profile, limits, losses, room)).bound)
    loss, bound = float(solution.loss), min(float(solution.bound), float(solution.loss))
    return Allocation(
        chosen, loss, bound, relative_gap(loss, bound), size, limits.bytes - _header(profile, chosen), solution
    )


def _smallest_coupled(profile: Profile) -> tuple[dict[str, Measured], int]:
    """The smaller of the smallest files of the whole network and of the narrowest: its rows and its length."""
    found = [_smallest(profile.whole())]
    with contextlib.suppress(MismatchError):  # where a layer has no option that is narrow on both sides
        found.append(_smallest(profile.at({group: levels[-1] for group, levels in profile.levels().items()})))
    return min(found, key=lambda pair: pair[1])


def _infeasible_coupled(profile: Profile, limits: Limits) -> InfeasibleError:
    """The refusal of limits that no network, narrower ones included, keeps; each limit that would do if it alone gave
    way, and how far.
    """
    texts, smallest = [], size_range(profile)[0]
    for name in ("bytes", *limits.running):
        free = Limits(1 << 61, limits.running) if name == "bytes" else limits.without(name)
        if name == "bytes":
            least = {n: np.array([float(row.bytes) for row in x.rows]) for n, x in profile.layers.items()}
        else:
            least = {n: cost.astype(np.float64) for n, cost in row_costs(profile, name).items()}
        room = free.bytes - _leanest_header(profile.whole())
        found = solve_layers(
            profile, problem_of(profile, free, least, room), smallest=name == "bytes", time_limit=ADVICE_SECONDS
        )
        if found.found:
            rows = {n: x.rows[int(i)] for (n, x), i in zip(profile.layers.items(), found.choice, strict=True)}
            if name == "bytes":
                smallest = profile.template.file_bytes(rows)
                if not limits.running:
                    smallest = min(smallest, _smallest_coupled(profile)[1])  # by a leaner header
                texts.append(f"{smallest:,} bytes")
            else:
                texts.append(_amount(name, running_cost(profile, name, {n: row.option for n, row in rows.items()})))
    advice = (
        f"with the other limits as they are, {' or '.join(texts)} would do" if texts else "more than one has to give"
    )
    return InfeasibleError(f"no allocation is within {limits}, narrower layers included: {advice}", smallest)


def problem(profile: Profile, budget: Budget | str | int, losses: Mapping[str, np.ndarray] | None = None) -> Problem:
    """The allocation within a budget as `solvers` takes it, to be solved or studied without making a plan.

    One group per layer, in the order of the profile, and in it one option per row: its loss, (options,) per layer, by
    default its error over the layer's energy, and its payload in bytes. The limit is what the header, the norms and the
    biases of the best file leave of the budget; costs that the budget limits beside bytes are further resources
    (`row_costs`). Raises BudgetError for a budget that is not one, InfeasibleError as `allocate` does.
    """
    wanted = Budget.of(budget)
    profile = within(profile, budget_bytes(wanted, profile))
    limits = limits_of(wanted, profile)
    losses = energy_losses(profile) if losses is None else losses
    return problem_of(profile, limits, losses, allocate(profile, limits, losses).payload_bytes)


def problem_of(profile: Profile, limits: Limits, losses: Mapping[str, np.ndarray], payload: int) -> Problem:
    """The problem that solvers see: one group per layer, losses (options,), costs in bytes of payload and, where they
    are limited, in the units of `row_costs`; `payload` bounds the bytes.
    """
    names = list(profile.layers)
    rows = [profile.layers[n].rows for n in names]
    running = {name: row_costs(profile, name) for name in limits.running}
    rest = [_scaled(name, limit) - fixed_cost(profile, name) for name, limit in limits.running.items()]
    sizes = [np.array([row.bytes for row in r], np.int64) for r in rows]
    return Problem(
        loss=[np.asarray(losses[n]) for n in names],
        cost=[
            np.stack([size, *(each[n] for each in running.values())], 1) for n, size in zip(names, sizes, strict=True)
        ],
        budget=np.array([payload, *rest], np.int64),
        resources=("bytes", *running),
        names=names,
        options=[[str(row.option) for row in r] for r in rows],
    )


def _infeasible_together(profile: Profile, limits: Limits) -> InfeasibleError:
    """The refusal of limits that no choice keeps at once. It names the running costs that are too tight by themselves,
    and the least that they can be; or else each limit that would do if it alone gave way, and how far.
    """
    free = Limits(size_range(profile)[1])
    alone = {name: value for name in limits.running if (value := _least(profile, name, free)) is not None}
    together = {n: value for n in ("bytes", *limits.running) if (value := _least(profile, n, limits)) is not None}
    tight = [name for name, value in alone.items() if value > limits.running[name]]
    smallest = int(together.get("bytes", size_range(profile)[0]))
    if tight:
        which = " and ".join(_amount(n, limits.running[n]) for n in tight)
        texts = [_amount(n, together.get(n, alone[n])) for n in tight]
        note = " (zeros count as MACs; limit BOPs for a cost that leaves them out)" if "macs" in tight else ""
        return InfeasibleError(
            f"no allocation is within {which}: the least possible is {' and '.join(texts)}{note}", smallest
        )
    ways = [f"{int(value):,} bytes" if n == "bytes" else _amount(n, value) for n, value in together.items()]
    advice = f"with the other limits as they are, {' or '.join(ways)} would do" if ways else "more than one has to give"
    return InfeasibleError(f"no allocation is within {limits}: {advice}", smallest)


def _least(profile: Profile, name: str, limits: Limits) -> float | None:
    """The least of one cost, in the budget's unit, that some choice within the other limits has; None for no choice."""
    if name == "bytes":
        losses = {n: np.array([float(row.bytes) for row in x.rows]) for n, x in profile.layers.items()}
        found = _allocate(profile, Limits(size_range(profile)[1], limits.running), losses)
        return None if found is None else found.file_bytes
    losses = {n: cost.astype(np.float64) for n, cost in row_costs(profile, name).items()}
    found = _allocate(profile, limits.without(name), losses)
    return None if found is None else running_cost(profile, name, found.options)


def _payload(rows: Mapping[str, Measured]) -> int:
    return sum(row.bytes for row in rows.values())


def _header(profile: Profile, rows: Mapping[str, Measured]) -> int:
    return profile.template.file_bytes(rows) - _payload(rows)


def _leanest_header(profile: Profile) -> int:
    """A header's length where one name is in all layers: allocations with different names have longer ones."""
    plans = [[layer.rows[i % len(layer.rows)] for layer in profile.layers.values()] for i in (0, 1, -1)]
    return min(_header(profile, dict(zip(profile.layers, rows, strict=True))) for rows in plans)


def relative_gap(loss: float, bound: float) -> float:
    """(loss - bound) / |bound|: 0 where the loss is at its bound, inf where that says nothing."""
    if loss <= bound:
        return 0.0
    return (loss - bound) / abs(bound) if math.isfinite(bound) and bound else math.inf


def _total(losses: Mapping[str, np.ndarray], profile: Profile, chosen: Mapping[str, Measured], objective: str) -> float:
    each = [losses[n][profile.layers[n].rows.index(row)] for n, row in chosen.items()]
    return float(max(each) if objective == "max" else sum(each))


def single_options(profile: Profile, budget: Limits | int, undominated: bool = True) -> list[dict[str, Measured]]:
    """Every single-option plan that fits and that no other one beats in every layer, smallest predicted loss first.

    A single-option plan gives every layer the same option; layers that calibration never reached have their
    smallest where they lack it.
    """
    reached = [layer for layer in profile.layers.values() if layer.reached] or list(profile.layers.values())
    # Of a narrower network, layers have the same option if it is the same on what stays of them.
    tables = [{row.option.inner: row for row in layer.rows} for layer in reached]
    shared = [o for o in tables[0] if all(o in t for t in tables)]
    rest = [layer for layer in profile.layers.values() if layer not in reached]
    limits = Limits.of(budget)
    keeps = _keeps(profile, limits)
    plans: list[dict[str, Measured]] = []
    for option in shared:
        plan = {layer.layer.name: table[option] for layer, table in zip(reached, tables, strict=True)}
        for layer in rest:
            known = {row.option.inner: row for row in layer.rows}
            plan[layer.layer.name] = known.get(option) or min(layer.rows, key=lambda row: row.bytes)
        fits = _payload(plan) <= limits.bytes and profile.template.file_bytes(plan) <= limits.bytes
        if fits and keeps({n: row.option for n, row in plan.items()}):
            plans.append({name: plan[name] for name in profile.layers})
    errors = np.array(
        [[plan[layer.layer.name].error / max(layer.energy, 1e-300) for layer in reached] for plan in plans]
    )
    keep = _undominated(errors) if undominated else range(len(plans))
    order = sorted(keep, key=lambda i: (float(errors[i].sum()), i))
    return [plans[i] for i in order]


def within_limits(profile: Profile, limits: Limits | int, rows: Mapping[str, Measured]) -> bool:
    """Whether the file of a choice, and what it takes to run, are within the limits."""
    return keeps_limits(profile, limits)(rows)


def keeps_limits(profile: Profile, limits: Limits | int) -> Callable[[Mapping[str, Measured]], bool]:
    """`within_limits` for many choices: running costs are looked up once."""
    limits = Limits.of(limits)
    keeps, length = _keeps(profile, limits), limits.bytes

    def both(rows: Mapping[str, Measured]) -> bool:
        fits = _payload(rows) <= length and profile.template.file_bytes(rows) <= length
        return fits and keeps({n: row.option for n, row in rows.items()})

    return both


def _keeps(profile: Profile, limits: Limits) -> Callable[[Mapping[str, Option]], bool]:
    """Whether a choice of options is within the limits on running costs."""
    totals = {name: (_total_of(profile, name), _scaled(name, limit)) for name, limit in limits.running.items()}
    return lambda layers: all(total(layers) <= limit for total, limit in totals.values())


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
