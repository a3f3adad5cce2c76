"""Sparsity alone: `s75`, `2:4fp16`, `ch50`. Pruned and refitted weights that stay floats."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from autocompress.compressors.base import LayerProblem, Realised, by_structure
from autocompress.types import DENSE, Option

__all__ = ["Pruned"]


class Pruned:
    """Greedy OBS under a structure, what stays refitted; float32, or rounded to binary16. Stored as a mask and values.

    Source: OBC, arXiv 2208.11580, section 4.
    """

    version = 1
    source = "OBC, arXiv 2208.11580"

    def offers(self, option: Option) -> bool:
        structure = option.structure
        whole = structure == DENSE or option.rank is not None or option.words is not None
        return not whole and option in (structure, _half(structure))

    def needs_data(self, option: Option) -> bool:
        return True

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        found: dict[Option, Realised | None] = {}
        for structure, wanted in by_structure(options):
            if not problem.takes(structure):
                found |= dict.fromkeys(wanted)
                continue
            values = problem.refitted(structure).astype(np.float32).reshape(problem.shape)
            found[structure] = Realised(problem.shape, "masked", values=values)
            if _half(structure) in wanted:
                fits = bool(np.abs(values).max(initial=0.0) <= np.finfo(np.float16).max)
                rounded = values.astype(np.float16).astype(np.float32) if fits else values
                found[_half(structure)] = Realised(problem.shape, "masked", values=rounded) if fits else None
        return [found[o] for o in options]


def _half(structure: Option) -> Option:
    return dataclasses.replace(structure, half=True)
