"""ALDS: ranks and groups of channels in turns: the ranks of all layers for a fixed number of groups in each, then the
groups of each layer for its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.compressors import Measured
from autocompress.errors import OptionError
from autocompress.measuring import Context
from autocompress.planning import keeps_limits, limits_of
from autocompress.profiling import Profile
from autocompress.strategies.base import Choice, weights_of
from autocompress.strategies.ranks import Ladder, RankFamily, best_of_families, rank_families
from autocompress.types import Budget, Plan

__all__ = ["BOUNDS", "Alds", "least_worst", "local_groups", "relative_error"]

BOUNDS = ("code", "paper", "norm")
STARTS = (3, 5, 7, 9)  # groups of the first seeds, the nearest that there is in each layer; the rest are drawn


def relative_error(weight: np.ndarray, groups: int, rank: int, bound: str = "code") -> float:
    """Relative error in the operator norm of a weight (f, d) cut to `rank` in each of `groups` runs of its columns.

    σ_ij the singular values of run i, σ_1 the largest of the whole weight:
    "paper"  √k max_i σ_i,j+1 / σ_1     theorem 1: never below the error
    "code"   max_i σ_i,j+1 / σ_1        what the authors' code takes: never above it
    "norm"   the error itself, the root of the largest eigenvalue of Σ_i U_i S²_>j U_iᵀ over σ_1
    Source: ALDS, arXiv 2107.11442, theorem 1, and torchprune.
    """
    return _Spectra(weight).error(groups, rank, bound)


class _Spectra:
    """Singular values, and vectors where they are asked for, of a weight (f, d) cut into runs; each found once."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight
        self.largest = float(np.linalg.norm(weight, 2)) if weight.size else 0.0
        self._values: dict[int, np.ndarray] = {}
        self._parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def error(self, groups: int, rank: int, bound: str) -> float:
        if self.largest == 0.0:
            return 0.0
        if bound == "norm":
            left, values = self._vectors(groups)
            scaled = np.concatenate(list(left[:, :, rank:] * values[:, None, rank:]), axis=1)
            return float(np.linalg.norm(scaled, 2)) / self.largest if scaled.size else 0.0
        if groups not in self._values:
            self._values[groups] = np.linalg.svd(self._runs(groups), compute_uv=False)
        values = self._values[groups]
        worst = float(values[:, rank].max()) if rank < values.shape[1] else 0.0
        return worst / self.largest * (groups**0.5 if bound == "paper" else 1.0)

    def _runs(self, groups: int) -> np.ndarray:
        return self.weight.reshape(len(self.weight), groups, -1).transpose(1, 0, 2)

    def _vectors(self, groups: int) -> tuple[np.ndarray, np.ndarray]:
        if groups not in self._parts:
            left, values, _ = np.linalg.svd(self._runs(groups), full_matrices=False)
            self._parts[groups] = left, values
        return self._parts[groups]


@dataclass(frozen=True)
class _Rung:
    """A row that a layer may have, and its relative error."""

    row: Measured
    error: float


class Alds:
    """Least largest relative error of a layer in the operator norm, over ranks and groups of channels.

    In turns: for fixed groups k of every layer the least ε whose rows fit, j = the least rank of error ≤ ε (the global
    step, exact here: ε is one of the errors there are); then, for the bytes that each layer has now, the k of least
    error (the local step). `turns` of both from each of `seeds` starts: k near 3, 5, 7 and 9, then drawn from the seed
    of the context; the best stays. Neither step makes the largest error worse. Ranks and groups are those that the
    profile offers, costs are bytes of the file, and running costs hold as well. bound: see `relative_error`.
    Source: ALDS, arXiv 2107.11442, algorithm 1; where its code differs (ranks off by one in the local step, budgets
    that are met to half a percent), this does not follow. Raises MismatchError without a context or low-rank options.
    """

    needs = "weights"

    def __init__(self, bound: str = "code", seeds: int = 15, turns: int = 4) -> None:
        if bound not in BOUNDS:
            raise OptionError(f"there is no bound {bound!r}; there are {', '.join(BOUNDS)}")
        self.bound, self.seeds, self.turns = bound, seeds, turns
        self.name = "alds" if bound == "code" else f"alds_{bound}"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        rank_families(profile, self.name)  # before the work
        spectra = {n: _Spectra(w[0]) for n, w in weights_of(profile, context, self.name).items() if len(w) == 1}
        seed = 0 if context is None else context.seed
        return best_of_families(
            profile,
            budget,
            self.name,
            smallest_rows,
            lambda family: self._search(profile, budget, self._rungs(family, spectra), seed),
        )

    def _rungs(self, family: RankFamily, spectra: Mapping[str, _Spectra]) -> dict[str, dict[int, list[_Rung]]]:
        """By layer and number of groups the rows that may be chosen, ranks rising, the whole layer last."""
        return {name: self._of_layer(ladder, spectra.get(name)) for name, ladder in family.ladders.items()}

    def _of_layer(self, ladder: Ladder, spectra: _Spectra | None) -> dict[int, list[_Rung]]:
        whole = _Rung(ladder.whole, 0.0)
        if spectra is None or not ladder.rows:
            return {1: [whole]}
        return {
            groups: [
                *(_Rung(row, spectra.error(groups, row.option.rank or 0, self.bound)) for row in rows),
                whole,
            ]
            for groups, rows in ladder.rows.items()
        }

    def _search(
        self, profile: Profile, budget: Budget, rungs: Mapping[str, Mapping[int, list[_Rung]]], seed: int
    ) -> Choice:
        generator = np.random.default_rng(seed)
        fits = keeps_limits(profile, limits_of(budget, profile))
        best: tuple[float, int, Choice] | None = None
        for start in range(self.seeds):
            groups = {
                name: min(own, key=lambda k: abs(k - STARTS[start]))
                if start < len(STARTS)
                else list(own)[int(generator.integers(len(own)))]
                for name, own in rungs.items()
            }
            for _ in range(self.turns):
                fitting = {name: own[groups[name]] for name, own in rungs.items()}
                chosen = least_worst(fitting, fits)
                while chosen is None and any(groups[n] != min(own) for n, own in rungs.items()):
                    # No ranks fit with so many groups: fewer of them then, as the authors' code does.
                    groups = {
                        n: max((k for k in own if 2 * k <= groups[n]), default=min(own)) for n, own in rungs.items()
                    }
                    fitting = {name: own[groups[name]] for name, own in rungs.items()}
                    chosen = least_worst(fitting, fits)
                if chosen is None:
                    break
                worst = max(rung.error for rung in chosen.values())
                rows = {name: rung.row for name, rung in chosen.items()}
                size = sum(row.bytes for row in rows.values())
                if best is None or (worst, size) < best[:2]:
                    best = worst, size, rows
                groups = {name: local_groups(own, rows[name].bytes, groups[name]) for name, own in rungs.items()}
        if best is not None:
            return best[2]
        # Only the smallest rows fit, and these have different groups than any start came to.
        every = {name: [rung for own in each.values() for rung in own] for name, each in rungs.items()}
        return {name: min(own, key=lambda rung: rung.row.bytes).row for name, own in every.items()}


def least_worst(rungs: Mapping[str, Sequence[_Rung]], fits: Callable[[Choice], bool]) -> dict[str, _Rung] | None:
    """The least ε, one of the errors there are, at which the smallest rows of error ≤ ε fit; those rows, or None."""
    levels = np.unique([rung.error for own in rungs.values() for rung in own])
    # Below the least error of the worst layer nothing can be chosen.
    levels = levels[levels >= max(min(rung.error for rung in own) for own in rungs.values())]

    def at(level: float) -> dict[str, _Rung]:
        return {
            name: min((r for r in own if r.error <= level), key=lambda r: (r.row.bytes, r.error))
            for name, own in rungs.items()
        }

    best: dict[str, _Rung] | None = None
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        found = at(float(levels[middle]))
        if fits({name: rung.row for name, rung in found.items()}):
            best, high = found, middle
        else:
            low = middle + 1
    return best


def local_groups(own: Mapping[int, Sequence[_Rung]], size: int, now: int) -> int:
    """The number of groups with which a layer of at most `size` bytes errs least, `now` where that is as good."""
    least = {
        groups: min((rung.error for rung in rungs if rung.row.bytes <= size), default=np.inf)
        for groups, rungs in own.items()
    }
    return min(least, key=lambda groups: (least[groups], groups != now, groups))


def smallest_rows(family: RankFamily) -> Choice:
    """The smallest row of every layer."""
    return {
        name: min([ladder.whole, *(r for rows in ladder.rows.values() for r in rows)], key=lambda r: r.bytes)
        for name, ladder in family.ladders.items()
    }
