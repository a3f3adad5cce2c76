"""Low rank: `rank32`, `k4r12w8`, `rank32pfp16`. One layer becomes two thinner ones, floats or quantised with error
feedback.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.linalg import block_diag, cho_solve, solve_triangular

from autocompress.compressors.base import LayerProblem, Realised, by_structure, storable
from autocompress.compressors.obc import ObcUniform
from autocompress.costs import factor_shapes
from autocompress.types import Option

__all__ = ["LowRank", "bases", "lowrank_grid"]

FAINT = 1e-9  # of the mean diagonal: added where a Hessian of features may be singular


class LowRank:
    """W (f, d) ≈ A B: B has `rank` rows for each of k consecutive runs of input channels, zero elsewhere, and A (f, k ·
    rank) all of them.

    Of least error: with H_ii = L Lᵀ the Hessian of a run and W_i L = U S Vᵀ, A_i = U √S and B_i = √S Vᵀ L⁻¹ truncated,
    which for k = 1 is the minimum of ½ tr((W - AB) H (W - AB)ᵀ) over all of that rank (Eckart and Young). For k > 1 one
    run after the other, `sweeps` times, becomes the best of its rank beside the others as they are, and A is refitted
    to all, A = W H Bᵀ (B H Bᵀ)⁻¹. Plain: U √S and √S Vᵀ of W_i = U S Vᵀ, whatever the inputs. Quantised: rows of B are
    OBQ's, with H_ii as their Hessian; A is refitted to what they became, and is OBQ's with the Hessian B H Bᵀ. `share`:
    the power of S that B gets. None where two layers would hold no fewer weights than one.
    experiments/lowrank_layers.py compares these choices. Sources: ALDS, arXiv 2107.11442 (runs, factors, two layers);
    the error is OBC's, arXiv 2208.11580.
    """

    version = 2
    source = "ALDS, arXiv 2107.11442"

    def __init__(self, share: float = 0.5, sweeps: int = 2) -> None:
        self.share, self.sweeps = share, sweeps

    def offers(self, option: Option) -> bool:
        if option.rank is None:
            return False
        return option == dataclasses.replace(option.structure, bits=option.bits, half=option.half)

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        found: dict[Option, Realised | None] = dict.fromkeys(options)
        takes = [o for o in options if _takes(problem, o)]
        for structure, wanted in by_structure(takes):
            most = max(o.rank or 0 for o in takes if (o.groups, o.plain) == (structure.groups, structure.plain))
            pair = _Pair(problem, structure, most, self.share, self.sweeps)
            for option in wanted:
                parts = pair.floats(option.half) if option.bits is None else pair.quantised(option.bits)
                found[option] = None if parts is None else Realised(problem.shape, parts[0].codec, factors=parts)
        return [found[o] for o in options]


def lowrank_grid() -> list[Option]:
    """Ranks about a half or a third of an octave apart x 1, 2 or 4 runs of channels x half precision, 8, 6 and 4 bits;
    a layer has those that make it smaller.
    """
    ranks = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512)
    shapes = [Option(rank=r, groups=k if k > 1 else None) for k in (1, 2, 4) for r in ranks if k * r <= 512]
    return [
        dataclasses.replace(shape, **values)
        for shape in shapes
        for values in ({"half": True}, {"bits": 8}, {"bits": 6}, {"bits": 4})
    ]


def _takes(problem: LayerProblem, option: Option) -> bool:
    """Whether two layers can take the place of this one and would have fewer weights."""
    groups, rank = option.groups or 1, option.rank or 0
    if not problem.factorable or problem.row_weights is not None or len(problem.weight) != 1 or len(problem.shape) < 2:
        return False
    if problem.shape[1] % groups or rank > min(problem.shape[0], problem.weight.shape[-1] // groups):
        return False
    return sum(int(np.prod(shape)) for shape in factor_shapes(problem.shape, option)) < problem.weight.size


class _Pair:
    """A and B of one structure of a layer, as floats and as codes; a row of B is a filter of the first layer.

    most: the highest rank with the same runs that is wanted beside this one. Where the rows of B of a lower rank are
    the first ones of a higher rank's, they are made, and quantised, once.
    """

    def __init__(self, problem: LayerProblem, structure: Option, most: int, share: float, sweeps: int) -> None:
        self.problem, self.structure = problem, structure
        self.groups, self.rank = structure.groups or 1, structure.rank or 0
        self.shapes = factor_shapes(problem.shape, structure)
        self.nested = structure.plain or self.groups == 1
        key = (self.groups, structure.plain, share, most)

        def split() -> tuple[np.ndarray, np.ndarray]:
            rows, left = bases(problem, self.groups, structure.plain)
            if not self.nested:
                rows, left = _swept(problem, rows[:, : self.rank], left[:, :, : self.rank], sweeps)
            sizes = np.linalg.norm(left, axis=1)
            rows, left, sizes = rows[:, :most], left[:, :, :most], sizes[:, :most]
            shared = np.where(sizes > 0.0, sizes, 1.0) ** share
            rows, left = rows * shared[..., None], left / shared[:, None, :]
            peaks = [float(np.abs(x).max(initial=0.0)) for x in (left[:, :, 0], rows[:, 0])]
            even = float(np.sqrt(peaks[0] / peaks[1])) if min(peaks) > 0.0 else 1.0
            return rows * even, left / even  # of one magnitude, as half precision has a range

        def as_layer() -> LayerProblem:
            # Every row's largest weight is 1: so no row's codes depend, to the last bit, on which others there are.
            rows = self.rows / np.where(self.peaks > 0.0, self.peaks, 1.0)[..., None]
            shape = (rows.shape[0] * rows.shape[1], rows.shape[2])
            hessians = np.stack([h for h, _ in _runs(problem, self.groups)])
            return LayerProblem(problem.name, shape, rows, hessians, exact_limit=_limit(problem))

        def once(name: str, find: Callable[[], Any]) -> Any:
            return problem.once((name, *key), find) if self.nested else find()

        self.rows, self.left = once("split", split)
        self.peaks = np.abs(self.rows).max(axis=-1)
        self.layer: LayerProblem = once("layer", as_layer)

    def floats(self, half: bool) -> tuple[Realised, Realised] | None:
        """Both as float32 or binary16, None where that cannot hold them; A is refitted to B as it is stored, unless the
        structure is plain.
        """
        codec, dtype = ("fp16", np.float16) if half else ("raw", np.float32)
        rows, left = self.rows[:, : self.rank], self.left[:, :, : self.rank]
        limit = float(np.finfo(dtype).max)
        if max(np.abs(rows).max(initial=0.0), np.abs(left).max(initial=0.0)) > limit:
            return None
        first = Realised(self.shapes[0], codec, values=rows.reshape(self.shapes[0]).astype(dtype).astype(np.float32))
        columns = np.concatenate(list(left), axis=1) if self.structure.plain else self._refitted(first)[0]
        columns = columns.clip(-limit, limit).astype(dtype).astype(np.float32)
        return first, Realised(self.shapes[1], codec, values=columns.reshape(self.shapes[1]))

    def quantised(self, bits: int) -> tuple[Realised, Realised] | None:
        """Both as codes with a step per row: B by the Hessians of its inputs, A by that of what B makes of them."""

        def find() -> Realised | None:
            return ObcUniform().realise_all(self.layer, [Option(bits=bits)])[0]

        whole = self.layer.once(bits, find)
        if whole is None or whole.codes is None:
            return None
        taken = (np.arange(self.groups)[:, None] * self.rows.shape[1] + np.arange(self.rank)).ravel()
        # A makes up for what rounding does to a step, and for its unit, that of the first rows.
        sizes = self.peaks.ravel()[taken] / (float(self.peaks[:, 0].max()) or 1.0)
        step = storable(np.broadcast_to(whole.step, len(whole.codes)).astype(np.float64)[taken] * sizes)
        first = Realised(self.shapes[0], whole.codec, codes=whole.codes[taken].reshape(self.shapes[0]), step=step)
        columns, hessian = self._refitted(first)
        limit = _limit(self.problem)
        inner = LayerProblem(self.problem.name, columns.shape, columns[None], hessian[None], exact_limit=limit)
        second = ObcUniform().realise_all(inner, [Option(bits=bits)])[0]
        if second is None or second.codes is None:
            return None
        return first, dataclasses.replace(second, shape=self.shapes[1], codes=second.codes.reshape(self.shapes[1]))

    def _refitted(self, first: Realised) -> tuple[np.ndarray, np.ndarray]:
        """(A (f, groups · rank) of least error for that B, the Hessian B H Bᵀ, and a little that keeps it regular)."""
        rows = first.weight().astype(np.float64).reshape(self.groups * self.rank, -1)
        wide, hessian = block_diag(*np.split(rows, self.groups)), self.problem.shared_hessian()[0]
        target = self.problem.once("targets", lambda: self.problem.weight[0] @ hessian)
        inner = wide @ hessian @ wide.T
        inner = 0.5 * (inner + inner.T)
        inner += (FAINT * float(np.diag(inner).mean()) or 1.0) * np.eye(len(inner))
        return np.linalg.solve(inner, wide @ target.T).T, inner


def _limit(problem: LayerProblem) -> float:
    """Factors are exact where the whole layer is: how many rows they have depends on what else is asked for."""
    return math.inf if problem.exact else 0.0


def _runs(problem: LayerProblem, groups: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(H_ii, L) of each run of input channels, (d / groups, d / groups) both."""

    def find() -> list[tuple[np.ndarray, np.ndarray]]:
        hessian = problem.shared_hessian()[0]
        part = len(hessian) // groups
        blocks = [hessian[i : i + part, i : i + part] for i in range(0, len(hessian), part)]
        return [(block, np.linalg.cholesky(block)) for block in blocks]

    return problem.once(("runs", groups), find)


def bases(problem: LayerProblem, groups: int, plain: bool) -> tuple[np.ndarray, np.ndarray]:
    """(B (groups, m, d / groups), A (groups, f, m)) of full rank m, the largest singular value of each run first.

    Rows of B are of energy b H_ii bᵀ = 1 (of length 1 where plain), and columns of A as long as the singular values.
    """

    def find() -> tuple[np.ndarray, np.ndarray]:
        parts = problem.weight[0].reshape(problem.weight.shape[1], groups, -1).transpose(1, 0, 2)
        if plain:
            left, values, right = np.linalg.svd(parts, full_matrices=False)
            return right, left * values[:, None, :]
        lowers = np.stack([lower for _, lower in _runs(problem, groups)])
        left, values, right = np.linalg.svd(parts @ lowers, full_matrices=False)
        rows = [solve_triangular(x, r.T, lower=True, trans="T").T for x, r in zip(lowers, right, strict=True)]
        return np.stack(rows), left * values[:, None, :]

    return problem.once(("bases", groups, plain), find)


def _swept(problem: LayerProblem, rows: np.ndarray, left: np.ndarray, sweeps: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs improved in turn: with T = W_i + Σ_m≠i (W_m - A_m B_m) H_mi H_ii⁻¹, what run i should be to make up for the
    errors of the others, and U the first eigenvectors of T H_ii Tᵀ, it becomes U Uᵀ T. The error never rises.
    """
    rank, part, weight = rows.shape[1], rows.shape[2], problem.weight[0]
    hessian, runs = problem.shared_hessian()[0], _runs(problem, len(rows))
    rows, left = rows.copy(), left.copy()
    missing = weight - np.concatenate(list(left @ rows), axis=1)
    for i, (own, lower) in [*enumerate(runs)] * sweeps:
        at = slice(i * part, (i + 1) * part)
        missing[:, at] = 0.0
        target = weight[:, at] + cho_solve((lower, True), (missing @ hessian[:, at]).T).T
        basis = np.linalg.eigh(target @ own @ target.T)[1][:, : -rank - 1 : -1]
        found = basis.T @ target
        sizes = np.sqrt(np.maximum(np.einsum("rd,rd->r", found @ own, found), 0.0))
        rows[i] = np.divide(found, sizes[:, None], out=np.zeros_like(found), where=sizes[:, None] > 0.0)
        left[i] = basis * sizes
        missing[:, at] = weight[:, at] - basis @ found
    return rows, left
