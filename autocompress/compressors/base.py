"""What every compressor works on and gives back: one layer's problem in, options with error and bytes out. No torch
here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from autocompress import obs
from autocompress.costs import FLOAT_BITS, code_bits, row_bits
from autocompress.storage import Entry, codec_named, float_entry, weight_entry, weight_size
from autocompress.types import Option

__all__ = ["Compressor", "LayerProblem", "Measured", "Realised", "by_structure", "storable"]

Parts = np.ndarray | tuple[np.ndarray, ...]  # a weight, or its factors and what they leave, if that is kept
COARSE = 4  # levels of a grid, and fewer
CODES_HELD = 1 << 26  # codes made at once (256 MiB): a large table has 10^7 for each of hundreds of options


@dataclass
class LayerProblem:
    """One layer: weight float64 (groups, rows, d), Hessian float64 (groups, d, d) or None where calibration saw
    nothing.

    `row_weights` (rows,): what each row of a table weighs beside its Hessian, which is (0, d, d) where there is none
    (see `LayerStatistics`). `shape` is the shape of what is stored, rows first. `order` (int32) and `losses` (float32,
    in units of the layer's largest loss) are the pruning trace in the shape of `weight`; they are computed when first
    asked for, and handed in when a profile has them. factorable: whether two layers can take the place of this one
    (see `Layer`). inputs, outputs: for each level, in percent of a group of channels, the columns that a narrower layer
    keeps, of all d, and the rows, of all that are stored; empty where it has no narrower inputs, or outputs. coupled:
    whether both are of one group, and so of one level.
    """

    name: str
    shape: tuple[int, ...]
    weight: np.ndarray
    hessian: np.ndarray | None
    order: np.ndarray | None = None
    losses: np.ndarray | None = None
    row_weights: np.ndarray | None = None
    exact_limit: float = obs.EXACT_LIMIT
    factorable: bool = True
    inputs: Mapping[float, np.ndarray] = field(default_factory=dict)
    outputs: Mapping[float, np.ndarray] = field(default_factory=dict)
    coupled: bool = False
    _found: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)
    _visited: tuple[Option, np.ndarray] | None = field(default=None, repr=False, compare=False)

    @property
    def exact(self) -> bool:
        """Whether every row has its own order; else its trace would cost more than `exact_limit` operations."""
        return self.row_weights is not None or obs.exact_operations(self.weight.shape) <= self.exact_limit

    def trace(self) -> tuple[np.ndarray, np.ndarray]:
        """Order and losses of exact greedy pruning, or of pruning in rounds where the layer is too wide for it.

        Raises ValueError where there is no Hessian.
        """
        if self.order is None or self.losses is None:
            trace: Any = obs.prune_trace if self.exact else obs.shared_trace
            order, losses = trace(self.weight, self.known_hessian(), threads=1)
            # In units of the largest: a weight of 1e20 or 1e-20 has losses that float32 cannot hold.
            self.order, self.losses = order, (losses / (losses.max(initial=0.0) or 1.0)).astype(np.float32)
        return self.order, self.losses

    def known_hessian(self) -> np.ndarray | obs.RowHessian:
        """What the functions of `obs` take. Raises ValueError where there is none."""
        if self.hessian is None:
            raise ValueError("calibration never reached this layer, so it has no Hessian")
        if self.row_weights is None:
            return self.hessian
        return obs.RowHessian(self.row_weights, self.hessian[0] if len(self.hessian) else None)

    @property
    def step_scales(self) -> np.ndarray | None:
        """Factors for the steps of rows that weigh differently (see `RowHessian.step_scales`); None where one step is
        for all.
        """
        hessian = self.known_hessian()
        scales = hessian.step_scales() if isinstance(hessian, obs.RowHessian) else None
        return None if scales is None or (scales == 1.0).all() else scales

    def once(self, key: object, find: Callable[[], Any]) -> Any:
        """What `find` gives, computed when it is first asked for under that key."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def counts(self, percent: float) -> np.ndarray:
        """Weights that each row loses at a sparsity in percent, int64 (groups, rows)."""
        if percent not in self._found:
            self._found[percent] = obs.pruned_counts(self.trace()[1], percent / 100.0)
        return self._found[percent]

    @property
    def is_table(self) -> bool:
        """Whether rows only weigh differently, and columns are on their own."""
        return self.row_weights is not None and (self.hessian is None or not len(self.hessian))

    def shared_hessian(self) -> np.ndarray:
        """The Hessian (groups, d, d) that all rows share. Raises ValueError where they weigh differently."""
        if self.row_weights is not None:
            raise ValueError("the rows of a table weigh differently: there is no Hessian for all of them")
        hessian = self.known_hessian()
        assert isinstance(hessian, np.ndarray)
        return hessian

    def takes(self, structure: Option) -> bool:
        """Whether the layer can have a structure: rows that weigh differently, and those of a layer too wide for an
        order of their own, only lose single weights.
        """
        exact = self.exact and self.row_weights is None
        return exact or structure == Option(sparsity=structure.sparsity)

    def kept(self, structure: Option) -> tuple[np.ndarray, np.ndarray]:
        """What a structure prunes: (order, counts), the first counts[g, r] columns of order[g, r] go, the least
        salient of what stays is next. As greedy OBS finds it; `obs.patterns` says how.
        """
        if structure not in self._found:
            self._found[structure] = self._kept(structure)
        return self._found[structure]

    def _kept(self, structure: Option) -> tuple[np.ndarray, np.ndarray]:
        shape = self.weight.shape
        order, _ = self.trace()
        positions = int(np.prod(self.shape[2:]))
        if structure.nm is not None:
            gone = obs.nm_mask(self.weight, self.shared_hessian(), *structure.nm, positions, threads=1)
        elif structure.block is not None:
            columns = obs.input_blocks(shape[-1], positions, structure.block)
            gone = obs.unit_mask(self._units(columns, structure.block_rows), shape, structure.sparsity / 100.0)
        elif structure.channels is not None:
            columns = np.arange(shape[-1]).reshape(-1, positions)
            gone = obs.unit_mask(self._units(columns, shape[1]), shape, structure.channels / 100.0)
        elif structure.out is not None:
            losses = obs.row_losses(self.weight, self.shared_hessian())
            count = int(np.ceil(structure.out / 100.0 * losses.size - 1e-9))
            gone = np.zeros(shape, bool)
            gone.reshape(losses.size, -1)[np.argsort(losses, axis=None, kind="stable")[:count]] = True
        else:
            return order, self.counts(structure.sparsity)
        return obs.order_of_mask(order, gone)

    def _units(self, columns: np.ndarray, rows: int) -> obs.Units:
        """One trace serves every sparsity of the same blocks."""
        key = (columns.tobytes(), rows)  # blocks and channels may have one shape
        if key not in self._found:
            self._found[key] = obs.unit_trace(self.weight, self.shared_hessian(), columns, rows, threads=1)
        return self._found[key]

    def refitted(self, structure: Option) -> np.ndarray:
        """The weights of a structure: what goes is zero, what stays makes up for it. float64, in the weight's shape."""
        if structure.is_dense:
            return self.weight
        order, counts = self.kept(structure)
        prune: Any = obs.prune if self.exact else obs.shared_prune
        return prune(self.weight, self.known_hessian(), order, counts, threads=1)

    def visited(self, structure: Option) -> tuple[np.ndarray, np.ndarray]:
        """`kept`, with what stays in the order of `visit`: a pass goes from the last column to the first."""
        shape = self.weight.shape
        if structure.is_dense:  # one order for all rows, and no trace to find; none matters without feedback
            visit = np.arange(shape[-1])[None] if self.is_table else self.visit()
            return np.broadcast_to(visit[:, None], shape), np.zeros(shape[:-1], np.int64)
        order, counts = self.kept(structure)
        if self.is_table or not self.exact:  # without feedback, or with one order for all
            return order, counts
        visit = self.visit()
        if self._visited is None or self._visited[0] != structure:
            d = order.shape[-1]
            place = np.argsort(visit, axis=1).astype(np.int32)
            rank = np.take_along_axis(np.broadcast_to(place[:, None], order.shape), order.astype(np.int64), 2)
            first = np.arange(d, dtype=np.int32)
            rank = np.where(first < counts[..., None], first - d, rank)
            self._visited = structure, np.take_along_axis(order, np.argsort(rank, axis=2), 2)
        return self._visited[1], counts

    def visit(self) -> np.ndarray:
        """The columns in the order of `obs.least_pivots`, (groups, d)."""

        def find() -> np.ndarray:
            hessian = self.known_hessian()
            if isinstance(hessian, obs.RowHessian):
                assert hessian.shared is not None
                hessian = (hessian.shared + float(hessian.weights.mean()) * np.eye(len(hessian.shared)))[None]
            return obs.least_pivots(hessian, np.float64 if self.exact else np.float32)

        return np.asarray(self.once("visit", find))

    def _passes(self) -> Any:
        if self.exact:
            return partial(obs.salient_cells, paths=obs.PATHS)
        return partial(obs.shared_cells, paths=obs.PATHS, visit=self.visit())

    def quantised(self, structure: Option, cells: Sequence[obs.Cell]) -> np.ndarray:
        """Codes of every cell on what a structure leaves, int32 (cells, groups, rows, d).

        In the order of least pivots; a row whose grid has at most four levels in that of pruning, most salient weight
        first: such a grid clips what is far out, which the others must be free to make up for. So do levels that lie
        farther apart where they are larger (fp8).
        """
        found = np.zeros((len(cells), *self.weight.shape), np.int32)
        for rows, order in zip(self._by_levels(cells), (self.visited, self.kept), strict=True):
            if rows.any():
                some = np.flatnonzero(rows.any(axis=(1, 2)))
                now = [cells[int(i)] for i in some]
                codes = self._passes()(self.weight, self.known_hessian(), *order(structure), now, threads=1)[0]
                found[some] = np.where(rows[some][..., None], codes, found[some])
        return found

    def _by_levels(self, cells: Sequence[obs.Cell]) -> tuple[np.ndarray, np.ndarray]:
        """Rows that cells quantise in the order of least pivots, and in that of pruning; bool (cells, groups, rows)."""
        coarse = np.zeros((len(cells), *self.weight.shape[:-1]), bool)
        if self.exact and not self.is_table:  # else there is one order for all, or none
            for own, cell in zip(coarse, cells, strict=True):
                span = (cell.high - cell.low).reshape(*own.shape, -1).max(axis=-1)
                own[:] = (cell.price == 0.0) & (span > 0) & (span < COARSE) | (cell.levels is not None)
        return ~coarse, coarse

    def rate_distortion_cells(
        self, structure: Option, grid: Sequence[tuple[float, float]], scales: np.ndarray | None
    ) -> list[obs.Cell]:
        """Cells of (step, λ) pairs on what a structure leaves; scales: see `obs.rate_distortion_cells`."""
        hessian, (order, counts) = self.known_hessian(), self.visited(structure)
        return obs.rate_distortion_cells(
            self.weight, hessian, order, counts, grid, threads=1, scales=scales, passes=self._passes()
        )

    def cut(self, width: tuple[float, float]) -> tuple[np.ndarray, np.ndarray] | None:
        """The columns and the rows that stay of a layer of these widths, in percent; None where it has no such one."""
        if self.coupled and width[0] != width[1]:
            return None
        groups, rows, columns = self.weight.shape
        every = (np.arange(columns), np.arange(groups * rows))
        sides = zip(width, (self.inputs, self.outputs), every, strict=True)
        kept = [all_of_it if level == 100 else levels.get(level) for level, levels, all_of_it in sides]
        return None if kept[0] is None or kept[1] is None else (kept[0], kept[1])

    def whole(self, realised: Realised) -> np.ndarray:
        """The weight of an option in the layer's own size, (groups, rows, d): of a narrower one, rows that went are as
        they were, since what they cost is an error of the layers that read them, and columns that went are zeros.
        """
        found = realised.weight()
        if realised.cut is None:
            return found.reshape(self.weight.shape)
        columns, rows = realised.cut
        weight = self.weight.reshape(-1, self.weight.shape[-1]).copy()
        weight[rows] = 0.0
        weight[np.ix_(rows, columns)] = found.reshape(len(rows), len(columns))
        return weight.reshape(self.weight.shape)

    def error(self, weight: np.ndarray) -> float:
        """½ tr(ΔW H ΔWᵀ) of a weight of the layer's size."""
        return obs.layer_error(self.weight, weight.reshape(self.weight.shape), self.known_hessian())

    def row_errors(self, weight: np.ndarray) -> np.ndarray:
        """½ Δw H Δwᵀ of every row, (groups, rows)."""
        hessian = self.known_hessian()
        if isinstance(hessian, obs.RowHessian):
            return hessian.row_errors(weight - self.weight)
        return obs.row_losses(weight - self.weight, hessian)

    @property
    def energy(self) -> float:
        """½ tr(W H Wᵀ): the error of losing the whole layer."""
        return self.error(np.zeros_like(self.weight))

    @property
    def rms(self) -> float:
        """Root mean square weight; 1 for a layer of zeros. Steps of rate-distortion options are in units of it."""
        peak = float(np.abs(self.weight).max(initial=0.0))
        return peak * float(np.sqrt(np.mean((self.weight / peak) ** 2))) if peak > 0.0 else 1.0


@dataclass(frozen=True)
class Realised:
    """A compressed weight, exactly as it will be stored: codes times step, or values in a float codec.

    step: one number, one per row, or (rows, groups) where each `group` consecutive weights of a row share one.
    vector: how many consecutive codes are one word of a codebook, where the codec has one.
    factors: of a low-rank weight the two layers that take its place, the one that is applied first in front, and the
    residual, if there is one, each of a shape of `costs.factor_shapes`; nothing else is stored then. cut: of a narrower
    layer, the columns and the rows that stay; `shape` is that of what stays.
    """

    shape: tuple[int, ...]
    codec: str
    codes: np.ndarray | None = None
    step: np.ndarray | float = 1.0
    values: np.ndarray | None = None
    group: int | None = None
    factors: tuple[Realised, ...] | None = None
    mixed: bool = False
    cut: tuple[np.ndarray, np.ndarray] | None = None
    vector: int | None = None

    @property
    def step_kind(self) -> str:
        """As an entry says it; of factors each, with commas between them."""
        if self.factors is not None:
            return ",".join(factor.step_kind for factor in self.factors)
        if self.codes is None:
            return "none"
        return ("tensor", "row", f"group{self.group}")[np.ndim(self.step)]

    @property
    def codecs(self) -> str:
        """The codec; of factors each, with commas between them."""
        return self.codec if self.factors is None else ",".join(factor.codec for factor in self.factors)

    @property
    def width(self) -> int:
        """Bits of a weight when it is multiplied: what holds every code, 16 or 32 for floats."""
        if self.factors is not None:
            return max(factor.width for factor in self.factors)
        if self.codes is None:
            return 16 if self.codec == "fp16" else FLOAT_BITS
        return 8 if self.codec == "fp8" else code_bits(self.codes)

    def parts(self) -> Parts:
        """The weight, or its factors, as a reader of the file gets them."""
        return self.weight() if self.factors is None else tuple(factor.weight() for factor in self.factors)

    @property
    def multiplied(self) -> int:
        """How many weights are multiplied where the layer is used once."""
        shapes = [self.shape] if self.factors is None else [factor.shape for factor in self.factors]
        return sum(int(np.prod(shape)) for shape in shapes)

    @property
    def nonzero(self) -> int:
        """How many of them are not zero."""
        return sum(int(np.count_nonzero(part.weight())) for part in self.factors or (self,))

    @property
    def row_bits(self) -> int | None:
        """Bits of all weights that are not zero, where rows have widths of their own (`costs.row_bits`), or each of
        three layers has.
        """
        if self.factors is not None and len(self.factors) > 2:
            return sum(factor.width * factor.nonzero for factor in self.factors)
        return row_bits(self.codes.reshape(self.shape)) if self.mixed and self.codes is not None else None

    def weight(self) -> np.ndarray:
        """What a reader of the file gets, float32 in the weight's shape; of factors their product and the residual,
        rounded once.
        """
        if self.factors is not None:
            return product([factor.weight() for factor in self.factors], self.shape)
        if self.codes is None:
            assert self.values is not None
            stored = self.values.astype(np.float16) if self.codec == "fp16" else self.values
            return stored.astype(np.float32).reshape(self.shape)
        step = np.asarray(self.step, np.float32)
        codes = self.codes.reshape(self.shape[0], -1).astype(np.float32)
        if step.ndim == 2:
            step = np.repeat(step, self.group or 1, axis=1)[:, : codes.shape[1]]
        return (codes * (step[:, None] if step.ndim == 1 else step)).reshape(self.shape)

    def entry(self, key: str, option: Option, layout: Mapping[str, int] | None = None) -> Entry:
        """The record for the file; `layout` is what it says beside the option (see `Layer.params`).

        Of factors there are several: see `entries`.
        """
        params: dict[str, Any] = {"option": str(option), **(layout or {})}
        if self.codes is None:
            return float_entry(key, self._values(), codec=self.codec, params=params)
        codes = self.codes.reshape(self.shape)
        how: Any = {"codec": self.codec, "group": self.group, "vector": self.vector}
        return weight_entry(key, codes, self.step, params=params, **how)

    def entries(self, key: str, option: Option, layout: Mapping[str, int] | None = None) -> list[Entry]:
        """The records for the file: that of `entry`, or of all factors, each with the number of groups."""
        if self.factors is None:
            return [self.entry(key, option, layout)]
        groups = {**(layout or {}), "factor": option.groups or 1}
        names = factor_keys(key, len(self.factors))
        return [factor.entry(name, option, groups) for factor, name in zip(self.factors, names, strict=True)]

    def bytes(self) -> int:
        """Length of the entry's payload, exactly; of those of all factors together."""
        if self.factors is not None:
            return sum(factor.bytes() for factor in self.factors)
        if self.codes is None:
            return codec_named(self.codec).size(self._values())
        return weight_size(self.codes.reshape(self.shape), self.step, self.codec, self.group, self.vector)

    def _values(self) -> np.ndarray:
        assert self.values is not None
        return self.values.reshape(self.shape).astype(np.float32)


def product(parts: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """The weight of that shape (out, in, *kernel), float32 and rounded once, that these layers have together: the
    first (groups · rank, in / groups, *kernel) grouped, then the second (out, groups · rank, 1, ...), and beside both
    the third, if there is one, of the whole shape.
    """
    first, second, *residual = parts
    groups = shape[1] // first.shape[1]
    rows = first.astype(np.float64).reshape(groups, len(first) // groups, -1)
    columns = second.astype(np.float64).reshape(len(second), groups, -1)
    found: np.ndarray = np.einsum("fgr,grd->fgd", columns, rows, optimize=True).reshape(shape)
    for rest in residual:
        found = found + rest.reshape(shape)
    return found.astype(np.float32)


def factor_keys(key: str, count: int) -> tuple[str, ...]:
    """Names of the `count` factors of a weight in the state dict, as `factors.factorise` gives them."""
    owner = key.removesuffix("weight")
    return tuple(f"{owner}{i}.weight" for i in range(count))


@dataclass(frozen=True)
class Measured:
    """One row of a profile: error ½ tr(ΔW H ΔWᵀ) of exactly what would be stored, bytes of its payload, seconds to find
    it.

    `codec` and `step` (none, tensor, row, group32) say how it would be stored: the file's header has to spell that out.
    `width`: the bits that hold every code, 16 or 32 for floats; `nonzero`: how many weights are not zero (see
    `costs.bops`); `row_bits`: the bits of all of those, where rows have widths of their own. `multiplied`: how many
    weights there are where an option changes that, and `part_bytes`: of `bytes`, those of each of the layers that take
    the place of one, in the order of their names; None and empty otherwise. Of such layers `codec` and `step` are
    several, with commas between them.
    """

    option: Option
    error: float
    bytes: int
    codec: str
    step: str
    seconds: float = field(compare=False)
    width: int
    nonzero: int
    row_bits: int | None = None
    multiplied: int | None = None
    part_bytes: tuple[int, ...] = ()

    @property
    def bits(self) -> int:
        """Bits of all weights that are not zero, each as wide as it is multiplied."""
        return self.width * self.nonzero if self.row_bits is None else self.row_bits


class Compressor(Protocol):
    """Turns a layer into options with error and bytes; `version` changes whenever its results do."""

    version: int
    source: str

    def offers(self, option: Option) -> bool:
        """Whether this compressor realises that option."""
        ...

    def needs_data(self, option: Option) -> bool:
        """Whether it needs a Hessian."""
        ...

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        """Each option's weight; None where the layer cannot have it (a value beyond half precision, say)."""
        ...


def measure(compressor: Compressor, problem: LayerProblem, options: Sequence[Option]) -> list[Measured]:
    """Error and bytes of every option that the layer can have."""
    at_once = max(1, CODES_HELD // max(problem.weight.size, 1))
    if len(options) > at_once:
        parts = [options[i : i + at_once] for i in range(0, len(options), at_once)]
        return [row for part in parts for row in measure(compressor, problem, part)]
    start = time.perf_counter()
    found = compressor.realise_all(problem, options)
    each = (time.perf_counter() - start) / max(len(options), 1)
    rows = []
    for option, realised in zip(options, found, strict=True):
        if realised is None:
            continue
        start = time.perf_counter()
        weight = realised.weight()
        error = 0.0 if problem.hessian is None else problem.error(problem.whole(realised))
        factors = realised.factors
        nonzero = realised.nonzero if factors else int(np.count_nonzero(weight))
        lengths = tuple(factor.bytes() for factor in factors or ())
        size = sum(lengths) if factors else realised.bytes()
        changed = realised.multiplied if factors or realised.cut is not None else None
        seconds = each + time.perf_counter() - start
        how = realised.codecs, realised.step_kind
        width, bits = realised.width, realised.row_bits
        rows.append(Measured(option, error, size, *how, seconds, width, nonzero, bits, changed, lengths))
    return rows


def by_structure(options: Sequence[Option]) -> list[tuple[Option, list[Option]]]:
    """The options of each structure together, for they share masks and factorisations."""
    found: dict[Option, list[Option]] = {}
    for option in options:
        found.setdefault(option.structure, []).append(option)
    return sorted(found.items(), key=lambda pair: str(pair[0]))


def storable(scale: np.ndarray) -> np.ndarray:
    """Steps as they will be stored: half precision in the given shape, at least its least number, or a single float32
    for all where the largest is beyond half precision or would lose digits in it.
    """
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    largest = half.max(initial=0)
    if np.finfo(np.float16).tiny <= largest < np.inf:
        return np.maximum(half, np.finfo(np.float16).smallest_subnormal)
    return np.asarray(scale.max(initial=0.0) or 1.0, np.float32)
