"""The codec of a codebook: codes that are made of few different vectors, as those vectors and an index for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.storage.bits import Cursor, least_bytes, put_uint
from autocompress.storage.entropy import coded_size, decode_codes, encode_codes
from autocompress.storage.integers import decode_packed, encode_packed, packed_size

__all__ = ["codebook_length", "codebook_size", "decode_codebook", "encode_codebook"]

_SIGNED, _PACKED_INDEX, _PACKED_WORDS = 1, 2, 4  # bits of the first byte
_MOST_PACKED = 2**15  # the magnitude at which packed fields end


def codebook_size(codes: np.ndarray, length: int | None = None) -> int:
    """Count the bytes of `encode_codebook` without encoding."""
    if np.size(codes) == 0:
        return 0
    words, index, _ = _split(codes, length)
    (_, words_bytes), (_, index_bytes) = _shorter(words), _shorter(index)
    head = _head(0, words, words_bytes, index_bytes)
    return max(len(head) + words_bytes + index_bytes, least_bytes(np.size(codes)))


def encode_codebook(codes: np.ndarray, length: int | None = None, fixed: bool = False) -> bytes:
    """Store the distinct vectors of `length` consecutive codes, by falling frequency, and the index of each vector.

    Words, a matrix, and indices, of a row for each output, are entropy-coded or packed, whichever is shorter; with
    `fixed` both are packed, if 16 bits hold them, which is decoded faster. Without a length, vectors are the positions
    of a kernel, and single codes in a matrix. Layout: flags u8, then as uint length, number of words, bytes of the
    words, bytes of the indices; words; indices. Raises ValueError where the codes are not whole vectors.
    """
    if np.size(codes) == 0:
        return b""
    words, index, flags = _split(codes, length)
    parts = []
    for values, bit in ((words, _PACKED_WORDS), (index, _PACKED_INDEX)):
        packed = _fits(values) if fixed else _shorter(values)[0]
        flags |= bit * packed
        parts.append(encode_packed(values) if packed else encode_codes(values))
    return (_head(flags, words, *map(len, parts)) + b"".join(parts)).ljust(least_bytes(np.size(codes)), b"\0")


def decode_codebook(payload: bytes, shape: Sequence[int]) -> np.ndarray:
    """Undo `encode_codebook`."""
    numel, cursor = math.prod(shape), Cursor(payload, "codebook")
    if numel == 0:
        cursor.end()
        return np.zeros(tuple(shape), np.int32)
    flags = cursor.take(1)[0]
    if flags > _SIGNED | _PACKED_INDEX | _PACKED_WORDS:
        raise cursor.fail(f"unknown flags {flags}")
    length = cursor.uint(numel)
    if length < 1 or numel % length:
        raise cursor.fail(f"{numel} codes are not whole vectors of {length}")
    count = cursor.uint(numel // length)  # a word that no vector is has no place
    sizes = cursor.uint(len(payload)), cursor.uint(len(payload))
    words_raw, index_raw = cursor.take(sizes[0]), cursor.take(sizes[1])
    cursor.padding(numel)
    words = (decode_packed if flags & _PACKED_WORDS else decode_codes)(words_raw, (count, length))
    index = (decode_packed if flags & _PACKED_INDEX else decode_codes)(index_raw, _layout(shape, length))
    if flags & _SIGNED:
        words, low = np.concatenate([-words[::-1], np.zeros((1, length), np.int32), words]), -count
    else:
        low = 0
    if index.min() < low or index.max() >= low + len(words):
        raise cursor.fail(f"indices from {index.min()} to {index.max()} of {count} words")
    return words[index.reshape(-1) - low].reshape(tuple(shape))


def codebook_length(payload: bytes) -> int:
    """How many codes a word has. Raises FormatError."""
    return Cursor(payload[1:], "codebook").uint()


def _head(flags: int, words: np.ndarray, words_bytes: int, index_bytes: int) -> bytes:
    counts = words.shape[1], len(words), words_bytes, index_bytes
    return bytes([flags]) + b"".join(map(put_uint, counts))


def _shorter(values: np.ndarray) -> tuple[bool, int]:
    """Whether packed fields are shorter than entropy coding, and the bytes of what is shorter."""
    coded = coded_size(values)
    packed = packed_size(values) if _fits(values) else coded + 1
    return packed < coded, min(packed, coded)


def _fits(values: np.ndarray) -> bool:
    """Whether packed fields hold the values."""
    return values.size > 0 and max(-int(values.min()), int(values.max())) < _MOST_PACKED


def _layout(shape: Sequence[int], length: int) -> tuple[int, ...]:
    """The shape of the indices: a row for each of the first axis, unless a vector goes over the end of one."""
    numel = math.prod(shape)
    whole = len(shape) > 1 and numel // shape[0] % length == 0
    return (shape[0], numel // shape[0] // length) if whole else (numel // length,)


def _split(codes: np.ndarray, length: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """(words (K, length), indices, flags). Signed where that leaves at most two thirds of the words: they are distinct
    up to sign and none is zero; index 0 is the vector of zeros, ±i is ± word i - 1.
    """
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"codes are integers, got dtype {codes.dtype}")
    length = max(math.prod(codes.shape[2:]), 1) if length is None else length
    if length < 1 or codes.size % length:
        raise ValueError(f"{codes.size} codes are not whole vectors of {length}")
    words, index = _distinct(np.ascontiguousarray(codes.reshape(-1, length), np.int64))
    first = np.take_along_axis(words, (words != 0).argmax(axis=1)[:, None], 1)[:, 0]
    sign = np.sign(first)  # 0 for the vector of zeros
    half, place = _distinct(words[sign != 0] * sign[sign != 0, None])
    if 3 * len(half) <= 2 * len(words):
        which = np.zeros(len(words), np.int64)
        which[sign != 0] = place + 1
        counts = np.bincount(which[index], minlength=len(half) + 1)[1:]
        order = np.argsort(-counts, kind="stable")
        rank = np.concatenate([[0], np.argsort(order) + 1])
        index, words, flags = (sign * rank[which])[index], half[order], _SIGNED
    else:
        order = np.argsort(-np.bincount(index, minlength=len(words)), kind="stable")
        index, words, flags = np.argsort(order)[index], words[order], 0
    return words, index.reshape(_layout(codes.shape, length)), flags


def _distinct(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows in lexicographic order, and which of them each row is."""
    place, count = np.zeros(len(vectors), np.int64), 1
    for column in vectors.T:  # the rank of what came before, and the next number, are one number
        low = int(column.min(initial=0))
        span = int(column.max(initial=0)) - low + 1
        if count * span > 2**62:
            ranks, place = np.unique(place, return_inverse=True)
            count = len(ranks)
        place, count = place * span + (column - low), count * span
    ranks, first, place = np.unique(place, return_index=True, return_inverse=True)
    return vectors[first], place.reshape(-1)
