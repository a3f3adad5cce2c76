"""Plain codecs for integer codes: packed fields, bitmask, sparse index, N:M index.

Each payload begins with the width of a field and the smallest value, so it can be read with nothing but the shape.
All of them pad with zero bytes to `least_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np

from autocompress.storage.bits import Cursor, least_bytes, pack_bits, packed_bytes, unpack_bits

__all__ = [
    "bitmask_size",
    "decode_bitmask",
    "decode_nm",
    "decode_packed",
    "decode_sparse",
    "encode_bitmask",
    "encode_nm",
    "encode_packed",
    "encode_sparse",
    "nm_pattern",
    "nm_size",
    "packed_length",
    "packed_size",
    "sparse_size",
]

_HEAD = 3  # one byte for the width, two for the smallest value
_MAX_BITS = 16
_NM = ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (2, 16), (4, 16), (8, 16))  # in file order


def _flat(codes: np.ndarray) -> np.ndarray:
    """Check that the codes are 16-bit integers and flatten them to int64."""
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"codes are integers, got dtype {codes.dtype}")
    flat = codes.reshape(-1).astype(np.int64)
    if flat.size and (flat.min() < -(2**15) or flat.max() >= 2**15):
        raise ValueError(f"plain codecs hold 16-bit codes, got values from {flat.min()} to {flat.max()}")
    return flat


def _field(values: np.ndarray) -> tuple[int, int]:
    """Return (bits, smallest value) of the fixed-width field that holds the values; 0 bits if all are equal."""
    if values.size == 0:
        return 0, 0
    low = int(values.min())
    return (int(values.max()) - low).bit_length(), low


def _head(bits: int, low: int) -> bytes:
    return bytes([bits]) + low.to_bytes(2, "little", signed=True)


def _read_head(payload: bytes, place: str) -> tuple[Cursor, int, int]:
    cursor = Cursor(payload, place)
    bits = cursor.take(1)[0]
    if bits > _MAX_BITS:
        raise cursor.fail(f"a field of {bits} bits; at most {_MAX_BITS}")
    return cursor, bits, int.from_bytes(cursor.take(2), "little", signed=True)


def _shaped(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return values.astype(np.int32, copy=False).reshape(tuple(shape))


def packed_size(codes: np.ndarray) -> int:
    """Count 3 + ceil(n * bits / 8) bytes, bits = width of max - min."""
    flat = _flat(codes)
    return packed_length(flat.size, _field(flat)[0])


def packed_length(count: int, bits: int) -> int:
    """Count the bytes of `count` codes in fields of `bits` bits."""
    return max(_HEAD + packed_bytes(count, bits), least_bytes(count))


def encode_packed(codes: np.ndarray, bits: int | None = None) -> bytes:
    """Store code - min in fields of equal width that may straddle bytes: `bits` wide, or as wide as max - min needs.

    Raises ValueError if `bits` are too few.
    """
    flat = _flat(codes)
    needed, low = _field(flat)
    bits = needed if bits is None else bits
    if bits < needed:
        raise ValueError(f"codes from {low} to {flat.max()} need {needed} bits, got {bits}")
    return (_head(bits, low) + pack_bits(flat - low, bits)).ljust(least_bytes(flat.size), b"\0")


def decode_packed(payload: bytes, shape: Sequence[int]) -> np.ndarray:
    """Undo `encode_packed`."""
    numel = math.prod(shape)
    cursor, bits, low = _read_head(payload, "packed codes")
    values = unpack_bits(cursor.take(packed_bytes(numel, bits)), numel, bits)
    values += low
    cursor.padding(numel)
    return _shaped(values, shape)


def bitmask_size(codes: np.ndarray) -> int:
    """Count 3 + ceil(n / 8) + ceil(k * bits / 8) bytes, k = number of nonzeros."""
    flat = _flat(codes)
    kept = flat[flat != 0]
    return _HEAD + packed_bytes(flat.size, 1) + packed_bytes(kept.size, _field(kept)[0])


def encode_bitmask(codes: np.ndarray) -> bytes:
    """Store one bit per code that says whether it is nonzero, then the packed nonzeros."""
    flat = _flat(codes)
    kept = flat[flat != 0]
    bits, low = _field(kept)
    return _head(bits, low) + pack_bits(flat != 0, 1) + pack_bits(kept - low, bits)


def decode_bitmask(payload: bytes, shape: Sequence[int]) -> np.ndarray:
    """Undo `encode_bitmask`."""
    numel = math.prod(shape)
    cursor, bits, low = _read_head(payload, "bitmask codes")
    mask = unpack_bits(cursor.take(packed_bytes(numel, 1)), numel, 1).astype(bool)
    count = int(mask.sum())
    values = np.zeros(numel, np.int32)
    values[mask] = unpack_bits(cursor.take(packed_bytes(count, bits)), count, bits) + low
    cursor.end()
    return _shaped(values, shape)


def _gaps(flat: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the distances between nonzeros into steps below 2**width - 1; a full step moves on without a value.

    Returns (steps, codes of the steps that end at a nonzero).
    """
    where = np.flatnonzero(flat)
    distance = np.diff(where, prepend=-1) - 1
    full = (1 << width) - 1
    steps = np.full(int((distance // full + 1).sum()), full, np.int64)
    steps[np.cumsum(distance // full + 1) - 1] = distance % full
    return steps, flat[where]


def _sparse_parts(flat: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Choose the gap width (1 to 16 bits) with the fewest bytes."""
    where = np.flatnonzero(flat)
    distance = np.diff(where, prepend=-1) - 1
    costs = [width * int((distance // ((1 << width) - 1) + 1).sum()) for width in range(1, 17)]
    width = 1 + int(np.argmin(costs))
    steps, kept = _gaps(flat, width)
    return width, steps, kept


def sparse_size(codes: np.ndarray) -> int:
    """Count the bytes of `encode_sparse`: 8 + packed gaps + packed nonzeros."""
    flat = _flat(codes)
    width, steps, kept = _sparse_parts(flat)
    used = _HEAD + 5 + packed_bytes(steps.size, width) + packed_bytes(kept.size, _field(kept)[0])
    return max(used, least_bytes(flat.size))


def encode_sparse(codes: np.ndarray) -> bytes:
    """Store the gaps between nonzeros (Deep Compression's relative index, arXiv 1510.00149) and the packed nonzeros.

    Layout: value width u8, smallest value i16, gap width u8, number of steps u32, packed steps, packed values.
    """
    flat = _flat(codes)
    width, steps, kept = _sparse_parts(flat)
    bits, low = _field(kept)
    head = _head(bits, low) + bytes([width]) + steps.size.to_bytes(4, "little")
    return (head + pack_bits(steps, width) + pack_bits(kept - low, bits)).ljust(least_bytes(flat.size), b"\0")


def decode_sparse(payload: bytes, shape: Sequence[int]) -> np.ndarray:
    """Undo `encode_sparse`."""
    numel = math.prod(shape)
    cursor, bits, low = _read_head(payload, "sparse codes")
    width = cursor.take(1)[0]
    if not 1 <= width <= _MAX_BITS:
        raise cursor.fail(f"a gap width of {width} bits; 1 to {_MAX_BITS}")
    count = int.from_bytes(cursor.take(4), "little")
    steps = unpack_bits(cursor.take(packed_bytes(count, width)), count, width)
    full = (1 << width) - 1
    ends = steps != full
    where = (np.cumsum(np.where(ends, steps + 1, full), dtype=np.int64) - 1)[ends]
    if where.size and where[-1] >= numel:
        raise cursor.fail(f"an index {int(where[-1])} in a tensor of {numel} codes")
    values = np.zeros(numel, np.int32)
    values[where] = unpack_bits(cursor.take(packed_bytes(where.size, bits)), where.size, bits) + low
    cursor.padding(numel)
    return _shaped(values, shape)


def nm_pattern(codes: np.ndarray) -> tuple[int, int] | None:
    """Find the first listed pattern (n, m) such that each m consecutive codes hold at most n nonzeros, or None."""
    flat = _flat(codes)
    for n, m in sorted(_NM, key=lambda pair: pair[0] / pair[1]):
        if flat.size % m == 0 and (np.count_nonzero(flat.reshape(-1, m), axis=1) <= n).all():
            return n, m
    return None


@lru_cache
def _patterns(n: int, m: int) -> np.ndarray:
    """List the n-subsets of m positions in lexicographic order, shape (C(m, n), n)."""
    return np.array(list(combinations(range(m), n)), np.int64)


def _nm_fields(flat: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (index of each group's n-subset of positions, the n values of each group)."""
    groups = flat.reshape(-1, m)
    order = np.argsort(groups == 0, axis=1, kind="stable")[:, :n]  # nonzeros first, then the first zeros
    order.sort(axis=1)
    table = _patterns(n, m)
    keys = (1 << table).sum(axis=1)
    rank = np.argsort(keys)
    index = rank[np.searchsorted(keys[rank], (1 << order).sum(axis=1))]
    return index, np.take_along_axis(groups, order, axis=1).reshape(-1)


def _nm_parts(codes: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Return (pattern number, subset indices, values)."""
    pattern = nm_pattern(codes)
    if pattern is None:
        raise ValueError(f"the codes follow none of the patterns {', '.join(f'{n}:{m}' for n, m in _NM)}")
    index, values = _nm_fields(_flat(codes), *pattern)
    return _NM.index(pattern), index, values


def nm_size(codes: np.ndarray) -> int:
    """Count 4 + ceil(groups * ceil(log2 C(m, n)) / 8) + ceil(groups * n * bits / 8) bytes."""
    _, index, values = _nm_parts(codes)
    n, m = _NM[_nm_parts(codes)[0]]
    used = _HEAD + 1 + packed_bytes(index.size, (math.comb(m, n) - 1).bit_length())
    return max(used + packed_bytes(values.size, _field(values)[0]), least_bytes(np.size(codes)))


def encode_nm(codes: np.ndarray) -> bytes:
    """Store, for each group of m codes, which n of them may be nonzero (as one number) and those n values.

    Layout: value width u8, smallest value i16, pattern number u8, packed subset indices, packed values.
    """
    number, index, values = _nm_parts(codes)
    n, m = _NM[number]
    bits, low = _field(values)
    body = pack_bits(index, (math.comb(m, n) - 1).bit_length()) + pack_bits(values - low, bits)
    return (_head(bits, low) + bytes([number]) + body).ljust(least_bytes(np.size(codes)), b"\0")


def decode_nm(payload: bytes, shape: Sequence[int]) -> np.ndarray:
    """Undo `encode_nm`."""
    numel = math.prod(shape)
    cursor, bits, low = _read_head(payload, "N:M codes")
    number = cursor.take(1)[0]
    if number >= len(_NM):
        raise cursor.fail(f"an unknown N:M pattern {number}")
    n, m = _NM[number]
    if numel % m:
        raise cursor.fail(f"{numel} codes are not whole groups of {m}")
    groups, width = numel // m, (math.comb(m, n) - 1).bit_length()
    index = unpack_bits(cursor.take(packed_bytes(groups, width)), groups, width)
    if groups and index.max() >= math.comb(m, n):
        raise cursor.fail(f"a subset index of {int(index.max())} among {math.comb(m, n)}")
    kept = unpack_bits(cursor.take(packed_bytes(groups * n, bits)), groups * n, bits) + low
    values = np.zeros((groups, m), np.int32)
    np.put_along_axis(values, _patterns(n, m)[index], kept.reshape(groups, n), axis=1)
    cursor.padding(numel)
    return _shaped(values, shape)
