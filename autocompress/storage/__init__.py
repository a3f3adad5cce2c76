"""The file: codecs with exact sizes, and the container that holds them. Numpy and numba; nothing here knows torch."""

from __future__ import annotations

from autocompress.storage.codecs import CODECS, Codec, codec_named
from autocompress.storage.container import VERSION, Archive, FileInfo, file_size, read, serialise, write
from autocompress.storage.entries import (
    Entry,
    float_entry,
    grid_codes,
    grid_entry,
    grid_size,
    step_bytes,
    weight_entry,
    weight_size,
    with_fixed_fields,
)
from autocompress.storage.entropy import MAX_CODE, coded_size, decode_codes, encode_codes, order0_bits
from autocompress.storage.errors import FormatError
from autocompress.storage.floats import E4M3, round_small
from autocompress.storage.integers import nm_pattern
from autocompress.storage.vectors import encode_codebook

__all__ = [
    "CODECS",
    "E4M3",
    "MAX_CODE",
    "VERSION",
    "Archive",
    "Codec",
    "Entry",
    "FileInfo",
    "FormatError",
    "codec_named",
    "coded_size",
    "decode_codes",
    "encode_codebook",
    "encode_codes",
    "file_size",
    "float_entry",
    "grid_codes",
    "grid_entry",
    "grid_size",
    "nm_pattern",
    "order0_bits",
    "read",
    "round_small",
    "serialise",
    "step_bytes",
    "weight_entry",
    "weight_size",
    "with_fixed_fields",
    "write",
]
