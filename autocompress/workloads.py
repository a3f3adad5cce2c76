"""What a layer's profile costs, counted before it is made: operations of each kind, and seconds from measured rates.

The counts follow the engine's loops. A layer (groups, rows, d) has R = groups · rows rows; a structure of sparsity s
leaves m = (1 - s) d columns of each; S = min(R, 16) rows are what a rate table is learned from.

    trace      multiply-adds of the greedy order        R d³/3, where anything is pruned or has at most 2 bits; d³ for
                                                        a layer that shares one order, where anything is pruned
    factor     of triangular factors                    Σ over structures of m³/3 per row (and once more for the refit
                                                        of uniform grids, and for those of at most 2 bits); d³/3 where
                                                        nothing is pruned, and for a layer that shares one
    feedback   of each code's error on the next ones    per weight and cell, of every path for columns that are open, at
                                                        most 96, once for decided ones; m²/2 for the gather of a factor;
                                                        decided ones of a layer that shares one are products
    product    of products of whole matrices            d² per row for each error and each step of a shared refit;
                                                        d²/2 per row and cell for a layer that shares one factor;
                                                        d³/3 for the order of a pass
    coded      weights that are rounded and coded       m per row and cell, rounded; R d per option, coded
    searched   weights that a step is searched for      R d per uniform width
    trellis    weights that a trellis walks             R d per (step, λ), and three times S d
    option     options that are quantised, whose arrays cost the same whatever the layer's size
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from autocompress.obs import EXACT_LIMIT, PATHS, exact_operations
from autocompress.types import Option

__all__ = ["KINDS", "REFERENCE", "counts", "needs_order", "pays", "schedule", "seconds"]

KINDS = ("trace", "factor", "feedback", "product", "coded", "searched", "trellis", "option")
COARSE_BITS = 2  # grids that rows are quantised to in an order of their own (compressors.base)
OPEN = 96  # columns that paths may still differ in, on average where a row has many (obs.kernels)
SAMPLED = 16  # rows that a rate table is learned from (obs.quantising)
REFITS = 24  # steps of conjugate gradients where a layer shares one order (obs.wide)
ORDERING = 24 * 7  # products of a row with H while such a layer is pruned in rounds
Shape = Sequence[int]


def counts(
    shape: Shape, options: Iterable[Option], table: bool = False, exact_limit: float = EXACT_LIMIT
) -> Counter[str]:
    """Operations by kind for one layer (groups, rows, d) with these options.

    table: rows that are only looked up, whose columns are on their own: no factors, no feedback. Options beyond uniform
    grids, rate-distortion and trellis are counted as uniform grids of their structure.
    """
    options = list(options)
    groups, rows, d = shape
    R, S = groups * rows, min(rows, SAMPLED) * min(groups, SAMPLED)
    exact = exact_operations(shape) <= exact_limit
    found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    structures: dict[tuple[str, float], int] = Counter()
    for option in options:
        if option.is_dense or option.half or (option.trellis and table):
            continue
        found["option"] += 1
        if not table:
            found["product"] += R * d * d
        if option.trellis:
            found["trellis"] += (R + (3 * S if option.lam else 0)) * d
            continue
        found["coded"] += R * d
        if option.step is None:
            found["searched"] += R * d
        kind = "rd" if option.step is not None else "coarse" if _is_coarse(option) else "grid"
        structures[kind, option.sparsity] += 1
    if table:
        return found
    if needs_order(shape, options, table, exact_limit) and exact:
        found["trace"] += round(exact_operations(shape))
    elif needs_order(shape, options, table, exact_limit):
        found["trace"] += groups * d**3
        found["product"] += ORDERING * R * d * d
    if structures:
        found["product"] += groups * d**3 // 3
    if any(option.trellis for option in options):
        found["factor"] += groups * d**3 // 3
    for (kind, sparsity), cells in structures.items():
        m = max(0.0, (1.0 - sparsity / 100.0) * d)
        sampled = S if kind == "rd" else 0
        walked = cells * (R + sampled)
        found["coded"] += round(walked * m)
        refits = (
            R if sparsity > 0 and kind != "rd" and (kind == "coarse" or ("coarse", sparsity) not in structures) else 0
        )
        if exact:
            shared = sparsity == 0 and kind != "coarse"
            factors = groups + min(groups, sampled) if shared else R + sampled
            found["factor"] += round((factors + refits) * m**3 / 3)
            opened = min(m / 2, OPEN)
            found["feedback"] += round((factors + refits) * m * m / 2 + walked * m * (PATHS * opened + m / 2 - opened))
        else:
            found["factor"] += groups * d**3 // 3 * (1 + (kind == "rd"))
            found["product"] += (REFITS * (R + refits + sampled) * d * d if sparsity > 0 else 0) + walked * d * d // 2
            found["feedback"] += PATHS * min(d // 2, 64) * walked * d
    return found


def needs_order(shape: Shape, options: Iterable[Option], table: bool = False, exact_limit: float = EXACT_LIMIT) -> bool:
    """Whether one of these options needs the order in which pruning takes the weights of a layer: those that prune,
    and, on rows that have one of their own, grids of at most `COARSE_BITS` bits.
    """
    own = not table and exact_operations(shape) <= exact_limit
    return any(
        not option.structure.is_dense or (own and _is_coarse(option) and not option.half)
        for option in options
        if not option.is_dense and not option.trellis and option.rank is None
    )


def _is_coarse(option: Option) -> bool:
    return option.step is None and (option.bits or 0) <= COARSE_BITS


# Seconds per operation of each kind on one thread, and to start a worker, as experiments/results/engines_rates.csv has
# them; `estimating.measured_rates` measures those of the machine at hand.
REFERENCE: Mapping[str, float] = {
    "trace": 4.82e-11,
    "factor": 1.03e-11,
    "product": 1.68e-11,
    "feedback": 8.76e-10,
    "coded": 2.03e-7,
    "searched": 4.66e-7,
    "trellis": 1.63e-6,
    "option": 2.71e-4,
}
START_SECONDS = 0.7  # of one core, for a worker to be there with its libraries


def seconds(counted: Mapping[str, float], rates: Mapping[str, float] = REFERENCE) -> float:
    """Seconds on one thread: the sum over kinds of operations times seconds per operation."""
    return math.fsum(counted[kind] * rates[kind] for kind in KINDS)


def pays(shapes: Iterable[Shape], options: Sequence[Option], workers: int) -> bool:
    """Whether that many processes save more than their start costs, for layers of these shapes."""
    tasks = [seconds(counts(shape, options)) for shape in shapes]
    return len(tasks) > 1 and workers > 1 and sum(tasks) > START_SECONDS + schedule(tasks, workers)


def schedule(tasks: Sequence[float], workers: int) -> float:
    """Seconds until the last of these tasks is done, each begun in the order given by the first worker that is free."""
    free = [0.0] * max(1, min(workers, len(tasks)))
    for task in tasks:
        at = free.index(min(free))
        free[at] += task
    return max(free)
