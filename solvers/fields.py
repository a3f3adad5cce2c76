"""The fields of a problem: their types, and reading them with words that say what was got and what is needed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

SCHEMA = 1
# Sums of integer costs stay below 2**62, so that no sum or difference of two of them overflows int64.
INTEGER_LIMIT = 2**62


class ProblemError(ValueError):
    """A problem that cannot be read, or that a solver does not take; it says what was got and what is needed."""


@dataclass(frozen=True, eq=False)
class Pairwise:
    """A loss that depends on two groups: choosing option i in group `first` and j in `second` adds `loss[i, j]`."""

    first: int
    second: int
    loss: FloatArray


class Deadline:
    """A time limit in seconds, counted from now; None never passes."""

    def __init__(self, limit: float | None) -> None:
        if limit is not None and not limit > 0:
            raise ProblemError(f"time_limit is {limit!r} seconds; it must be positive, or None for no limit")
        self.limit = limit
        self.begun = time.perf_counter()

    @property
    def left(self) -> float:
        return math.inf if self.limit is None else self.limit - (time.perf_counter() - self.begun)

    @property
    def passed(self) -> bool:
        return self.limit is not None and self.left <= 0


def _at(names: Sequence[str], g: int) -> str:
    return f"group {names[g]!r}"


def read_names(names: Sequence[str] | None, G: int) -> tuple[str, ...]:
    """Names of G groups, made up where none are given."""
    if names is None:
        return tuple(f"g{g}" for g in range(G))
    if len(names) != G:
        raise ProblemError(f"{len(names)} names for {G} groups; one name per group is needed")
    if len(set(names)) != G:
        twice = next(n for k, n in enumerate(names) if n in names[:k])
        raise ProblemError(f"two groups are named {twice!r}; names must differ")
    return tuple(names)


def read_losses(at: str, values: Array) -> FloatArray:
    """One group's losses (n,) as float64."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ProblemError(f"{at} has losses of shape {array.shape}; a non-empty vector is needed")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).argmax())
        raise ProblemError(f"{at} option {bad} has loss {array[bad]}; losses must be finite")
    return array


def read_costs(
    names: Sequence[str], loss: Sequence[Array], cost: Sequence[Array], resources: Sequence[str]
) -> tuple[Array, ...]:
    """Costs as (n_g, R) arrays: int64 where all are integers, else float64."""
    R = len(resources)
    given = [np.asarray(a) for a in cost]
    for g, a in enumerate(given):
        at, n = _at(names, g), len(loss[g])
        if a.ndim not in (1, 2) or a.dtype.kind not in "iufb":
            raise ProblemError(
                f"{at} has costs of shape {a.shape} and type {a.dtype}; numbers per option (and resource) are needed"
            )
        if len(a) != n:
            raise ProblemError(f"{at} has {n} losses but {len(a)} costs; both need one entry per option")
        if (1 if a.ndim == 1 else a.shape[1]) != R:
            raise ProblemError(
                f"{at} has {1 if a.ndim == 1 else a.shape[1]} costs per option for {R} resources {list(resources)}"
            )
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            bad = int(np.argwhere(~np.isfinite(a.reshape(n, R)))[0, 0])
            raise ProblemError(f"{at} option {bad} has cost {a[bad]}; costs must be finite")
    whole = all(a.dtype.kind in "iub" for a in given)
    if whole:
        most = sum(max(abs(int(a.max())), abs(int(a.min()))) for a in given)
        if most >= INTEGER_LIMIT:
            raise ProblemError(f"integer costs may add up to {most}; sums must stay under 2**62, so use a larger unit")
    kind = np.int64 if whole else np.float64
    return tuple(a.astype(kind).reshape(len(a), R) for a in given)


def read_labels(
    names: Sequence[str], loss: Sequence[Array], options: Sequence[Sequence[str]] | None
) -> tuple[tuple[str, ...], ...] | None:
    """Option names per group, or None."""
    if options is None:
        return None
    if len(options) != len(loss):
        raise ProblemError(f"{len(options)} lists of option names for {len(loss)} groups; one list per group is needed")
    for g, labels in enumerate(options):
        if len(labels) != len(loss[g]):
            raise ProblemError(
                f"{_at(names, g)} has {len(loss[g])} losses but {len(labels)} option names; both need one per option"
            )
    return tuple(tuple(labels) for labels in options)


def read_pair(loss: Sequence[Array], pair: Any) -> Pairwise:
    """One pairwise term."""
    g, h, matrix = (pair.first, pair.second, pair.loss) if isinstance(pair, Pairwise) else pair
    if not (0 <= g < len(loss) and 0 <= h < len(loss)) or g == h:
        raise ProblemError(
            f"a pairwise term joins groups {g} and {h}; two different groups of 0 to {len(loss) - 1} are needed"
        )
    array = np.asarray(matrix, dtype=np.float64)
    need = (len(loss[g]), len(loss[h]))
    if array.shape != need:
        raise ProblemError(
            f"the pairwise term of groups {g} and {h} has shape {array.shape}; their options need {need}"
        )
    if not np.isfinite(array).all():
        raise ProblemError(
            f"the pairwise term of groups {g} and {h} holds {array[~np.isfinite(array)][0]}; losses must be finite"
        )
    return Pairwise(int(g), int(h), array)


def read_fixed(names: Sequence[str], loss: Sequence[Array], fixed: Mapping[int, int] | None) -> dict[int, int]:
    """Fixed options by group, in the order of groups."""
    held = {int(g): int(j) for g, j in dict(fixed or {}).items()}
    for g, j in held.items():
        if not 0 <= g < len(loss):
            raise ProblemError(f"group {g} is fixed, but groups are 0 to {len(loss) - 1}")
        if not 0 <= j < len(loss[g]):
            raise ProblemError(f"{_at(names, g)} is fixed to option {j}, but its options are 0 to {len(loss[g]) - 1}")
    return dict(sorted(held.items()))
