"""Codebooks: every run of consecutive weights of a row becomes one of a few vectors that all rows of a layer share.

Assignments are made one run of columns after the other, each against the error of those before it, and then once more
against that of all others; the codebook is what has the least error for all assignments at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autocompress.threads import single_threaded

__all__ = ["Assignment", "Runs"]

LLOYD = 12  # rounds of k-means
SAMPLE = 1 << 16  # runs that k-means sees at most
CHUNK = 1 << 22  # distances that are held at once
STEPS = 4  # of conjugate gradients in a refit
LEAST = 1e-20  # that a row weighs beside a price: float32 holds the quotient
FAINT = 1e-9  # of a mean diagonal: added where a block may be singular


@dataclass(frozen=True)
class Assignment:
    """index int64 (groups, rows, runs) of the word that each run becomes; `signed`: of its negative where negative.

    Plain: 0 ... K - 1. Signed: ±i for ± word i - 1, and 0 for the vector of zeros, which no codebook holds.
    """

    index: np.ndarray
    signed: bool

    def words(self, book: np.ndarray) -> np.ndarray:
        """What each run becomes, (groups, rows, runs, length)."""
        return _extended(book)[self.index + len(book)] if self.signed else book[self.index]


class Runs:
    """A layer cut into runs: weight (groups, rows, d), Hessian (groups, d, d) or None (columns on their own), runs of
    `length` consecutive columns, which divides d; row_weights (rows,): what the errors of each row weigh, else 1.

    With H = U Uᵀ, U upper triangular over the runs in the order in which they are assigned, ½ e H eᵀ is the sum over
    runs s of ½ ‖e_s U_ss + Σ_t<s e_t U_ts‖²: the distance of a word to the run's target, once those before are known.
    Sources: GPTQ's order of columns and error feedback (arXiv 2210.17323), for vectors as in GPTVQ (arXiv 2402.15319).
    """

    def __init__(
        self, weight: np.ndarray, hessian: np.ndarray | None, length: int, row_weights: np.ndarray | None = None
    ) -> None:
        groups, rows, d = weight.shape
        self.weight, self.hessian, self.length, self.row_weights = weight, hessian, length, row_weights
        self.shape = groups, rows, d // length, length
        self.vectors = np.ascontiguousarray(weight.reshape(self.shape))

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(order (groups, runs), U (groups, d, d) over the columns in that order): the runs of most energy first."""
        assert self.hessian is not None
        _, _, runs, length = self.shape
        columns = np.arange(runs * length).reshape(runs, length)
        orders, uppers = [], []
        with single_threaded():
            for h in self.hessian:
                energy = np.diag(h).reshape(runs, length).sum(axis=1)
                order = np.argsort(-energy, kind="stable")
                at = columns[order].ravel()
                try:
                    lower = np.linalg.cholesky(h[np.ix_(at, at)][::-1, ::-1])
                except np.linalg.LinAlgError:
                    raise ValueError("the Hessian is not positive definite; add damping") from None
                orders.append(order)
                uppers.append(lower[::-1, ::-1])
        return np.stack(orders), np.stack(uppers)

    def _pivots(self) -> np.ndarray:
        """U_ss of every run, (groups, runs, length, length), runs in their stored order."""
        groups, _, runs, length = self.shape
        order, upper = self.factors
        found = np.empty((groups, runs, length, length))
        for g in range(groups):
            for s, place in enumerate(order[g]):
                at = slice(s * length, (s + 1) * length)
                found[g, place] = upper[g, at, at]
        return found

    def error(self, change: np.ndarray) -> float:
        """½ tr(ΔW H ΔWᵀ) of a change in the shape of `vectors`."""
        flat = change.reshape(self.weight.shape)
        return float(0.5 * np.vdot(self._times(flat), flat))

    def _times(self, change: np.ndarray) -> np.ndarray:
        """ΔW H (groups, rows, d)."""
        if self.row_weights is not None:
            return change * self.row_weights[:, None]
        return change if self.hessian is None else change @ self.hessian

    def clustered(self, count: int, plain: bool) -> np.ndarray:
        """A codebook (count, length) by k-means: of least Σ ‖w - c‖² where plain; else of words up to their sign, where
        every run weighs what its U_ss says, and distances are those of the mean U_ss U_ssᵀ.

        Seeds are runs evenly spaced in the order of their length, as GPTVQ has them.
        """
        groups, rows, runs, length = self.shape
        weights, metric = np.ones((groups, rows, runs)), np.eye(length)
        if not plain and self.row_weights is not None:
            weights *= self.row_weights[None, :, None]
        elif not plain and self.hessian is not None:
            pivots = self._pivots()
            squares = pivots @ pivots.swapaxes(-1, -2)
            weights *= np.trace(squares, axis1=-2, axis2=-1)[:, None, :]
            metric = np.linalg.cholesky(squares.mean(axis=(0, 1)))
        total = groups * rows * runs
        some = np.arange(total) if total <= SAMPLE else np.linspace(0, total - 1, SAMPLE).astype(np.int64)
        points, mass = self.vectors.reshape(-1, length)[some] @ metric, weights.reshape(-1)[some]
        sizes = np.argsort((points**2).sum(axis=1), kind="stable")
        book = points[sizes[((np.arange(count) + 0.5) * len(points) / count).astype(int)]]
        for _ in range(LLOYD):
            which, sign = _unsigned(_nearest(points, book, not plain), not plain)
            book_mass = _sums(which, mass[:, None], count)
            sums = _sums(which, (mass * sign)[:, None] * points, count)
            book = np.where(book_mass > 0.0, sums / np.where(book_mass > 0.0, book_mass, 1.0), book)
        found: np.ndarray = np.linalg.solve(metric.T, book.T).T
        return found

    def nearest(self, book: np.ndarray) -> Assignment:
        """The word of least ‖w - c‖ of every run."""
        return Assignment(_nearest(self.vectors.reshape(-1, self.length), book, False).reshape(self.shape[:3]), False)

    def assigned(self, book: np.ndarray, bits: np.ndarray | None = None) -> Assignment:
        """The word of every run, up to its sign and with zeros, of least distance to its target plus bits.

        bits (2K + 1,): by index, from -K on, in units of the layer error.
        """
        groups, rows, runs, length = self.shape
        index = np.empty((groups, rows, runs), np.int64)
        if self.hessian is None:
            weights = np.ones(rows) if self.row_weights is None else self.row_weights
            flat = np.broadcast_to(weights[None, :, None], index.shape).reshape(-1)
            found = _nearest(self.vectors.reshape(-1, length), book, True, bits, flat)
            return Assignment(found.reshape(index.shape), True)
        words = _extended(book)
        order, upper = self.factors
        for g in range(groups):
            errors = np.zeros((rows, runs * length))
            for s, place in enumerate(order[g]):
                at = slice(s * length, (s + 1) * length)
                pivot = upper[g, at, at]
                target = self.vectors[g, :, place] @ pivot - errors[:, : at.start] @ upper[g, : at.start, at]
                index[g, :, place] = _nearest(target, book @ pivot, True, bits)
                errors[:, at] = words[index[g, :, place] + len(book)] - self.vectors[g, :, place]
        return Assignment(index, True)

    def improved(
        self, assignment: Assignment, book: np.ndarray, bits: np.ndarray | None = None, sweeps: int = 1
    ) -> Assignment:
        """A signed assignment after each run, in turn, became what is best beside the others as they are: with g =
        Σ_t≠s e_t H_ts, the nearest to w - g H_ss⁻¹ under H_ss. Error plus bits never rises. Source: coordinate descent
        as in QuantEase (arXiv 2309.01885), here on vectors.
        """
        if self.hessian is None:  # each run is the best already
            return assignment
        groups, length = len(self.weight), self.length
        words, index = _extended(book), assignment.index.copy()
        changes = (assignment.words(book) - self.vectors).reshape(self.weight.shape)
        for g, _ in itertools.product(range(groups), range(sweeps)):
            change, h = changes[g], self.hessian[g]
            for s in self.factors[0][g]:
                at = slice(s * length, (s + 1) * length)
                lower, inverse = self._own[g][s]
                pull = change @ h[:, at] - change[:, at] @ h[at, at]
                target = self.vectors[g, :, s] - pull @ inverse
                index[g, :, s] = _nearest(target @ lower, book @ lower, True, bits)
                change[:, at] = words[index[g, :, s] + len(book)] - self.vectors[g, :, s]
        return Assignment(index, True)

    @cached_property
    def _own(self) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """(lower factor, inverse) of H_ss of every run."""
        assert self.hessian is not None
        length = self.length
        blocks = [[h[s : s + length, s : s + length] for s in range(0, len(h), length)] for h in self.hessian]
        return [[(np.linalg.cholesky(block), np.linalg.inv(block)) for block in each] for each in blocks]

    def refitted(self, assignment: Assignment, book: np.ndarray, steps: int = STEPS) -> np.ndarray:
        """The codebook of least error ½ tr(ΔW H ΔWᵀ) for an assignment, from `book` on by conjugate gradients, with the
        diagonal blocks as preconditioner; words that no run has stay as they are. Its error is never above that of
        `book`.
        """
        count, length = book.shape
        which, sign = _unsigned(assignment.index.reshape(-1), assignment.signed)

        def product(change: np.ndarray) -> np.ndarray:
            """Σ over the runs of each word of what H makes of a change, (count, length)."""
            moved = self._times(change.reshape(self.weight.shape)).reshape(-1, length)
            return _sums(which, moved * sign[:, None], count)

        blocks = self._blocks(which.reshape(self.shape[:3]), count)
        unit = np.trace(blocks, axis1=1, axis2=2) / length
        blocks = blocks + (FAINT * unit + (unit == 0.0))[:, None, None] * np.eye(length)
        inverse = np.linalg.inv(blocks)
        x = book.copy()
        r = -product(assignment.words(x) - self.vectors)
        z = np.einsum("kij,kj->ki", inverse, r)
        p, rz = z, float(np.vdot(r, z))
        limit = 1e-16 * rz
        for _ in range(steps):
            if not rz > limit:
                break
            q = product(assignment.words(p))
            curvature = float(np.vdot(p, q))
            if not curvature > 0.0:
                break
            x = x + (rz / curvature) * p
            r = r - (rz / curvature) * q
            z = np.einsum("kij,kj->ki", inverse, r)
            rz, last = float(np.vdot(r, z)), rz
            p = z + (rz / last) * p
        return x

    def _blocks(self, which: np.ndarray, count: int) -> np.ndarray:
        """Σ of the diagonal blocks of H over the runs of each word, (count, length, length)."""
        groups, rows, runs, length = self.shape
        kept = which >= 0
        if self.hessian is None:
            weights = np.ones(rows) if self.row_weights is None else self.row_weights
            mass = np.bincount(which[kept], np.broadcast_to(weights[None, :, None], which.shape)[kept], count)
            return mass[:, None, None] * np.eye(length)
        place = np.arange(groups * runs).reshape(groups, 1, runs)
        cells = np.bincount((which * (groups * runs) + place)[kept], minlength=count * groups * runs)
        columns = np.arange(runs * length).reshape(runs, length)
        diagonal = np.stack([h[columns[:, :, None], columns[:, None, :]] for h in self.hessian])
        found: np.ndarray = (cells.reshape(count, -1).astype(np.float64) @ diagonal.reshape(groups * runs, -1)).reshape(
            count, length, length
        )
        return found


def _extended(book: np.ndarray) -> np.ndarray:
    """All words of a codebook up to sign: -K ... -1, zeros, 1 ... K."""
    return np.concatenate([-book[::-1], np.zeros_like(book[:1]), book])


def _unsigned(index: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(word, sign) of flat indices; -1 is the vector of zeros."""
    return (np.abs(index) - 1, np.sign(index).astype(np.float64)) if signed else (index, np.ones(len(index)))


def _sums(which: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Sums of values (n, columns) by word, (count, columns); those of word -1 are left out."""
    kept = which >= 0
    return np.stack([np.bincount(which[kept], column[kept], count) for column in values.T], axis=1)


def _nearest(
    points: np.ndarray,
    book: np.ndarray,
    signed: bool,
    bits: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Index of the word of least ½ weight ‖point - word‖² + bits for every point, int64 (n,); the first among equals.

    Distances are in float32.
    """
    magnitude = max(float(np.abs(points).max(initial=0.0)), float(np.abs(book).max(initial=0.0))) or 1.0
    words = ((_extended(book) if signed else book) / magnitude).astype(np.float32)
    half = 0.5 * np.einsum("kl,kl->k", words, words)
    price = None if bits is None else (bits / magnitude**2).astype(np.float32)
    found = np.empty(len(points), np.int64)
    step = max(CHUNK // len(words), 1)
    for i in range(0, len(points), step):
        cost = half - (points[i : i + step] / magnitude).astype(np.float32) @ words.T
        if price is not None:
            own = 1.0 if weights is None else np.maximum(weights[i : i + step, None], LEAST).astype(np.float32)
            cost += price / own
        found[i : i + step] = cost.argmin(axis=1)
    return found - len(book) if signed else found
