"""Options that keep every weight as a float: `dense` (float32, as it is) and `fp16`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress.compressors.base import LayerProblem, Realised
from autocompress.types import Option

__all__ = ["Plain"]


class Plain:
    """Float32 unchanged, or rounded to binary16. Source: IEEE 754."""

    version = 1
    source = "IEEE 754-2019"

    def offers(self, option: Option) -> bool:
        return option in (Option(), Option(half=True))

    def needs_data(self, option: Option) -> bool:
        return False

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        values = problem.weight.astype(np.float32).reshape(problem.shape)
        fits = bool(np.abs(values).max(initial=0.0) <= np.finfo(np.float16).max)
        return [
            Realised(problem.shape, "raw", values=values)
            if option.is_dense
            else Realised(problem.shape, "fp16", values=values)
            if fits
            else None
            for option in options
        ]
