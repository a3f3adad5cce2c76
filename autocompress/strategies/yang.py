"""Yang et al.: two knapsack projections in turn, on pretrained weights alone; and bytes as they count them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from autocompress.compressors import Measured
from autocompress.measuring import Context
from autocompress.planning import limits_of, paper_bytes, within_limits
from autocompress.profiling import Profile
from autocompress.strategies.base import Choice, chosen_plan, largest_that_fits, refused, weights_of
from autocompress.strategies.densities import SparseFamily, integer_families
from autocompress.types import Budget, Plan
from solvers import Problem, solve

__all__ = ["Projections", "Yang", "kmeans_error", "quantised_projection", "sparse_projection"]

ROUNDS = 4  # of both projections, unless widths settle before
STEPS = 24  # of the bisection for S: to a bit, in a network of a million weights
ITERATIONS, TOLERANCE = 100, 1e-3  # of k-means, as in the authors' code


class Yang:
    """Sparsities and widths from two projections in turn that minimise ‖W - V‖² under Σ_l b_l · nnz_l <= S bits.

    1. Widths given: keep the weights of the largest w² / b_l until S is spent (`sparse_projection`).
    2. Kept weights given: a width for every layer by greedy steps on the hulls of (b · nnz_l, k-means error)
       (`quantised_projection`).
    The paper alternates them with training (ADMM); here they alternate on the pretrained weights, until widths settle
    or `ROUNDS` are over, so this is its allocation without its training. Numbers of kept weights are those of the
    sparsities on offer. Started from one width for all layers; as the start decides how S is divided between more
    weights and more bits, every width on offer is tried, and the least ‖W - V‖² stays. S is the largest whose real
    file, positions and header counted, is within the budget; the paper's own count (`paper_bytes`) is in the notes.
    Source: Yang et al., CVPR 2020, arXiv 1910.05897, section 3. Needs the weights, and options such as s60w4.
    """

    needs = "weights"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        """Raises MismatchError without a context or sparse integers, InfeasibleError where not even the least fits."""
        families = integer_families(profile, "yang")
        projections = Projections(weights_of(profile, context, "yang"), families)
        least = projections.choice(0.0, min(families))
        if not within_limits(profile, limits_of(budget, profile), least):
            raise refused(profile, budget, [least], "no choice of strategy 'yang'")
        found = [
            largest_that_fits(profile, budget, partial(projections.choice, start=start), "yang", STEPS)
            for start in families
        ]
        plan = chosen_plan(profile, budget, min(found, key=projections.error), "yang")
        counted = paper_bytes(profile, plan)
        ratio = 4 * sum(layer.layer.size for layer in profile.layers.values()) / max(counted, 1)
        return plan.replace(notes=(f"the plan of yang, paper-counted: {counted} bytes ({ratio:.1f}x)",))


def sparse_projection(squares: Mapping[str, np.ndarray], bits: Mapping[str, int], budget_bits: int) -> dict[str, int]:
    """How many weights of each layer are kept if w² / b_l ranks all of them and b_l bits are spent on each until
    `budget_bits` are: the greedy answer of the 0-1 knapsack. squares: {layer: w² in rising order}.

    Equal scores are kept or left together, so up to their bits may be left over. Sums are of whole numbers.
    """

    def kept(threshold: float) -> dict[str, int]:
        return {n: s.size - int(np.searchsorted(s, threshold * bits[n])) for n, s in squares.items()}

    def spent(counts: Mapping[str, int]) -> int:
        return sum(bits[n] * count for n, count in counts.items())

    if spent(everything := {n: s.size for n, s in squares.items()}) <= budget_bits:
        return everything
    # Bisection over the floats themselves: as whole numbers, those that are not negative are in the same order.
    low, high = 0, int(np.float64(np.inf).view(np.int64))
    while high - low > 1:
        middle = (low + high) // 2
        if spent(kept(float(np.int64(middle).view(np.float64)))) <= budget_bits:
            high = middle
        else:
            low = middle
    return kept(float(np.int64(high).view(np.float64)))


def quantised_projection(
    kept: Mapping[str, int], errors: Mapping[str, Mapping[int, float]], budget_bits: int
) -> dict[str, int]:
    """A width for each layer: from the smallest, greedy steps by error saved per bit while Σ b · nnz <= `budget_bits`;
    the smallest everywhere where those cost more. errors: {layer: {width: error of the kept weights}}.
    """
    widths = {name: sorted(each) for name, each in errors.items()}
    problem = Problem(
        loss=[np.array([errors[n][b] for b in widths[n]]) for n in widths],
        cost=[np.array([[b * kept[n]] for b in widths[n]], np.int64) for n in widths],
        budget=np.array([budget_bits], np.int64),
    )
    solution = solve(problem, "greedy")
    if not solution.found:
        return {n: each[0] for n, each in widths.items()}
    return {n: widths[n][int(i)] for n, i in zip(widths, solution.choice, strict=True)}


def kmeans_error(values: np.ndarray, bits: int) -> float:
    """Squared error of values (n,) in rising order on a codebook of 0 and 2^bits other entries, by k-means.

    Entries start evenly between the least and the largest value and become means of what is nearest to them, 0
    excepted, until the error falls by less than a thousandth.
    """
    if not values.size:
        return 0.0
    sums = np.concatenate([[0.0], np.cumsum(values)])
    squares = np.concatenate([[0.0], np.cumsum(values**2)])
    centres, error = np.linspace(values[0], values[-1], 1 << bits), np.inf
    for _ in range(ITERATIONS):
        book = np.concatenate([centres, [0.0]])
        order = np.argsort(book, kind="stable")
        points = book[order]
        ends = np.concatenate([[0], np.searchsorted(values, 0.5 * (points[1:] + points[:-1])), [values.size]])
        count, total = np.diff(ends), np.diff(sums[ends])
        now = float((np.diff(squares[ends]) - 2.0 * points * total + count * points**2).sum())
        if error - now <= TOLERANCE * now:
            return max(min(now, error), 0.0)
        error = now
        free = order < centres.size
        filled = free & (count > 0)
        centres[order[filled]] = total[filled] / count[filled]
    return error


class Projections:
    """Both projections of a network's weights, on the sparsities and widths that a profile offers.

    weights: {layer: of any shape}, of the layers that take part; families: {width: its sparse options}.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], families: Mapping[int, SparseFamily]) -> None:
        self.families = families
        self.weights = {n: np.sort(w, axis=None) for n, w in weights.items()}
        self.squares = {n: np.sort(w**2, axis=None) for n, w in weights.items()}
        self._errors: dict[tuple[str, int, int], float] = {}

    def choice(self, t: float, start: int) -> dict[str, Measured]:
        """The row of every layer for S = t times the bits of all weights at the largest width."""
        budget_bits = round(t * max(self.families) * sum(s.size for s in self.squares.values()))
        bits, before = dict.fromkeys(self.weights, start), dict[str, int]()
        for _ in range(ROUNDS):
            if bits == before:
                break
            counts = sparse_projection(self.squares, bits, budget_bits)
            kept = {n: self._kept(n, self._nearest(n, counts[n], bits[n])) for n in bits}
            errors = {n: {b: self._error(n, kept[n], b) for b in self.families} for n in bits}
            before, bits = bits, quantised_projection(kept, errors, budget_bits)
        rest = next(iter(self.families.values())).rows
        return {n: self._nearest(n, counts[n], bits[n]) if n in bits else rest[n][0] for n in rest}

    def error(self, rows: Choice) -> float:
        """‖W - V‖² of a choice: what is pruned, and what k-means leaves of the rest."""
        total = 0.0
        for name, squares in self.squares.items():
            kept = self._kept(name, rows[name])
            total += float(squares[: squares.size - kept].sum()) + self._error(name, kept, rows[name].option.bits or 0)
        return total

    def _nearest(self, name: str, kept: int, bits: int) -> Measured:
        return self.families[bits].nearest_row(name, kept / self.squares[name].size)

    def _kept(self, name: str, row: Measured) -> int:
        return round(self.squares[name].size * (1.0 - row.option.sparsity / 100.0))

    def _error(self, name: str, kept: int, bits: int) -> float:
        key = (name, kept, bits)
        if key not in self._errors:
            weights, squares = self.weights[name], self.squares[name]
            least = np.sqrt(squares[-kept]) if kept else np.inf
            low, high = np.searchsorted(weights, -least, "right"), np.searchsorted(weights, least)
            self._errors[key] = kmeans_error(np.concatenate([weights[:low], weights[high:]]), bits)
        return self._errors[key]
