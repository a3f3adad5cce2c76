"""Codebooks: `pq4x64w6`, `pq4x64@1w6`, `pq4x64pw6`. Runs of consecutive weights become one of a few vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autocompress import obs
from autocompress.compressors.base import LayerProblem, Realised
from autocompress.obs import Assignment, Runs
from autocompress.types import Option

__all__ = ["ProductQuantised", "pq_grid"]

ROUNDS = 3  # of improving the assignment and refitting the codebook
SWEEPS = 2  # over the runs, once words are rounded
UNSEEN = 0.3  # added to how often a word was taken: none is forbidden


class ProductQuantised:
    """One codebook for the runs of a layer, of integers of `bits` bits times one step; indices are coded.

    Of least error on the inputs: runs are assigned one after the other with OBS error feedback; then assignments are
    improved, and words refitted to all of them at once, in turns (`obs.Runs`). `words` counts those that have an index:
    half of them less one are stored, the others are their negatives and the vector of zeros. The price of a bit is in
    units of the error of a weight without one: a run takes the word of least error + price · -log2(how frequent it is).
    Plain: k-means on the weights, all words stored, each run the nearest, as the papers have it. None where there are
    more words than runs, or runs do not fill a row.
    Sources: And the bit goes down, arXiv 1907.05686, and Quant-Noise, arXiv 2004.07320 (one codebook of a layer);
    GPTVQ, arXiv 2402.15319 (error feedback); ECVQ (Chou, Lookabaugh, Gray 1989) for the price.
    """

    version = 1
    source = "Quant-Noise, arXiv 2004.07320; GPTVQ, arXiv 2402.15319"

    def offers(self, option: Option) -> bool:
        return option.vector is not None and (option.bits or 0) >= 2

    def needs_data(self, option: Option) -> bool:
        return True

    def length(self, problem: LayerProblem, option: Option) -> int:
        """Weights of a run of that option."""
        return option.vector or 1

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        found: dict[Option, Realised | None] = dict.fromkeys(options)
        if problem.row_weights is not None and not problem.is_table:
            return [None] * len(options)  # a table that is the head too: rows would need a factorisation each
        lengths = {o: self.length(problem, o) for o in options}
        for length in sorted(set(lengths.values())):
            if length < 2 or problem.weight.shape[-1] % length:
                continue
            books = _Books(problem, length)
            for o in options:
                if lengths[o] == length and (o.words or 0) <= books.runs.vectors.size // length:
                    found[o] = books.plain(o) if o.plain else books.fitted(o)
        return [found[o] for o in options]


@dataclass(frozen=True)
class _Fit:
    """A codebook that is not rounded yet, the assignment it was fitted to, and the bits of each index."""

    book: np.ndarray
    chosen: Assignment
    bits: np.ndarray


class _Books:
    """Codebooks of the runs of one length of a layer; what options share is made once."""

    def __init__(self, problem: LayerProblem, length: int) -> None:
        self.shape, self.length = problem.shape, length
        self.magnitude = float(np.abs(problem.weight).max(initial=0.0)) or 1.0
        hessian = None if problem.is_table else problem.shared_hessian()
        heavy = problem.row_weights
        self.runs = Runs(
            problem.weight / self.magnitude, hessian, length, None if heavy is None else heavy / heavy.max()
        )
        self.known: dict[tuple[int, float], _Fit] = {}

    def plain(self, option: Option) -> Realised:
        words, step = _rounded(self.runs.clustered(option.words or 0, plain=True), option)
        return self._realised(words, step, self.runs.nearest(words * step))

    def fitted(self, option: Option) -> Realised:
        fit, price = self._priced(option.words or 0, option.price)

        def rounded(book: np.ndarray, chosen: Assignment) -> tuple[float, np.ndarray, float, Assignment]:
            words, step = _rounded(book, option)
            chosen = self.runs.improved(chosen, words * step, price * fit.bits, SWEEPS)
            cost = self.runs.error(chosen.words(words * step) - self.runs.vectors)
            return cost + price * float(fit.bits[chosen.index + len(book)].sum()), words, step, chosen

        first = rounded(fit.book, fit.chosen)
        second = rounded(self.runs.refitted(first[3], first[1] * first[2]), first[3])
        return self._realised(*min(first, second, key=lambda way: way[0])[1:])

    def _priced(self, words: int, price: float) -> tuple[_Fit, float]:
        """(codebook and assignment, price of a bit in units of the layer error)."""
        free = self.known.get((words, 0.0))
        if free is None:
            book = self.runs.clustered((words - 1) // 2, plain=False)
            free = self.known[words, 0.0] = self._fit(book, np.zeros(2 * len(book) + 1), 0.0)
        unit = price * self.runs.error(free.chosen.words(free.book) - self.runs.vectors) / self.runs.vectors.size
        if (words, price) not in self.known:
            self.known[words, price] = self._fit(free.book, free.bits, unit)
        return self.known[words, price], unit

    def _fit(self, book: np.ndarray, bits: np.ndarray, price: float) -> _Fit:
        chosen = self.runs.assigned(book, price * bits)
        for _ in range(ROUNDS):
            chosen = self.runs.improved(chosen, book, price * bits)
            book = self.runs.refitted(chosen, book)
            counts = np.bincount((chosen.index + len(book)).reshape(-1), minlength=len(bits)) + UNSEEN
            bits = -np.log2(0.5 * (counts + counts[::-1]) / counts.sum())
        return _Fit(book, chosen, bits)

    def _realised(self, words: np.ndarray, step: float, chosen: Assignment) -> Realised:
        codes = chosen.words(words).astype(np.int32).reshape(self.shape)
        return Realised(self.shape, "codebook", codes=codes, step=step * self.magnitude, vector=self.length)


def _rounded(book: np.ndarray, option: Option) -> tuple[np.ndarray, float]:
    """Integers of the option's bits, whose negatives are some too, and their step, as `obs.search_scale` finds it."""
    bits = option.bits or 8
    step = float(np.float32(obs.search_scale(book.reshape(1, -1), bits)[0]))
    most = 2 ** (bits - 1) - 1
    return np.clip(np.rint(book / step), -most, most), step


def pq_grid() -> list[Option]:
    """Runs of 2, 3, 4, 8 and 18 weights; a layer has those that fill its rows."""
    sizes = {2: (8, 16), 3: (8, 16, 32), 4: (16, 32, 64), 8: (16, 32, 64), 18: (8, 16)}
    return [
        Option(words=words, vector=length, price=price, bits=4)
        for length, counts in sizes.items()
        for words in counts
        for price in (2.0, 4.0)
    ]
