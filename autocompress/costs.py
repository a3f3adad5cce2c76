"""What a choice costs when the model runs: MACs and BOPs, counted, and milliseconds, from a measured table.

All three are of one forward pass of one sample and over the layers that calibration reached; a file's bytes are
`records` and `storage`.

MACs    multiplications that a dense runtime carries out: weights times the positions that each is used at. Zeros count,
        since no runtime that we export to skips them, so only an option that changes a layer's shape changes its MACs:
        the factors of a low-rank one have those of both, and of the layer beside them, if there is one.
BOPs    b_w · b_a · MACs · density: what bit-serial or zero-skipping hardware would do. b_w is the least width that
        holds every code of the layer (16 or 32 for floats; that of each row, where rows have widths of their own, and
        that of each of three layers in the place of one),
        b_a = 32 as activations are floats, density the part of the weights that is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.types import Option

__all__ = ["ACTIVATION_BITS", "Cell", "Latency", "bops", "code_bits", "factor_shapes", "macs", "row_bits"]

ACTIVATION_BITS = 32
FLOAT_BITS = 32


def code_bits(codes: np.ndarray) -> int:
    """The least bits, at least 1, whose two's complement holds every code.

    >>> code_bits(np.array([-8, 7])), code_bits(np.array([8])), code_bits(np.array([0]))
    (4, 5, 1)
    """
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    return max((-low - 1).bit_length() if low < 0 else 0, high.bit_length()) + 1


def factor_shapes(shape: Sequence[int], option: Option) -> tuple[tuple[int, ...], ...]:
    """Shapes of the layers that a low-rank option makes of one of shape (out, in, *kernel): a grouped one with the
    kernel, from each of the `groups` runs of inputs to `rank` channels, then one of kernel 1; and, where the option has
    a residual, one as large as the whole. All are used at the positions of the output. Source: ALDS, arXiv 2107.11442,
    section 2.

    >>> factor_shapes((64, 32, 3, 3), Option.parse("k4r12"))
    ((48, 8, 3, 3), (64, 48, 1, 1))
    >>> factor_shapes((64, 32, 3, 3), Option.parse("rank2w4+w2"))
    ((2, 32, 3, 3), (64, 2, 1, 1), (64, 32, 3, 3))
    """
    out, inputs, *kernel = shape
    groups = option.groups or 1
    between = groups * (option.rank or 0)
    shapes = (between, inputs // groups, *kernel), (out, between, *(1 for _ in kernel))
    return shapes if option.residual is None else (*shapes, tuple(shape))


def row_bits(codes: np.ndarray) -> int:
    """Bits of all codes that are not zero, each as wide as its row: the sum over rows of b_w times its nonzeros.

    >>> row_bits(np.array([[0, 0], [-2, 1], [7, 0]]))
    8
    """
    rows = codes.reshape(len(codes), -1)
    return sum(code_bits(row) * int(np.count_nonzero(row)) for row in rows)


def macs(weights: int, positions: int, samples: int) -> int:
    """MACs of a layer for one sample, rounded up: each of its weights once per position, positions summed over samples.

    >>> macs(weights=432, positions=1024 * 64, samples=64)
    442368
    """
    return -(-weights * positions // max(samples, 1))


def bops(layer_macs: int, width: int = FLOAT_BITS, nonzero: int = 1, weights: int = 1) -> int:
    """BOPs of a layer, b_w · b_a · MACs · density, rounded up; the density is nonzero / weights.

    >>> bops(1000), bops(1000, width=4, nonzero=25, weights=100)
    (1024000, 32000)
    """
    return -(-width * ACTIVATION_BITS * layer_macs * nonzero // max(weights, 1))


@dataclass(frozen=True)
class Cell:
    """One entry of a table of times: `layers` of one `shape` (weight, geometry, input) held as `form` by the exporter.

    extra_ms: what each of them adds to the time of the dense model, in the model's own graph; less than 0 where the
    form is faster.
    """

    shape: str
    form: str
    layers: tuple[str, ...]
    extra_ms: float


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: those of the dense model, and what each option of each layer adds to them.

    predicted = dense_ms + Σ_layers extra_ms[layer][option]. A runtime fuses a layer with what stands around it, so a
    layer has no time of its own; what an option adds in the model's own graph is what a choice changes. `facts`: the
    machine, the versions and the settings that it was measured with.
    """

    dense_ms: float
    extra_ms: Mapping[str, Mapping[Option, float]]
    cells: Sequence[Cell]
    facts: Mapping[str, str]

    def predicted(self, layers: Mapping[str, Option]) -> float:
        """Milliseconds of a choice of options."""
        return self.dense_ms + sum(self.extra_ms[name][option] for name, option in layers.items())
