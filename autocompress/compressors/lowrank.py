"""Low rank: `rank32`, `k4r12w8`, `rank32pfp16`. One layer becomes two thinner ones, floats or quantised with error
feedback.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.linalg import block_diag, solve_triangular

from autocompress.compressors.base import LayerProblem, Realised
from autocompress.compressors.obc import ObcUniform
from autocompress.costs import factor_shapes
from autocompress.types import Option

__all__ = ["LowRank", "lowrank_grid"]

FAINT = 1e-9  # of the mean diagonal: added where a Hessian of features may be singular


class LowRank:
    """W (f, d) ≈ A B: B has `rank` rows for each of k consecutive runs of input channels, zero elsewhere, and A (f, k ·
    rank) all of them.

    Of least error: with H_ii = L Lᵀ the Hessian of a run and W_i L = U S Vᵀ, B_i holds the first rows of Vᵀ L⁻¹, which
    for k = 1 is the minimum of ½ tr((W - AB) H (W - AB)ᵀ) over all of that rank (Eckart and Young); A is then refitted
    to all runs at once, A = W H Bᵀ (B H Bᵀ)⁻¹. Plain: W_i = U S Vᵀ, and A_i B_i = U S Vᵀ truncated, whatever the
    inputs. Rows of B and columns of A have equal norms: U√S and √S Vᵀ. Quantised: rows of B are OBQ's, with H_ii as
    their Hessian, A is refitted to what they became, and is OBQ's with the Hessian B H Bᵀ. None where two layers would
    hold no fewer weights than one. Sources: ALDS, arXiv 2107.11442 (runs, factors, two layers); the error as in OBC,
    arXiv 2208.11580.
    """

    version = 1
    source = "ALDS, arXiv 2107.11442"

    def offers(self, option: Option) -> bool:
        plain = Option(rank=option.rank, groups=option.groups, plain=option.plain) if option.rank else None
        return plain is not None and option == dataclasses.replace(plain, bits=option.bits, half=option.half)

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        return [_realised(problem, option) if _takes(problem, option) else None for option in options]


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


def _realised(problem: LayerProblem, option: Option) -> Realised | None:
    pair = _floats(problem, option) if option.bits is None else _quantised(problem, option)
    return None if pair is None else Realised(problem.shape, pair[0].codec, factors=pair)


def _floats(problem: LayerProblem, option: Option) -> tuple[Realised, Realised] | None:
    """Both factors as floats; A is refitted to B as it is stored, unless the option is plain."""
    groups, rank = option.groups or 1, option.rank or 0
    whole, left = _bases(problem, groups, option.plain)
    rows = whole[:, :rank].reshape(groups * rank, -1)
    columns = left[:, :, :rank].transpose(1, 0, 2).reshape(len(left[0]), -1)
    dtype = np.float16 if option.half else np.float32
    if not option.plain:
        columns = _refitted(problem, rows, groups)[0]
    norms = np.linalg.norm(rows, axis=1), np.linalg.norm(columns, axis=0)
    balance = np.sqrt(np.divide(norms[1], norms[0], out=np.zeros_like(norms[0]), where=norms[0] > 0.0))
    balance[balance == 0.0] = 1.0
    rows, columns = rows * balance[:, None], columns / balance
    if max(np.abs(rows).max(initial=0.0), np.abs(columns).max(initial=0.0)) > np.finfo(dtype).max:
        return None
    rows = rows.astype(dtype).astype(np.float32)
    if option.half and not option.plain:
        columns = _refitted(problem, rows.astype(np.float64), groups)[0]
    codec, shapes = "fp16" if option.half else "raw", factor_shapes(problem.shape, option)
    limit = np.finfo(dtype).max
    columns = columns.clip(-limit, limit).astype(dtype).astype(np.float32)
    return (
        Realised(shapes[0], codec, values=rows.reshape(shapes[0])),
        Realised(shapes[1], codec, values=columns.reshape(shapes[1])),
    )


def _quantised(problem: LayerProblem, option: Option) -> tuple[Realised, Realised] | None:
    """Both factors as codes with a step per row: B by the Hessians of its inputs, A by that of what B makes of them."""
    groups, rank, shapes = option.groups or 1, option.rank or 0, factor_shapes(problem.shape, option)
    whole = _coded_rows(problem, groups, option)
    if whole is None or whole.codes is None:
        return None
    # Rows do not depend on each other, nor a row on how many there are.
    taken = (np.arange(groups)[:, None] * (whole.shape[0] // groups) + np.arange(rank)).ravel()
    step = whole.step[taken] if isinstance(whole.step, np.ndarray) else whole.step
    first = Realised(shapes[0], whole.codec, codes=whole.codes[taken].reshape(shapes[0]), step=step)
    columns, hessian = _refitted(problem, first.weight().astype(np.float64).reshape(len(taken), -1), groups)
    inner = LayerProblem(problem.name, columns.shape, columns[None], hessian[None], exact_limit=problem.exact_limit)
    second = ObcUniform().realise_all(inner, [Option(bits=option.bits)])[0]
    if second is None or second.codes is None:
        return None
    return first, dataclasses.replace(second, shape=shapes[1], codes=second.codes.reshape(shapes[1]))


def _hessians(problem: LayerProblem, groups: int) -> np.ndarray:
    """The Hessian of each run of input channels, (groups, d / groups, d / groups)."""
    hessian = problem.shared_hessian()[0]
    part = len(hessian) // groups
    return np.stack([hessian[i : i + part, i : i + part] for i in range(0, len(hessian), part)])


def _bases(problem: LayerProblem, groups: int, plain: bool) -> tuple[np.ndarray, np.ndarray]:
    """(B (groups, m, d / groups), A (groups, f, m)) of full rank m, the most important direction of each run first."""

    def find() -> tuple[np.ndarray, np.ndarray]:
        rows = problem.weight.shape[1]
        parts = problem.weight[0].reshape(rows, groups, -1).transpose(1, 0, 2)
        if plain:
            left, values, right = np.linalg.svd(parts, full_matrices=False)
            return right, left * values[:, None, :]
        lower = np.linalg.cholesky(_hessians(problem, groups))
        left, values, right = np.linalg.svd(parts @ lower, full_matrices=False)
        whitened = [solve_triangular(x, r.T, lower=True, trans="T").T for x, r in zip(lower, right, strict=True)]
        return np.stack(whitened), left * values[:, None, :]

    return problem.once(("bases", groups, plain), find)


def _coded_rows(problem: LayerProblem, groups: int, option: Option) -> Realised | None:
    """All rows of B as codes of so many bits, (groups · m, d / groups)."""

    def find() -> Realised | None:
        rows = _bases(problem, groups, option.plain)[0]
        peak = np.abs(rows).max(axis=-1, keepdims=True)
        rows = np.divide(rows, peak, out=np.zeros_like(rows), where=peak > 0.0)  # steps have a row's size anyway
        shape = (rows.shape[0] * rows.shape[1], rows.shape[2])
        key = ("rows", groups, option.plain)
        inner = problem.once(
            key,
            lambda: LayerProblem(
                problem.name, shape, rows, _hessians(problem, groups), exact_limit=problem.exact_limit
            ),
        )
        return ObcUniform().realise_all(inner, [Option(bits=option.bits)])[0]

    return problem.once(("codes", groups, option.plain, option.bits), find)


def _refitted(problem: LayerProblem, rows: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(A (f, groups · rank) of least error for B = `rows` (groups · rank, d / groups), the Hessian B H Bᵀ + what keeps
    it regular).
    """
    wide = block_diag(*np.split(rows, groups))
    target = problem.once("targets", lambda: problem.weight[0] @ problem.shared_hessian()[0])
    inner = wide @ problem.shared_hessian()[0] @ wide.T
    inner = 0.5 * (inner + inner.T)
    inner += (FAINT * np.diag(inner).mean() or 1.0) * np.eye(len(inner))
    return np.linalg.solve(inner, wide @ target.T).T, inner
