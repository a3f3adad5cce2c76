"""BLAS and LAPACK from compiled loops: SciPy's own library, called through function addresses.

An address is an argument, not a global, so that numba can keep the compiled code on disk: start-up would cost seconds
otherwise. Every call here works on one thread as long as BLAS is held to one (`autocompress.threads`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import get_cython_function_address, intrinsic

__all__ = ["DPOTRF", "DPOTRI", "DPOTRS", "FAST", "POTRF", "SYRK", "gram", "in_place", "solve", "syrk_lower"]

SYRK: int = get_cython_function_address("scipy.linalg.cython_blas", "ssyrk")
POTRF: int = get_cython_function_address("scipy.linalg.cython_lapack", "spotrf")
DPOTRF: int = get_cython_function_address("scipy.linalg.cython_lapack", "dpotrf")
DPOTRS: int = get_cython_function_address("scipy.linalg.cython_lapack", "dpotrs")
DPOTRI: int = get_cython_function_address("scipy.linalg.cython_lapack", "dpotri")

# contract: fused multiply-add. reassoc: vectorised sums. The order of operations is fixed at compile time, so results
# repeat.
FAST = {"contract", "reassoc", "nsz", "arcp"}


@intrinsic
def _call_pointers(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call a C function of the given address whose arguments are all pointers, given as a tuple of integers."""
    signature = types.void(address, arguments)
    count = len(arguments)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [pointer] * count)
        function = builder.inttoptr(values[0], function_type.as_pointer())
        items = [builder.inttoptr(builder.extract_value(values[1], i), pointer) for i in range(count)]
        builder.call(function, items)
        return context.get_dummy_value()

    return signature, codegen


@njit(nogil=True, cache=True)
def syrk_lower(address: int, G: np.ndarray, U: np.ndarray, m: int, k: int) -> None:
    """G[:m, :m] -= U[:k, :m].T @ U[:k, :m] in float32, lower half of the row-major G only (BLAS sees its transpose: the
    upper half).
    """
    ints = np.array((m, k, U.shape[1], G.shape[1]), np.int32)
    reals = np.array((-1.0, 1.0), np.float32)
    chars = np.array((85, 78), np.uint8)  # 'U', 'N'
    i = ints.ctypes.data
    r = reals.ctypes.data
    c = chars.ctypes.data
    _call_pointers(address, (c, c + 1, i, i + 4, r, U.ctypes.data, i + 8, r + 4, G.ctypes.data, i + 12))


@njit(nogil=True, cache=True)
def gram(address: int, A: np.ndarray, G: np.ndarray, by_rows: bool, beta: float) -> None:
    """G = beta G + A Aᵀ (by_rows), or beta G + Aᵀ A, in float32, on and above the diagonal of the row-major G only.

    Unlike SciPy's own function it lets other Python threads run.
    """
    d, k = (A.shape[0], A.shape[1]) if by_rows else (A.shape[1], A.shape[0])
    ints = np.array((d, k, A.shape[1], d), np.int32)
    reals = np.array((1.0, beta), np.float32)
    chars = np.array((76, 84 if by_rows else 78), np.uint8)  # 'L', 'T' or 'N': BLAS sees the transposes
    i = ints.ctypes.data
    r = reals.ctypes.data
    c = chars.ctypes.data
    _call_pointers(address, (c, c + 1, i, i + 4, r, A.ctypes.data, i + 8, r + 4, G.ctypes.data, i + 12))


@njit(nogil=True, cache=True)
def in_place(address: int, A: np.ndarray, m: int) -> bool:
    """POTRF or POTRI on A[:m, :m] in place, upper half of the row-major A (LAPACK sees its transpose: the lower half).

    POTRF: A = C Cᵀ, with Cᵀ in the upper half. POTRI, after it: the inverse. Returns whether it could be done.
    """
    ints = np.array((m, A.shape[1], 0), np.int32)
    chars = np.array((76,), np.uint8)  # 'L'
    i = ints.ctypes.data
    _call_pointers(address, (chars.ctypes.data, i, A.ctypes.data, i + 4, i + 8))
    return ints[2] == 0


@njit(nogil=True, cache=True)
def solve(address: int, A: np.ndarray, X: np.ndarray) -> None:
    """POTRS: each row of X becomes its solution under the matrix whose factor POTRF left in A; A may be a corner of a
    larger one, whose trailing part it then factorises.
    """
    item = A.itemsize
    ints = np.array((A.shape[0], X.shape[0], A.strides[0] // item, X.shape[1], 0), np.int32)
    chars = np.array((76,), np.uint8)  # 'L'
    i = ints.ctypes.data
    _call_pointers(address, (chars.ctypes.data, i, i + 4, A.ctypes.data, i + 8, X.ctypes.data, i + 12, i + 16))
