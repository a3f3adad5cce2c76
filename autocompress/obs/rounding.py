"""Compiled search for a grid: the error of rounding a row with many steps at once."""

from __future__ import annotations

import numpy as np
from numba import njit

from autocompress.obs.blas import FAST

__all__ = ["rounding_errors"]

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
HALF_ROOT = 0x95F619980C433  # what sqrt(1/2) lacks to 1 in the bits of a float64


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _powers(x: np.ndarray, exponent: float, m: int) -> float:
    """Sum of x^exponent over the first m of x >= 0, each to about 1e-11; x is overwritten.

    libm's power, which cannot be vectorised, would take nearly all of the time of a search.
    """
    bits = x.view(np.int64)
    total = 0.0
    for j in range(m):
        scale = (bits[j] + HALF_ROOT) >> 52  # of x = 2^(scale - 1023) y, sqrt(1/2) <= y < sqrt(2)
        bits[j] -= (scale - 1023) << 52
        s = (x[j] - 1.0) / (x[j] + 1.0)
        q = s * s
        series = s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13))))))
        power = exponent * ((scale - 1023) + 2.0 * LOG2_E * series)
        power = max(power, -1000.0)  # zero, and what is as good as zero
        whole = np.floor(power + 0.5)
        f = (power - whole) * LN_2
        y = 1.0 + f * (1.0 + f * (1 / 2 + f * (1 / 6 + f * (1 / 24 + f * (1 / 120 + f * (1 / 720 + f * (
            1 / 5040 + f * (1 / 40320 + f / 362880)))))))
        )  # fmt: skip
        x[j] = y
        bits[j] += np.int64(whole) << 52
        total += x[j]
    return total


@njit(nogil=True, cache=True)
def rounding_errors(
    weight: np.ndarray, scales: np.ndarray, low: float, high: float, exponent: float, errors: np.ndarray
) -> None:
    """errors[r, i] = Σ_j |weight[r, j] - q|^exponent with q the nearest of low ... high times scales[i]; float64."""
    rows, d = weight.shape
    x = np.empty(d)
    for r in range(rows):
        w = weight[r]
        for i in range(scales.shape[0]):
            step = scales[i]
            for j in range(d):
                x[j] = abs(w[j] - min(max(np.rint(w[j] / step), low), high) * step)
            errors[r, i] = _powers(x, exponent, d)
