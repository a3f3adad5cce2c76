"""Kernel quantisation: `kq64w6`, `kq64@1w6`, `kq64pw6`. Each kernel of a convolution becomes one of a few kernels."""

from __future__ import annotations

import math

from autocompress.compressors.base import LayerProblem
from autocompress.compressors.pq import ProductQuantised
from autocompress.types import Option

__all__ = ["KernelQuantised", "kq_grid"]


class KernelQuantised(ProductQuantised):
    """As `pq`, a run being the weights of one kernel: those of an output for an input channel.

    None where a kernel is one weight, as in linear layers. Source: Kernel Quantization, arXiv 2003.05148 (a codebook of
    kernels with 6 bits per number; log2 K / k² + 6 K k² / N bits per weight); plain is its k-means without the
    fine-tuning.
    """

    source = "Kernel Quantization, arXiv 2003.05148"

    def offers(self, option: Option) -> bool:
        return option.words is not None and option.vector is None and (option.bits or 0) >= 2

    def length(self, problem: LayerProblem, option: Option) -> int:
        return math.prod(problem.shape[2:])


def kq_grid() -> list[Option]:
    """Sizes x prices x bits of a kernel's numbers (experiments/codebooks_layers.py)."""
    return [
        Option(words=words, price=price, bits=bits)
        for words in (8, 16, 32, 64, 128, 256)
        for price in (0.0, 1.0, 2.0)
        for bits in (4, 6)
    ]
