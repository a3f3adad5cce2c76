"""Codecs: pure pairs of exactly inverse functions between arrays and bytes, each with an exact size.

Laws, held by tests for every codec `c` and every array `a` that it accepts:
    c.decode(c.encode(a), a.shape, a.dtype.name) == a   (fp16, smallfloat, fp8: once a is rounded to what they hold)
    c.size(a) == len(c.encode(a))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from autocompress.storage import floats, integers, vectors
from autocompress.storage.bits import MAX_EXPANSION
from autocompress.storage.entropy import coded_size, decode_codes, encode_codes
from autocompress.storage.errors import FormatError

__all__ = ["CODECS", "CODEC_IDS", "Codec", "codec_named"]


@dataclass(frozen=True)
class Codec:
    """One way to store an array: `encode(array)`, its inverse `decode(payload, shape, dtype)`, the exact `size(array)`.

    `kind` is "codes" for integer arrays, "scaled" for floats that steps multiply, and "floats" for the rest; `number`
    is the byte that names the codec in a file.
    """

    name: str
    number: int
    kind: str
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, Sequence[int], str], np.ndarray]
    size: Callable[[np.ndarray], int]


def _bounded(payload: bytes, shape: Sequence[int]) -> None:
    """Refuse a shape that the payload cannot hold, before anything of that size is allocated."""
    if math.prod(shape) > MAX_EXPANSION * len(payload):
        raise FormatError(f"{len(payload)} bytes cannot hold {math.prod(shape)} values")


def _codes(decode: Callable[[bytes, Sequence[int]], np.ndarray]) -> Callable[[bytes, Sequence[int], str], np.ndarray]:
    """Give a codec of integer codes the signature of all codecs (its dtype is always int32)."""

    def typed(payload: bytes, shape: Sequence[int], dtype: str = "int32") -> np.ndarray:
        _bounded(payload, shape)
        return decode(payload, shape)

    return typed


_ALL = (
    Codec("raw", 0, "floats", floats.encode_raw, floats.decode_raw, floats.raw_size),
    Codec("fp16", 1, "floats", floats.encode_fp16, floats.decode_fp16, floats.fp16_size),
    Codec("smallfloat", 2, "floats", floats.encode_small, floats.decode_small, floats.small_size),
    Codec("packed", 3, "codes", integers.encode_packed, _codes(integers.decode_packed), integers.packed_size),
    Codec("bitmask", 4, "codes", integers.encode_bitmask, _codes(integers.decode_bitmask), integers.bitmask_size),
    Codec("sparse", 5, "codes", integers.encode_sparse, _codes(integers.decode_sparse), integers.sparse_size),
    Codec("nm", 6, "codes", integers.encode_nm, _codes(integers.decode_nm), integers.nm_size),
    Codec("entropy", 7, "codes", encode_codes, _codes(decode_codes), coded_size),
    Codec("masked", 8, "floats", floats.encode_masked, floats.decode_masked, floats.masked_size),
    Codec("fp8", 9, "scaled", floats.encode_fp8, floats.decode_fp8, floats.fp8_size),
    Codec(
        "trellis",
        10,
        "codes",
        partial(encode_codes, dependent=True),
        _codes(partial(decode_codes, dependent=True)),
        partial(coded_size, dependent=True),
    ),
    Codec(
        "codebook",
        11,
        "codes",
        vectors.encode_codebook,
        _codes(vectors.decode_codebook),
        vectors.codebook_size,
    ),
)

CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}
CODEC_IDS: dict[int, Codec] = {codec.number: codec for codec in _ALL}


def codec_named(name: str) -> Codec:
    """Find a codec by its name. Raises FormatError with the names there are."""
    if name not in CODECS:
        raise FormatError(f"unknown codec {name!r}; this version knows {', '.join(CODECS)}")
    return CODECS[name]
