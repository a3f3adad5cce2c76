"""The frontier for the page: the least sum of relative errors for any size of the file, with what is proven of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from autocompress.planning import Limits, energy_losses, problem_of, size_range, within
from autocompress.profiling import Profile
from solvers import frontier
from solvers.frontier import Frontier

__all__ = ["Tradeoff", "TradeoffPoint"]

SHOWN = 90  # points of the line
RATIOS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class TradeoffPoint:
    """The best known choice within a budget: its file's bytes, the sum of its relative errors, and what that sum of no
    choice of as many bytes can be below.
    """

    bytes: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        return (self.loss - self.bound) / self.bound if self.bound > 0.0 else 0.0


class Tradeoff:
    """Every budget at once, from a profile alone: min Σ error/energy subject to bytes ≤ budget (`solvers.frontier`).

    Between two breakpoints of the hull the left one is what there is to choose, and the line that joins them is what
    no choice can be below: both are known for any budget without another solve.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        problem = problem_of(profile, Limits(size_range(profile)[1]), energy_losses(profile), 0)
        self._line: Frontier = frontier(problem)
        self._cost = np.asarray(self._line.cost, np.float64)
        # Evenly over the sizes, as the steps at the large end are many and small.
        grid = np.geomspace(max(self._cost[0], 1.0), self._cost[-1], SHOWN)
        self._shown = np.unique(np.clip(np.searchsorted(self._cost, grid), 0, len(self._cost) - 1))
        self._fixed_shown = np.array([self._fixed(int(k)) for k in self._shown])

    @property
    def points(self) -> list[TradeoffPoint]:
        """Breakpoints by rising bytes: no choice whose payload fits beside the same header has a smaller loss."""
        found: list[TradeoffPoint] = []
        for k, fixed in zip(self._shown[::-1], self._fixed_shown[::-1], strict=True):
            size = int(self._cost[k]) + int(fixed)
            if not found or size < found[-1].bytes:  # a header may be longer than that of a better choice
                found.append(TradeoffPoint(size, float(self._line.loss[k]), float(self._line.bound[k])))
        return found[::-1]

    def at(self, size: int) -> TradeoffPoint | None:
        """The last breakpoint whose file is within `size` bytes; None where none is. The bound is that of all choices
        whose payloads fit into what the header of this one leaves.
        """
        k = self._index(size)
        if k is None:
            return None
        fixed = self._fixed(k)
        room = size - fixed  # what the header of this file leaves
        loss = float(self._line.loss[k])
        return TradeoffPoint(int(self._cost[k]) + fixed, loss, min(self.below(room), loss))

    def below(self, payload: int) -> float:
        """What the sum of relative errors of no choice with at most so many bytes of payload is below."""
        return float(np.interp(payload, self._cost, self._line.bound))

    def budgets(self) -> list[tuple[int, TradeoffPoint]]:
        """(ratio, point) at round ratios of the dense file's length, as far as files go."""
        found = ((ratio, self.at(self.profile.template.dense_bytes // ratio)) for ratio in RATIOS)
        return [(ratio, point) for ratio, point in found if point is not None and point.loss > 0.0]

    def more(self, size: int, by: int = 1000) -> tuple[float, list[str]]:
        """What `by` more bytes buy at a budget: the part of the loss that they take away at the hull's price, and the
        layers that get them, most bytes first.
        """
        k = self._index(size)
        if k is None or not self._line.loss[k] > 0.0:
            return 0.0, []
        until = min(int(np.searchsorted(self._cost, self._cost[k] + by)), len(self._cost) - 1)
        spent: Counter[str] = Counter()
        names = list(self.profile.layers)
        for step in range(k, until):
            spent[names[self._line.changed[step]]] += int(self._cost[step + 1] - self._cost[step])
        left = float(np.interp(self._cost[k] + by, self._cost, self._line.loss))
        return 1.0 - left / float(self._line.loss[k]), [name for name, _ in spent.most_common()]

    def _index(self, size: int) -> int | None:
        """The last breakpoint whose file is within `size` bytes."""
        fixed = np.interp(self._cost, self._cost[self._shown], self._fixed_shown)
        k = int(np.searchsorted(self._cost + fixed, size, side="right"))  # nearly: lengths of headers differ a little
        k = min(k, len(self._cost) - 1)
        while k >= 0 and self._cost[k] + self._fixed(k) > size:
            k -= 1
        return k if k >= 0 else None

    def _fixed(self, k: int) -> int:
        """What of a file no choice changes, for the choice at breakpoint k with its norms as that size has them."""
        chosen = self._line.choice(k)
        rows = {n: layer.rows[int(i)] for (n, layer), i in zip(self.profile.layers.items(), chosen, strict=True)}
        payload = sum(row.bytes for row in rows.values())
        size = self.profile.template.file_bytes(rows)
        return within(self.profile, size).template.file_bytes(rows) - payload
