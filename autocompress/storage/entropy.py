"""Adaptive entropy coding of integer tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.storage.bits import MAX_EXPANSION, least_bytes
from autocompress.storage.errors import FormatError
from autocompress.storage.kernels import RATES, decode_pass, encode_pass, measure_pass

__all__ = ["MAX_CODE", "coded_size", "decode_codes", "encode_codes", "order0_bits"]

MAX_CODE = 2**30  # largest magnitude of a code
_TRIAL = 1 << 16  # codes on which the rates are compared
_NO_BUFFER = np.zeros(0, np.uint8)


def order0_bits(codes: np.ndarray) -> float:
    """Compute the empirical entropy -sum n_v log2(n_v / n) of the codes, in bits for the whole tensor."""
    _, counts = np.unique(np.asarray(codes), return_counts=True)
    n = int(counts.sum())
    return float(-(counts * np.log2(counts / n)).sum()) if n else 0.0


def _matrix(codes: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Arrange codes as a C-ordered int32 matrix (rows, columns); also return kernel size and kernel width."""
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"codes are integers, got dtype {codes.dtype}")
    if codes.size and max(-int(codes.min()), int(codes.max())) > MAX_CODE:
        raise ValueError(f"codes have magnitudes of at most 2**30, got {max(-int(codes.min()), int(codes.max()))}")
    rows, columns, kernel, width = _layout(codes.shape)
    return np.ascontiguousarray(codes, np.int32).reshape(rows, columns), kernel, width


def _layout(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Split a shape into rows, columns, kernel positions per input channel and kernel width; a vector is one row."""
    numel = math.prod(shape)
    rows = int(shape[0]) if len(shape) > 1 else 1
    return rows, (numel // rows if rows else 0), max(math.prod(shape[2:]), 1), shape[-1] if len(shape) > 2 else 1


def _choose(matrix: np.ndarray, kernel: int, width: int) -> int:
    """Pick the adaptation rate that codes the first rows (about _TRIAL codes) best; ties go to the first."""
    trial = matrix[: max(_TRIAL // matrix.shape[1], 1)]
    sizes = [int(measure_pass(trial, kernel, width, rate, _NO_BUFFER, 0)) for rate in range(len(RATES))]
    return int(np.argmin(sizes))


def coded_size(codes: np.ndarray) -> int:
    """Count the bytes of `encode_codes(codes)` without making them."""
    matrix, kernel, width = _matrix(codes)
    if matrix.size == 0:
        return 0
    length = int(measure_pass(matrix, kernel, width, _choose(matrix, kernel, width), _NO_BUFFER, 0))
    return max(1 + length, least_bytes(matrix.size))


def encode_codes(codes: np.ndarray) -> bytes:
    """Entropy-code an integer array of shape (n,), (rows, columns) or (out, in, *kernel)."""
    matrix, kernel, width = _matrix(codes)
    if matrix.size == 0:
        return b""
    rate = _choose(matrix, kernel, width)
    # a decision costs at most 11 bits (its probability is at least 2**-11), a code at most 62 decisions
    largest = max(int(matrix.max()), -int(matrix.min()), 1).bit_length()
    buffer = np.zeros(16 + matrix.size * (2 * largest + 2) * 11 // 8, np.uint8)
    length = int(encode_pass(matrix, kernel, width, rate, buffer, buffer.size))
    payload = bytes([rate]) + buffer[:length].tobytes()
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
    if payload[0] >= len(RATES):
        raise FormatError(f"unknown entropy model {payload[0]}")
    rows, columns, kernel, width = _layout(shape)
    matrix = np.zeros((rows, columns), np.int32)
    buffer = np.frombuffer(payload, np.uint8)[1:]
    used = int(decode_pass(matrix, kernel, width, payload[0], buffer, buffer.size))
    if used < 0:
        raise FormatError("the payload ends before the last code")
    if buffer.size - used > 6 and (len(payload) != least_bytes(numel) or buffer[used + 6 :].any()):
        raise FormatError(f"{buffer.size - used} bytes follow the last code")
    return matrix.reshape(tuple(shape))
