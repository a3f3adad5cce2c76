"""Adaptive entropy coding of integer tensors; `dependent` codes lie on a trellis, which saves bits (codec trellis)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.storage.bits import MAX_EXPANSION, least_bytes
from autocompress.storage.errors import FormatError
from autocompress.storage.kernels import DECODE, ENCODE, MEASURE, coder

__all__ = ["MAX_CODE", "MAX_ROW", "coded_size", "decode_codes", "encode_codes", "order0_bits"]

MAX_CODE = 2**30  # largest magnitude of a code
MAX_ROW = 2**20  # longest row, in codes, that a model may walk: bounds the coder's working memory
_TRIAL = 1 << 16  # codes on which the models are compared
_NO_BUFFER = np.zeros(0, np.uint8)


def order0_bits(codes: np.ndarray) -> float:
    """Compute the empirical entropy -sum n_v log2(n_v / n) of the codes, in bits for the whole tensor."""
    _, counts = np.unique(np.asarray(codes), return_counts=True)
    n = int(counts.sum())
    return float(-(counts * np.log2(counts / n)).sum()) if n else 0.0


def _block(codes: np.ndarray) -> tuple[np.ndarray, int]:
    """Check codes and view them as int32 (rows, channels, kernel); also return the kernel's width."""
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"codes are integers, got dtype {codes.dtype}")
    largest = max(-int(codes.min()), int(codes.max())) if codes.size else 0
    if largest > MAX_CODE:
        raise ValueError(f"codes have magnitudes of at most 2**30, got {largest}")
    layout, width = _layout(codes.shape)
    return np.ascontiguousarray(codes, np.int32).reshape(layout), width


def _layout(shape: Sequence[int]) -> tuple[tuple[int, int, int], int]:
    """Split a shape into (rows, channels, kernel positions) and the kernel's width; a vector is one row."""
    if len(shape) < 2:
        return (1, math.prod(shape), 1), 1
    return (shape[0], shape[1], math.prod(shape[2:])), shape[-1] if len(shape) > 2 else 1


def _oriented(block: np.ndarray, model: int) -> np.ndarray:
    """View the block in the order in which a model walks it: models 2 and 3 take input channels as rows."""
    return block.swapaxes(0, 1) if model & 2 else block


def _row(block: np.ndarray, model: int) -> int:
    """Count the codes of a row as a model walks it."""
    return block.size // block.shape[1 if model & 2 else 0]


def _measure(block: np.ndarray, width: int, model: int, dependent: bool) -> int:
    """Count the range coder's bytes under one model. Raises ValueError for dependent codes that leave the trellis."""
    length = int(coder(MEASURE, dependent)(_oriented(block, model), width, model, _NO_BUFFER))
    if length < 0:
        raise _off_the_trellis()
    return length


def _off_the_trellis() -> ValueError:
    return ValueError("the codes do not lie on the trellis; use the codec entropy, which takes any codes")


def _choose(block: np.ndarray, width: int, dependent: bool) -> tuple[int, int]:
    """Pick a model by what it makes of the block's corner of about _TRIAL codes: the orientation, then the rate.

    Returns (model, bytes of the corner). Ties go to the lower number.
    """
    models = [model for model in (0, 2) if _row(block, model) <= MAX_ROW]
    if not models:
        shortest = min(_row(block, 0), _row(block, 2))
        raise ValueError(f"the entropy codec walks rows of at most {MAX_ROW} codes, got {shortest}")
    edge = math.isqrt(max(_TRIAL // block.shape[2], 1))
    rows = max(edge, _TRIAL // block.shape[2] // max(block.shape[1], 1))
    channels = max(edge, _TRIAL // block.shape[2] // max(block.shape[0], 1))
    corner = block[:rows, :channels]
    sizes = {model: _measure(corner, width, model, dependent) for model in models}
    other = min(models, key=lambda m: (sizes[m], m)) + 1
    sizes[other] = _measure(corner, width, other, dependent)
    model = min(sizes, key=lambda m: (sizes[m], m))
    return model, sizes[model]


def coded_size(codes: np.ndarray, dependent: bool = False) -> int:
    """Count the bytes of `encode_codes(codes, dependent)` without making them."""
    block, width = _block(codes)
    if block.size == 0:
        return 0
    model, length = _choose(block, width, dependent)
    if block.size > _TRIAL:
        length = _measure(block, width, model, dependent)
    return max(1 + length, least_bytes(block.size))


def encode_codes(codes: np.ndarray, dependent: bool = False) -> bytes:
    """Entropy-code an integer array of shape (n,), (rows, columns) or (out, in, *kernel).

    Layout: one byte for the model (bit 0 the adaptation rate, bit 1 input channels as rows), then the range coder's
    bytes, filled with zeros to `least_bytes`. Raises ValueError for dependent codes that leave the trellis.
    """
    block, width = _block(codes)
    if block.size == 0:
        return b""
    model, length = _choose(block, width, dependent)
    if block.size > _TRIAL:
        # a decision costs at most 11 bits, since its probability is at least 2**-11
        largest = max(int(block.max()), -int(block.min()), 1).bit_length()
        length = block.size * (2 * largest + 1) * 11 // 8
    buffer = np.zeros(length + 16, np.uint8)
    length = int(coder(ENCODE, dependent)(_oriented(block, model), width, model, buffer))
    if length < 0:
        raise _off_the_trellis()
    payload = bytes([model]) + buffer[:length].tobytes()
    return payload.ljust(least_bytes(block.size), b"\0")


def decode_codes(payload: bytes, shape: Sequence[int], dependent: bool = False) -> np.ndarray:
    """Undo `encode_codes`: the int32 codes of the given shape. Raises FormatError on a payload that is not one."""
    numel = math.prod(shape)
    if numel == 0:
        if payload:
            raise FormatError(f"an empty tensor has no payload, got {len(payload)} bytes")
        return np.zeros(tuple(shape), np.int32)
    if not payload or numel > MAX_EXPANSION * len(payload):
        raise FormatError(f"{len(payload)} bytes cannot hold {numel} codes")
    if payload[0] > 3:
        raise FormatError(f"unknown entropy model {payload[0]}; this version knows 0 to 3")
    layout, width = _layout(shape)
    longest = numel // layout[1 if payload[0] & 2 else 0]
    if longest > MAX_ROW:
        raise FormatError(f"a row of {longest} codes; at most {MAX_ROW}")
    block = np.zeros(layout, np.int32)
    buffer = np.frombuffer(payload, np.uint8)[1:].copy()
    used = int(coder(DECODE, dependent)(_oriented(block, payload[0]), width, payload[0], buffer))
    if used < 0:
        raise FormatError("the payload ends before the last code")
    if buffer.size - used > 6 and (len(payload) != least_bytes(numel) or buffer[used + 6 :].any()):
        raise FormatError(f"{buffer.size - used} bytes follow the last code")
    return block.reshape(tuple(shape))
