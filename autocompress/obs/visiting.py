"""The order in which a pass with one factor for all rows quantises columns."""

from __future__ import annotations

import math

import numpy as np

from autocompress.obs.pruning import hessian_scale
from autocompress.threads import single_threaded

__all__ = ["least_pivots"]

BLOCK = 64  # columns between two matrix products


def least_pivots(H: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """Columns of H (d, d) or (groups, d, d) as a Cholesky factorisation takes them that always goes on with the least
    pivot, int32 (d,) or (groups, d). A pass goes from the last to the first.

    With H = C Cᵀ in that order a pass makes an error of Σ_a C_aa² (ŵ_a - target_a)²/2. The product of the pivots C_aa²
    is det H in every order, and codes of one step miss their targets by the same on average: the more even the pivots,
    the smaller their sum. What no later column can make up for should therefore be what costs least. dtype: of the
    work. Raises ValueError if H is not positive definite. Source: this project; receivers order the signals of several
    antennas so (sorted QR decomposition, Wübben et al., Electronics Letters 37(22), 2001).
    """
    hessian = np.asarray(H, np.float64)
    found = np.empty(hessian.shape[:-1], np.int32)
    for h, order in zip(hessian.reshape(-1, *hessian.shape[-2:]), found.reshape(-1, hessian.shape[-1]), strict=True):
        scale = hessian_scale(h)
        left = np.empty(h.shape, dtype)
        for row, values in zip(left, h, strict=True):  # no second copy in float64: a wide layer's is large
            np.divide(values, scale, out=row, casting="same_kind")
        with single_threaded():
            order[:] = _order(left)
    return found


def _order(S: np.ndarray) -> np.ndarray:
    """The order of one H, which is overwritten: what is left of it stands in the lower right corner."""
    d = len(S)
    order, pivot = np.arange(d, dtype=np.int32), np.diag(S).astype(np.float64)
    for top in range(0, d, BLOCK):
        stop = min(top + BLOCK, d)
        L = np.zeros((stop - top, d), S.dtype)  # its rows are columns of the factor
        for k in range(top, stop):
            a = k + int(np.argmin(pivot[k:]))
            if not pivot[a] > 0.0:
                raise ValueError("the Hessian is not positive definite; add damping (calibrate does)")
            if a != k:
                S[[k, a]] = S[[a, k]]
                S[:, [k, a]] = S[:, [a, k]]
                L[:, [k, a]] = L[:, [a, k]]
                order[[k, a]], pivot[[k, a]] = order[[a, k]], pivot[[a, k]]
            column = L[k - top]
            column[k:] = (S[k, k:] - L[: k - top, k] @ L[: k - top, k:]) / S.dtype.type(math.sqrt(pivot[k]))
            pivot[k + 1 :] -= column[k + 1 :].astype(np.float64) ** 2
        S[stop:, stop:] -= L[:, stop:].T @ L[:, stop:]
    return order
