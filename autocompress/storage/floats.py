"""Codecs for arrays of floats: raw, fp16, small floats with as many mantissa bits as each tensor needs, what a mask
keeps, and e4m3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.storage.bits import Cursor, least_bytes, pack_bits, packed_bytes, unpack_bits
from autocompress.storage.entropy import coded_size, decode_codes, encode_codes
from autocompress.storage.errors import FormatError

_CHUNK = 1 << 16  # values decoded at once

__all__ = [
    "DTYPES",
    "E4M3",
    "decode_fp8",
    "decode_fp16",
    "decode_masked",
    "decode_raw",
    "decode_small",
    "encode_fp8",
    "encode_fp16",
    "encode_masked",
    "encode_raw",
    "encode_small",
    "fp8_size",
    "fp16_size",
    "masked_size",
    "raw_size",
    "round_small",
    "small_size",
]

DTYPES = (
    "float32", "float16", "float64", "bool", "uint8", "int8", "uint16", "int16",
    "uint32", "int32", "uint64", "int64",
)  # fmt: skip  # position = number in a file

_CODE = np.arange(127)  # an e4m3 number without its sign: three bits of mantissa, four of exponent; 127 is no number
E4M3 = np.where(_CODE < 8, _CODE * 2.0**-9, (8 + _CODE % 8) * 2.0 ** (_CODE // 8 - 10)).astype(np.float32)


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


def _kept(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (mask as 0 and 1, what it keeps: every value but +0, as binary16 if that holds all of them exactly)."""
    array = np.asarray(array)
    if array.dtype.kind != "f":
        raise ValueError(f"masked values are floats, got dtype {array.dtype}")
    mask = (array != 0) | np.signbit(array)
    kept = array[mask]
    with np.errstate(over="ignore"):
        half = kept.astype("<f2")
    exact = half.astype(array.dtype).tobytes() == kept.tobytes()
    return mask.astype(np.int32), half if exact else kept.astype(_dtype(array.dtype.name))


def masked_size(array: np.ndarray) -> int:
    """Count 5 + the entropy-coded mask + 2 bytes, or the bytes of an element, for each value that it keeps."""
    mask, kept = _kept(array)
    return 5 + coded_size(mask) + kept.nbytes


def encode_masked(array: np.ndarray) -> bytes:
    """Store which values are not zero, entropy-coded in the array's shape, then those, in binary16 where that is exact.

    Layout: bytes per value u8, length of the mask u32, the mask, the values.
    """
    mask, kept = _kept(array)
    coded = encode_codes(mask)
    return bytes([kept.itemsize]) + len(coded).to_bytes(4, "little") + coded + kept.tobytes()


def decode_masked(payload: bytes, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Undo `encode_masked`."""
    kind, cursor = _dtype(dtype), Cursor(payload, "masked values")
    width = cursor.take(1)[0]
    if kind.kind != "f" or width not in (2, kind.itemsize):
        raise cursor.fail(f"{width} bytes for each {dtype}")
    mask = decode_codes(cursor.take(int.from_bytes(cursor.take(4), "little")), shape)
    if mask.size and not 0 <= mask.min() <= mask.max() <= 1:
        raise cursor.fail("a mask of more than zeros and ones")
    count = int(mask.sum(dtype=np.int64))
    kept = np.frombuffer(cursor.take(width * count), "<f2" if width == 2 else kind)
    cursor.end()
    values = np.zeros(mask.shape, np.dtype(dtype))
    values[mask != 0] = kept
    return values


def _fp8_codes(values: np.ndarray) -> np.ndarray:
    """Return the number of each e4m3 value among the magnitudes, with its sign."""
    wide = np.asarray(values, np.float64)
    place = np.minimum(np.searchsorted(E4M3, np.abs(wide)), E4M3.size - 1)
    if (E4M3[place] != np.abs(wide)).any():
        raise ValueError("fp8 stores e4m3 numbers only; round to them first")
    return np.where(wide < 0, -place, place).astype(np.int32)


def fp8_size(values: np.ndarray) -> int:
    """Count the bytes of `encode_fp8`."""
    return coded_size(_fp8_codes(values))


def encode_fp8(values: np.ndarray) -> bytes:
    """Entropy-code e4m3 numbers (OCP 8-bit floating point, finite): sign times the seven other bits as an integer."""
    return encode_codes(_fp8_codes(values))


def decode_fp8(payload: bytes, shape: Sequence[int], dtype: str = "float32") -> np.ndarray:
    """Undo `encode_fp8`; always float32."""
    codes = decode_codes(payload, shape)
    if codes.size and max(-int(codes.min()), int(codes.max())) >= E4M3.size:
        raise FormatError(f"an e4m3 number {int(np.abs(codes).max())}; at most {E4M3.size - 1}")
    return np.concatenate([-E4M3[:0:-1], E4M3])[codes + (E4M3.size - 1)]
