"""Codecs for arrays of floats: raw, fp16, and small floats with as many mantissa bits as each tensor needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.storage.bits import Cursor, least_bytes, pack_bits, packed_bytes, unpack_bits
from autocompress.storage.errors import FormatError

_CHUNK = 1 << 16  # values decoded at once

__all__ = [
    "DTYPES",
    "decode_fp16",
    "decode_raw",
    "decode_small",
    "encode_fp16",
    "encode_raw",
    "encode_small",
    "fp16_size",
    "raw_size",
    "round_small",
    "small_size",
]

DTYPES = (
    "float32", "float16", "float64", "bool", "uint8", "int8", "uint16", "int16",
    "uint32", "int32", "uint64", "int64",
)  # fmt: skip  # position = number in a file


def _dtype(name: str) -> np.dtype:
    """Return the little-endian numpy dtype of a listed name."""
    if name not in DTYPES:
        raise FormatError(f"unknown dtype {name!r}; this version knows {', '.join(DTYPES)}")
    return np.dtype(name).newbyteorder("<")


def _exact_length(payload: bytes, wanted: int) -> None:
    if len(payload) != wanted:
        raise FormatError(f"{wanted} bytes wanted, got {len(payload)}")


def raw_size(array: np.ndarray) -> int:
    """Count the bytes of the array's elements."""
    return int(array.size * array.dtype.itemsize)


def encode_raw(array: np.ndarray) -> bytes:
    """Store the elements in C order, little endian, in the array's own dtype."""
    return np.ascontiguousarray(array, _dtype(array.dtype.name)).tobytes()


def decode_raw(payload: bytes, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Undo `encode_raw`."""
    kind = _dtype(dtype)
    _exact_length(payload, math.prod(shape) * kind.itemsize)
    if dtype == "bool" and payload.strip(b"\0\x01"):
        raise FormatError("a boolean that is neither 0 nor 1")
    return np.frombuffer(payload, kind).astype(np.dtype(dtype)).reshape(tuple(shape))


def fp16_size(array: np.ndarray) -> int:
    """Count two bytes per element."""
    return 2 * int(array.size)


def encode_fp16(array: np.ndarray) -> bytes:
    """Round to IEEE binary16, little endian. Raises ValueError where a finite value would become infinite."""
    wide = np.asarray(array, np.float64)
    if (np.abs(wide[np.isfinite(wide)]) >= 65520).any():
        raise ValueError(f"fp16 holds magnitudes below 65520, got {np.abs(wide[np.isfinite(wide)]).max()}")
    return np.ascontiguousarray(wide.astype("<f2")).tobytes()


def decode_fp16(payload: bytes, shape: Sequence[int], dtype: str = "float32") -> np.ndarray:
    """Undo `encode_fp16`, in the float dtype asked for."""
    _exact_length(payload, 2 * math.prod(shape))
    if _dtype(dtype).kind != "f":
        raise FormatError(f"fp16 values cannot become {dtype}")
    return np.frombuffer(payload, "<f2").astype(np.dtype(dtype)).reshape(tuple(shape))


def _split(array: np.ndarray, mantissa: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round to sign * 2**exponent * (1 + fraction / 2**mantissa), to nearest even; zeros have fraction -1."""
    wide = np.asarray(array, np.float64).reshape(-1)
    if not np.isfinite(wide).all():
        raise ValueError("small floats are finite")
    significand, exponent = np.frexp(np.abs(wide))  # in [0.5, 1)
    scaled = np.rint(significand * 2.0 ** (mantissa + 1)).astype(np.int64)
    over = scaled == 2 ** (mantissa + 1)
    scaled[over] >>= 1
    exponent = exponent.astype(np.int64) - 1 + over
    return wide < 0, exponent, np.where(wide == 0, -1, scaled - 2**mantissa)


def round_small(array: np.ndarray, mantissa: int) -> np.ndarray:
    """Round each element to `mantissa` bits behind its leading one (0 to 23), keeping shape and dtype."""
    negative, exponent, fraction = _split(array, mantissa)
    value = np.where(fraction < 0, 0.0, np.ldexp(1.0 + fraction / 2.0**mantissa, exponent))
    return np.where(negative, -value, value).astype(array.dtype).reshape(array.shape)


def _mantissa(array: np.ndarray) -> int:
    """Count the mantissa bits that the values really use (0 to 52)."""
    wide = np.asarray(array, np.float64).reshape(-1)
    if not np.isfinite(wide).all():
        raise ValueError("small floats are finite")
    bits = (np.frexp(wide)[0] * 2.0**53).astype(np.int64)
    used = int(np.bitwise_or.reduce(np.abs(bits))) if bits.size else 0
    return max(52 - ((used & -used).bit_length() - 1), 0) if used else 0


def _small_parts(array: np.ndarray) -> tuple[int, int, int, int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (mantissa bits, exponent bits, lowest exponent, sign bits, split values)."""
    mantissa = _mantissa(array)
    if mantissa > 23:
        raise ValueError(f"small floats have at most 23 mantissa bits, got {mantissa}; use round_small first")
    negative, exponent, fraction = _split(array, mantissa)
    kept = exponent[fraction >= 0]
    if kept.size and (kept.min() < -149 or kept.max() > 127):
        raise ValueError(f"small floats have exponents from -149 to 127, got {kept.min()} to {kept.max()}")
    low = int(kept.min()) if kept.size else 0
    zeros = 1 if (fraction < 0).any() else 0
    levels = (int(kept.max()) - low if kept.size else 0) + zeros
    return mantissa, levels.bit_length(), low - zeros, int(negative.any()), (negative, exponent, fraction)


def small_size(array: np.ndarray) -> int:
    """Count 4 + ceil(n * (sign + exponent + mantissa bits) / 8) bytes, each width as small as the values allow."""
    mantissa, width, _, signed, _ = _small_parts(array)
    return max(4 + packed_bytes(int(array.size), mantissa + width + signed), least_bytes(int(array.size)))


def encode_small(array: np.ndarray) -> bytes:
    """Store values exactly in fields of sign (0 or 1 bit), exponent and mantissa, each as narrow as the tensor allows.

    Layout: mantissa bits u8; exponent bits + 16 * sign bit + 32 * (a field of exponent 0 means zero) u8; exponent of
    field 0 i16; then the packed fields, mantissa in the low bits, then exponent, then sign. Round with `round_small`
    first: values that need more than 23 mantissa bits are refused.
    """
    mantissa, width, low, signed, (negative, exponent, fraction) = _small_parts(array)
    zeros = bool((fraction < 0).any())
    field = np.where(fraction < 0, 0, (exponent - low << mantissa) | np.maximum(fraction, 0))
    field |= np.where(negative & (fraction >= 0), 1 << (mantissa + width), 0)
    head = bytes([mantissa, width | signed << 4 | zeros << 5]) + low.to_bytes(2, "little", signed=True)
    return (head + pack_bits(field, mantissa + width + signed)).ljust(least_bytes(int(array.size)), b"\0")


def decode_small(payload: bytes, shape: Sequence[int], dtype: str = "float32") -> np.ndarray:
    """Undo `encode_small`, in the float dtype asked for."""
    cursor, numel = Cursor(payload, "small floats"), math.prod(shape)
    mantissa, flags = cursor.take(2)
    low = int.from_bytes(cursor.take(2), "little", signed=True)
    width, signed, zeros = flags & 15, flags >> 4 & 1, flags >> 5 & 1
    if mantissa > 23 or flags >> 6 or width > 9 or not -150 <= low <= 127 or mantissa + width + signed > 32:
        raise cursor.fail(f"impossible small floats: {mantissa} mantissa bits, flags {flags}, exponent {low}")
    if _dtype(dtype).kind != "f":
        raise FormatError(f"small floats cannot become {dtype}")
    bits = mantissa + width + signed
    field = unpack_bits(cursor.take(packed_bytes(numel, bits)), numel, bits)
    cursor.padding(numel)
    values = np.empty(numel, np.dtype(dtype))
    for start in range(0, numel, _CHUNK):
        part = field[start : start + _CHUNK].astype(np.int64)
        raised = (part >> mantissa) & ((1 << width) - 1)
        with np.errstate(over="ignore", under="ignore"):
            wide = np.ldexp(1.0 + (part & ((1 << mantissa) - 1)) / 2.0**mantissa, raised + low)
        if zeros:
            wide[raised == 0] = 0.0
        if (wide > np.finfo(dtype).max).any():
            raise FormatError(f"a value beyond {dtype}")
        if signed:
            wide[(part >> (mantissa + width) & 1).astype(bool)] *= -1
        values[start : start + _CHUNK] = wide
    return values.reshape(tuple(shape))
