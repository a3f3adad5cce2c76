"""Adaptive entropy coding of integer tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.storage.bits import MAX_EXPANSION, least_bytes
from autocompress.storage.errors import FormatError
from autocompress.storage.kernels import decode_pass, encode_pass, measure_pass

__all__ = ["MAX_CODE", "coded_size", "decode_codes", "encode_codes", "order0_bits"]

MAX_CODE = 2**30  # largest magnitude of a code
_RATES = (5, 7)
_NO_BUFFER = np.zeros(0, np.uint8)


def order0_bits(codes: np.ndarray) -> float:
    """Compute the empirical entropy -sum n_v log2(n_v / n) of the codes, in bits for the whole tensor."""
    _, counts = np.unique(np.asarray(codes), return_counts=True)
    n = int(counts.sum())
    return float(-(counts * np.log2(counts / n)).sum()) if n else 0.0


def _matrix(codes: np.ndarray) -> tuple[np.ndarray, int]:
    """Arrange codes as a C-ordered int32 matrix (rows, columns) and return the kernel size, both from the shape alone."""
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"codes are integers, got dtype {codes.dtype}")
    if codes.size and max(-int(codes.min()), int(codes.max())) > MAX_CODE:
        raise ValueError(f"codes have magnitudes of at most 2**30, got {int(np.abs(codes).max())}")
    rows, columns, kernel = _layout(codes.shape)
    return np.ascontiguousarray(codes, np.int32).reshape(rows, columns), kernel


def _layout(shape: Sequence[int]) -> tuple[int, int, int]:
    """Split a shape into rows, columns and kernel positions per input channel; a vector is one row."""
    numel = math.prod(shape)
    rows = int(shape[0]) if len(shape) > 1 else 1
    return rows, (numel // rows if rows else 0), max(math.prod(shape[2:]), 1)


def _choose(matrix: np.ndarray, kernel: int) -> tuple[int, int]:
    """Pick the adaptation rate with the shortest code; ties go to the first. Returns (rate index, bytes)."""
    sizes = [int(measure_pass(matrix, kernel, rate, _NO_BUFFER, 0)[0]) for rate in _RATES]
    best = int(np.argmin(sizes))
    return best, sizes[best]


def coded_size(codes: np.ndarray) -> int:
    """Count the bytes of `encode_codes(codes)` without making them."""
    matrix, kernel = _matrix(codes)
    if matrix.size == 0:
        return 0
    return max(1 + _choose(matrix, kernel)[1], least_bytes(matrix.size))


def encode_codes(codes: np.ndarray) -> bytes:
    """Entropy-code an integer array of shape (n,), (rows, columns) or (out, in, *kernel)."""
    matrix, kernel = _matrix(codes)
    if matrix.size == 0:
        return b""
    choice, length = _choose(matrix, kernel)
    buffer = np.zeros(length + 16, np.uint8)
    written = int(encode_pass(matrix, kernel, _RATES[choice], buffer, 0)[0])
    assert written == length
    payload = bytes([choice]) + buffer[:length].tobytes()
    return payload.ljust(least_bytes(matrix.size), b"\0")


def decode_codes(payload: bytes, shape: Sequence[int]) -> np.ndarray:
    """Undo `encode_codes`: the int32 codes of the given shape. Raises FormatError on a payload that is not one."""
    numel = math.prod(shape)
    if numel == 0:
        if payload:
            raise FormatError(f"an empty tensor has no payload, got {len(payload)} bytes")
        return np.zeros(tuple(shape), np.int32)
    if not payload or numel > MAX_EXPANSION * len(payload):
        raise FormatError(f"{len(payload)} bytes cannot hold {numel} codes")
    if payload[0] >= len(_RATES):
        raise FormatError(f"unknown entropy model {payload[0]}")
    rows, columns, kernel = _layout(shape)
    matrix = np.zeros((rows, columns), np.int32)
    buffer = np.frombuffer(payload, np.uint8)[1:]
    used = int(decode_pass(matrix, kernel, _RATES[payload[0]], buffer, buffer.size)[0])
    if used < 0:
        raise FormatError("the payload ends before the last code")
    if buffer.size - used > 6 and (len(payload) != least_bytes(numel) or buffer[used + 6 :].any()):
        raise FormatError(f"{buffer.size - used} bytes follow the last code")
    return matrix.reshape(tuple(shape))
