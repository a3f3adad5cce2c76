"""Generated problems with known optima, from the shapes that occur and the kinds that break solvers.

`curves` and `surfaces` look like the error curves of layers; the classical families are those of Kellerer, Pferschy and
Pisinger, Knapsack Problems (2004), chapter 11; `planted` ones know their optimum at any size. `suite` is what every
solver is tested on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from solvers.problem import Array, FloatArray, IntArray, Problem, ProblemError


@dataclass(frozen=True, eq=False)
class Instance:
    """A named problem; `optimum` is its least loss (inf where infeasible), or None where only solvers can tell."""

    name: str
    problem: Problem
    optimum: float | None = None


def brute_force(problem: Problem, most: int = 200_000) -> tuple[float, IntArray | None]:
    """The least loss of a small problem and its first choice, by trying all; (inf, None) where none is within the
    limits.

    Raises ProblemError where there are more than `most` choices.
    """
    fixed = problem.fixed or {}
    ways = [[fixed[g]] if g in fixed else range(len(a)) for g, a in enumerate(problem.loss)]
    count = math.prod(len(w) for w in ways)
    if count > most:
        raise ProblemError(f"{count} choices are too many to try; at most {most} are")
    best: tuple[float, IntArray | None] = math.inf, None
    for combination in itertools.product(*ways):
        choice = np.array(combination)
        loss = problem.total_loss(choice)
        if loss < best[0] and problem.feasible(choice):
            best = loss, choice
    return best


def between(loss: list[FloatArray], cost: list[Array], fraction: float | Array) -> Array:
    """Budgets (R,) that part of the way from the cheapest choice to the one of least losses."""
    tables = [c.reshape(len(c), -1) for c in cost]
    least = np.sum([c.min(axis=0) for c in tables], axis=0)
    best = np.sum([c[a.argmin()] for a, c in zip(loss, tables, strict=True)], axis=0)
    return (least + np.asarray(fraction) * np.maximum(best - least, 0)).astype(tables[0].dtype)


def curves(groups: int, options: int, seed: int = 0, fraction: float = 0.3, noise: float = 0.2) -> Problem:
    """Error curves: bytes of layers between 1e3 and 2e6 weights, losses falling exponentially with bytes, not quite
    monotone.
    """
    rng = np.random.default_rng(seed)
    loss, cost = [], []
    for _ in range(groups):
        size = int(np.exp(rng.uniform(np.log(1e3), np.log(2e6))))
        bytes_ = np.sort(rng.integers(size // 20, 4 * size, options))
        scale = size * rng.lognormal(0, 1) * np.exp(noise * rng.standard_normal(options))
        loss.append(scale * np.exp(-5 * bytes_ / bytes_[-1]))
        cost.append(bytes_)
    return Problem(loss, cost, between(loss, cost, fraction))


def surfaces(groups: int, options: int, seed: int = 0, fraction: float = 0.3) -> Problem:
    """Sparsity × bits: error = pruned energy + 4**-bits, bytes = density × bits, as a mixed profile has them; `dense`
    is free of loss.
    """
    rng = np.random.default_rng(seed)
    loss, cost = [], []
    for _ in range(groups):
        size = int(np.exp(rng.uniform(np.log(1e3), np.log(2e6))))
        bits = rng.integers(2, 9, options).astype(np.float64)
        density = rng.uniform(0.03, 1, options)
        error = (1 - density) ** rng.uniform(2, 4) + 4.0 ** (1 - bits) * density
        bytes_ = np.ceil(size * (density * bits + 1) / 8).astype(np.int64)
        error[-1], bytes_[-1] = 0.0, 4 * size
        loss.append(error * size * rng.lognormal(0, 1))
        cost.append(bytes_)
    return Problem(loss, cost, between(loss, cost, fraction))


def correlated(groups: int, options: int, seed: int = 0, fraction: float = 0.5, spread: int = 0) -> Problem:
    """Strongly correlated: loss = 1100 · options - Σ of cost steps, all of one slope up to `spread`; the hull says
    almost nothing.
    """
    rng = np.random.default_rng(seed)
    loss, cost = [], []
    for _ in range(groups):
        steps = rng.integers(1, 1000, options)
        gains = steps + 10 + (rng.integers(0, spread + 1, options) if spread else 0)
        cost.append(np.cumsum(steps))
        loss.append((gains.sum() - np.cumsum(gains)).astype(np.float64))
    return Problem(loss, cost, between(loss, cost, fraction))


def uncorrelated(groups: int, options: int, seed: int = 0, fraction: float = 0.5) -> Problem:
    """Losses and costs independent and uniform."""
    rng = np.random.default_rng(seed)
    loss = list(rng.random((groups, options)))
    cost = list(rng.integers(1, 100_000, (groups, options)))
    return Problem(loss, cost, between(loss, cost, fraction))


def subset_sum(groups: int, options: int, seed: int = 0, fraction: float = 0.5) -> Problem:
    """Loss = constant - cost, costs even, the budget odd: the bound is never reached."""
    rng = np.random.default_rng(seed)
    cost = list(2 * rng.integers(1, 50_000, (groups, options)))
    loss = [100_000.0 - c for c in cost]
    return Problem(loss, cost, between(loss, cost, fraction) | 1)


def wide(groups: int, options: int, seed: int = 0, orders: float = 60.0, fraction: float = 0.4) -> Problem:
    """Losses over `orders` orders of magnitude, falling with the cost."""
    rng = np.random.default_rng(seed)
    exponents = np.sort(rng.uniform(-orders / 2, orders / 2, (groups, options)), axis=1)[:, ::-1]
    cost = np.sort(rng.integers(1, 100_000, (groups, options)), axis=1)
    return Problem(list(10.0**exponents), list(cost), between(list(10.0**exponents), list(cost), fraction))


def planted(groups: int, options: int, seed: int = 0, slack: int = 0) -> Instance:
    """A budget exactly on a breakpoint: losses = r - price · cost + constant with r = 0 at the planted choice, which is
    optimal.

    All numbers are integers below 2**40, so the optimum is exact. `slack` > 0 moves the budget off the breakpoint; the
    optimum is then not known.
    """
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 100_000, (groups, options))
    rest = rng.integers(1, 1_000_000, (groups, options))
    chosen = rng.integers(0, options, groups)
    rest[np.arange(groups), chosen] = 0
    loss = (rest - 3 * cost + 3 * 100_000).astype(np.float64)
    at = np.arange(groups), chosen
    budget = int(cost[at].sum()) + slack
    problem = Problem(list(loss), list(cost), budget)
    return Instance(f"planted {groups}x{options}", problem, None if slack else float(loss[at].sum()))


def several(groups: int, options: int, resources: int = 3, seed: int = 0, fraction: float = 0.35) -> Problem:
    """Curves with several resources: bytes, operations and microseconds of a kept fraction, each with noise."""
    rng = np.random.default_rng(seed)
    kept = np.linspace(0.03, 1, options)
    loss, cost = [], []
    for _ in range(groups):
        size = int(np.exp(rng.uniform(np.log(1e3), np.log(2e6))))
        columns = [4 * size * kept]
        for r in range(1, resources):
            scale = size * np.exp(rng.uniform(0, 3))
            columns.append(
                scale * np.clip(kept ** (0.5 if r % 2 == 0 else 1) * rng.normal(1, 0.15, options), 0.01, None)
            )
        loss.append(size * rng.lognormal(0, 1) * np.exp(-5 * kept + 0.2 * rng.standard_normal(options)))
        cost.append(np.stack(columns, axis=1).astype(np.int64))
    names = ("bytes", "operations", "microseconds", *(f"resource {r}" for r in range(3, resources)))
    return Problem(loss, cost, between(loss, cost, fraction + 0.05 * np.arange(resources)), names[:resources])


def lumpy(groups: int, options: int, seed: int = 0, fraction: float = 0.6) -> Problem:
    """Curves of bytes at 100 %, 75 %, 50 % and 25 % of a second cost that only their kind changes, as the MACs of a
    layer follow its rank and not its bits: the Lagrangian bound stays away from the optimum.
    """
    rng = np.random.default_rng(seed)
    base, loss, cost = curves(groups, options, seed), [], []
    for g in range(groups):
        macs = int(np.exp(rng.uniform(np.log(1e4), np.log(1e6))))
        worse = float(base.loss[g].max()) * np.array([0.0, 0.2, 0.9, 3.0]) * rng.uniform(0.3, 1.5)
        loss.append(np.concatenate([base.loss[g] * (1 - k / 8) + worse[k] for k in range(4)]))
        kinds = [np.full(options, macs - macs * k // 4) for k in range(4)]
        cost.append(np.concatenate([np.stack([base.cost[g][:, 0], kind], axis=1) for kind in kinds]))
    return Problem(loss, cost, between(loss, cost, np.array([0.4, fraction])), ("bytes", "macs"))


def paired(groups: int, options: int, seed: int = 0, fraction: float = 0.4) -> Problem:
    """Curves with pairwise terms between neighbours, of both signs and a third of the losses' size."""
    rng = np.random.default_rng(seed)
    base = curves(groups, options, seed, fraction)
    pairs = []
    for g in range(groups - 1):
        strength = 0.3 * math.sqrt(float(base.loss[g].max()) * float(base.loss[g + 1].max()))
        pairs.append((g, g + 1, strength * np.outer(rng.normal(size=options), rng.normal(size=options))))
    return Problem(base.loss, base.cost, base.budget, pairwise=pairs)


def _random(
    rng: np.random.Generator, groups: int, most: int = 6, top: int = 50
) -> tuple[list[FloatArray], list[IntArray]]:
    sizes = rng.integers(1, most + 1, groups)
    return [rng.random(n) for n in sizes], [rng.integers(0, top, n) for n in sizes]


def suite(seed: int = 0) -> list[Instance]:
    """Small problems of every kind, with their optima: what each solver of the registry is tested on."""
    rng = np.random.default_rng(seed)
    loss, cost = _random(rng, 6)
    least = sum(int(c.min()) for c in cost)
    most = sum(int(c.max()) for c in cost)
    middle = int(between(loss, cost, 0.5)[0])
    flat_loss = [np.zeros(len(a)) for a in loss]
    free = [np.zeros(len(c), np.int64) for c in cost]
    labels = [[f"w{j}" for j in range(4)]] * 6
    square, prices = list(rng.random((6, 4))), list(rng.integers(1, 50, (6, 4)))
    made: dict[str, Callable[[], Problem]] = {
        "random": lambda: Problem(loss, cost, middle),
        "tight": lambda: Problem(loss, cost, least),
        "loose": lambda: Problem(loss, cost, most),
        "unlimited": lambda: Problem(loss, cost, np.inf),
        "infeasible by one": lambda: Problem(loss, cost, least - 1),
        "zero losses": lambda: Problem(flat_loss, cost, middle),
        "zero costs": lambda: Problem(loss, free, 0),
        "zero costs, infeasible": lambda: Problem(loss, free, -1),
        "some costs zero": lambda: Problem(loss, [c * (c % 2) for c in cost], middle // 2),
        "negative losses": lambda: Problem([a - 0.7 for a in loss], cost, middle),
        "negative costs": lambda: Problem(loss, [c - 40 for c in cost], middle - 240),
        "equal options": lambda: Problem(
            [np.repeat(a[:2], 2) for a in loss], [np.repeat(c[:2], 2) for c in cost], middle
        ),
        "equal groups": lambda: Problem([square[0]] * 6, [prices[0]] * 6, int(prices[0].sum()) * 6 // 4),
        "one option": lambda: Problem([a[:1] for a in loss], [c[:1] for c in cost], most),
        "one group": lambda: Problem(square[:1], prices[:1], int(np.sort(prices[0])[2])),
        "integer losses": lambda: Problem([np.round(9 * a) for a in loss], cost, middle),
        "non-monotone": lambda: Problem([a[::-1] + 0.3 * rng.random(len(a)) for a in square], prices, 100),
        "wide": lambda: wide(5, 6, seed),
        "strongly correlated": lambda: correlated(5, 6, seed),
        "subset sum": lambda: subset_sum(6, 5, seed),
        "curves": lambda: curves(6, 6, seed),
        "surfaces": lambda: surfaces(6, 6, seed),
        "huge costs": lambda: Problem(square, [10**13 - 7 * c for c in prices], 6 * 10**13 - 7 * 150),
        "float costs": lambda: Problem(square, [c * 0.1 for c in prices], 10.0, "ms"),
        "float costs on a tie": lambda: Problem([np.array([1.0, 0.0])] * 3, [np.array([0.0, 0.1])] * 3, 0.3, "ms"),
        "tiny losses": lambda: Problem([1e-300 * a for a in square], prices, 100),
        "huge losses": lambda: Problem([1e300 * a for a in square], prices, 100),
        "labels": lambda: Problem(square, prices, 120, options=labels),
        "fixed": lambda: Problem(square, prices, 130, options=labels, fixed={0: 3, 4: 1}),
        "two resources": lambda: several(5, 5, 2, seed),
        "three resources": lambda: several(5, 5, 3, seed),
        "three resources, one unlimited": lambda: Problem(
            (p := several(5, 5, 3, seed)).loss, p.cost, [float(p.budget[0]), np.inf, float(p.budget[2])], p.resources
        ),
        "resources at odds": lambda: Problem(
            [np.zeros(2)] * 3, [np.array([[0, 1], [1, 0]])] * 3, [1, 1], ("bytes", "operations")
        ),
        "bytes and ms": lambda: Problem(
            square, [np.stack([c, 0.1 * c[::-1]], axis=1) for c in prices], [150, 18.0], ("bytes", "ms")
        ),
        "lower bound": lambda: Problem(square, prices, 130, lower=120),
        "pairwise": lambda: paired(4, 4, seed),
        "pairwise, two resources": lambda: Problem(
            (p := several(4, 4, 2, seed)).loss,
            p.cost,
            p.budget,
            p.resources,
            pairwise=[(0, 2, 1e4 * rng.normal(size=(4, 4)))],
        ),
        "worst error": lambda: Problem(square, prices, 110, objective="max"),
        "worst error, two resources": lambda: Problem(
            (p := several(5, 5, 2, seed)).loss, p.cost, p.budget, p.resources, objective="max"
        ),
    }
    found = [(name, make()) for name, make in made.items()]
    small = [Instance(name, problem, brute_force(problem)[0]) for name, problem in found]
    return [*small, planted(5, 6, seed)]
