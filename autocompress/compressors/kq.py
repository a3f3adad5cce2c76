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
    """Sizes x prices, numbers of 4 bits: experiments/codebooks_layers.py compares more."""
    counts = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    return [Option(words=words, price=price, bits=4) for words in counts for price in (2.0, 4.0, 8.0)]
