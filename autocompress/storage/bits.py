"""Bytes and bits: variable-length integers, a bounds-checked cursor, fixed-width packing."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from autocompress.storage.errors import FormatError

__all__ = [
    "MAX_EXPANSION",
    "Cursor",
    "least_bytes",
    "pack_bits",
    "packed_bytes",
    "put_string",
    "put_uint",
    "put_value",
    "unpack_bits",
    "unzigzag",
    "zigzag",
]

Scalar = bool | int | float | str
Value = Scalar | Sequence[Scalar]

MAX_EXPANSION = 1024  # values per payload byte at most, in every codec
_MAX_LIST = 4096  # entries of a list inside a header
_CHUNK = 1 << 16  # values unpacked at once: bounds the working memory; a multiple of 8 keeps chunks on whole bytes


def put_uint(value: int) -> bytes:
    """Encode an unsigned integer as LEB128: seven bits per byte, low bits first, high bit = more follow."""
    if value < 0:
        raise ValueError(f"an unsigned integer is needed, got {value}")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> int:
    """Map 0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    return value << 1 if value >= 0 else (-value << 1) - 1


def unzigzag(value: int) -> int:
    """Undo `zigzag`."""
    return value >> 1 if value & 1 == 0 else -((value + 1) >> 1)


def put_string(text: str) -> bytes:
    """Encode a string as its UTF-8 length and its UTF-8 bytes."""
    raw = text.encode("utf-8")
    return put_uint(len(raw)) + raw


def put_value(value: Value) -> bytes:
    """Encode a header value: one tag byte, then the value.

    Tags: 0 false, 1 true, 2 integer (zigzag LEB128), 3 float (IEEE binary64, little endian), 4 string,
    5 list (count, then values). A float that is exactly a binary32 takes tag 6 and 4 bytes.
    """
    if isinstance(value, bool | np.bool_):
        return b"\x01" if value else b"\x00"
    if isinstance(value, int | np.integer):
        if not -(2**63) <= int(value) < 2**63:
            raise ValueError(f"header integers have 64 bits, got {value}")
        return b"\x02" + put_uint(zigzag(int(value)))
    if isinstance(value, float | np.floating):
        number = float(value)
        try:
            short = struct.pack("<f", number)
        except OverflowError:
            return b"\x03" + struct.pack("<d", number)
        exact = struct.unpack("<f", short)[0] == number
        return b"\x06" + short if exact else b"\x03" + struct.pack("<d", number)
    if isinstance(value, str):
        return b"\x04" + put_string(value)
    if isinstance(value, list | tuple):
        if len(value) > _MAX_LIST:
            raise ValueError(f"header lists hold at most {_MAX_LIST} values, got {len(value)}")
        if any(isinstance(item, list | tuple) for item in value):
            raise ValueError("header lists hold scalars, not lists")
        return b"\x05" + put_uint(len(value)) + b"".join(put_value(item) for item in value)
    raise ValueError(f"a header value is a bool, int, float, str or a list of these, got {type(value).__name__}")


class Cursor:
    """Reads a byte string from front to back and raises FormatError instead of running over its end."""

    def __init__(self, data: bytes, place: str) -> None:
        self.data, self.place, self.offset = data, place, 0

    def fail(self, fact: str) -> FormatError:
        """Return a FormatError that names the place and the offset."""
        return FormatError(f"{self.place}, byte {self.offset}: {fact}")

    def take(self, count: int) -> bytes:
        """Read `count` bytes."""
        if count > len(self.data) - self.offset:
            raise self.fail(f"{count} bytes wanted, {len(self.data) - self.offset} left")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def uint(self, limit: int = 2**63 - 1) -> int:
        """Read an unsigned integer of at most `limit`."""
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise self.fail("an integer longer than 64 bits")
        if value > limit:
            raise self.fail(f"the integer {value} is above its limit {limit}")
        return value

    def string(self, limit: int = 4096) -> str:
        """Read a string of at most `limit` UTF-8 bytes."""
        raw = self.take(self.uint(limit))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a string that is not UTF-8") from error

    def value(self, nested: bool = False) -> Value:
        """Read a header value, the inverse of `put_value`."""
        tag = self.take(1)[0]
        if tag <= 1:
            return tag == 1
        if tag == 2:
            return unzigzag(self.uint(2**64 - 1))
        if tag == 3:
            return float(struct.unpack("<d", self.take(8))[0])
        if tag == 4:
            return self.string(2**20)
        if tag == 5 and not nested:
            items: list[Scalar] = []
            for _ in range(self.uint(_MAX_LIST)):
                item = self.value(nested=True)
                assert isinstance(item, bool | int | float | str)
                items.append(item)
            return items
        if tag == 6:
            return float(struct.unpack("<f", self.take(4))[0])
        raise self.fail(f"an unknown value tag {tag}")

    def rest(self) -> bytes:
        """Read everything that is left."""
        return self.take(len(self.data) - self.offset)

    def padding(self, numel: int) -> None:
        """Allow zero bytes up to `least_bytes(numel)`, and nothing else, before the end."""
        if any(self.take(max(least_bytes(numel) - self.offset, 0))):
            raise self.fail("padding that is not zero")
        self.end()

    def end(self) -> None:
        """Refuse bytes that nothing accounts for."""
        if self.offset != len(self.data):
            raise self.fail(f"{len(self.data) - self.offset} bytes too many")


def least_bytes(numel: int) -> int:
    """Count the bytes that a payload of `numel` values has at least: one per MAX_EXPANSION values, rounded up.

    Shorter codes are filled with zero bytes, so a reader can bound what it allocates by the bytes that are there.
    """
    return -(-numel // MAX_EXPANSION)


def packed_bytes(count: int, bits: int) -> int:
    """Count the bytes of `count` values of `bits` bits: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Pack unsigned integers of `bits` bits (0 to 32) without gaps, lowest bit first, straddling bytes.

    Value i occupies bits i*bits ... (i+1)*bits - 1 of the stream; bit j of the stream is bit j % 8 of byte
    j // 8. The last byte is filled with zeros.
    """
    flat = values.reshape(-1)
    if bits == 0 or flat.size == 0:
        return b""
    used, parts = (bits + 7) // 8, []
    for start in range(0, flat.size, _CHUNK):
        wide = np.ascontiguousarray(flat[start : start + _CHUNK], dtype="<u4").view(np.uint8).reshape(-1, 4)
        planes = np.unpackbits(wide[:, :used], axis=1, bitorder="little")[:, :bits]
        parts.append(np.packbits(planes.reshape(-1), bitorder="little").tobytes())
    return b"".join(parts)


def unpack_bits(data: bytes, count: int, bits: int) -> np.ndarray:
    """Undo `pack_bits`: `count` values of up to 31 bits as int32, of 32 as uint32.

    Raises FormatError on a wrong length or set filling.
    """
    wanted = packed_bytes(count, bits)
    if len(data) != wanted:
        raise FormatError(f"{count} values of {bits} bits need {wanted} bytes, got {len(data)}")
    if bits == 0 or count == 0:
        return np.zeros(count, np.int32)
    raw, values = np.frombuffer(data, np.uint8), np.empty(count, np.uint32)
    for start in range(0, count, _CHUNK):
        part = min(_CHUNK, count - start)
        first = start * bits // 8
        stream = np.unpackbits(raw[first : first + packed_bytes(part, bits)], bitorder="little")
        if stream[part * bits :].any():
            raise FormatError("the filling bits after the last packed value are not zero")
        planes = np.zeros((part, 32), np.uint8)
        planes[:, :bits] = stream[: part * bits].reshape(part, bits)
        values[start : start + part] = np.packbits(planes, axis=1, bitorder="little").view("<u4").reshape(-1)
    return values if bits == 32 else values.view(np.int32)
