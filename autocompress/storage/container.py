"""The container: one file of magic, version, compressed header and checked sections. docs/format.md specifies it."""

from __future__ import annotations

import mmap
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autocompress.storage.bits import Cursor, Value, put_uint
from autocompress.storage.entries import Entry, step_bytes
from autocompress.storage.errors import FormatError
from autocompress.storage.header import deflate, inflate, parse_header, put_header

__all__ = ["MAGIC", "SECTION_BYTES", "VERSION", "Archive", "FileInfo", "file_size", "read", "serialise", "write"]

MAGIC = b"\x89ACZ"  # the high bit catches transfers that strip it
VERSION = 1
SECTION_BYTES = 4096  # a section is closed once it reaches a page: reading one layer touches that page anyway
_FIXED = len(MAGIC) + 1 + 4  # magic, version, checksum of the header


@dataclass(frozen=True)
class FileInfo:
    """What stands on disk: the path, its whole length, and how much of that is not payload. Lengths in bytes."""

    path: Path
    bytes: int
    header_bytes: int
    entries: int


def _sections(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Group consecutive payloads into sections of at least SECTION_BYTES; the last may be shorter.

    Returns (first entry, one past the last entry) of each section.
    """
    spans: list[tuple[int, int]] = []
    first, filled = 0, 0
    for i, length in enumerate(lengths):
        filled += length
        if filled >= SECTION_BYTES or i == len(lengths) - 1:
            spans.append((first, i + 1))
            first, filled = i + 1, 0
    return spans


def _front(entries: Sequence[Entry], meta: Mapping[str, Value]) -> bytes:
    """Encode everything before the first section."""
    for entry in entries:
        entry.check()
    raw = put_header(entries, meta)
    payloads = [entry.payload for entry in entries]
    checks = b"".join(
        zlib.crc32(b"".join(payloads[first:last])).to_bytes(4, "little")
        for first, last in _sections([len(payload) for payload in payloads])
    )
    region = put_uint(len(raw)) + checks + deflate(raw)
    start = MAGIC + bytes([VERSION])
    tail = put_uint(len(region)) + put_uint(len(checks) // 4) + region
    return start + zlib.crc32(start + tail).to_bytes(4, "little") + tail


def serialise(entries: Sequence[Entry], meta: Mapping[str, Value] | None = None) -> bytes:
    """Encode a whole file. The same entries in the same order give the same bytes."""
    return _front(entries, meta or {}) + b"".join(entry.payload for entry in entries)


def file_size(entries: Sequence[Entry], meta: Mapping[str, Value] | None = None) -> int:
    """Count the bytes of `serialise(entries, meta)` exactly."""
    return len(_front(entries, meta or {})) + sum(entry.bytes for entry in entries)


class Archive(Mapping[str, Entry]):
    """A file opened for reading: entries by name, read and checked one at a time.

    Opening checks the header and the length of the file; `archive[name]` checks the section that holds the entry, once.
    """

    def __init__(self, data: bytes | mmap.mmap, place: str) -> None:
        self._data, self._place = data, place
        start = bytes(data[:_FIXED])
        if len(start) < _FIXED or start[: len(MAGIC)] != MAGIC:
            raise FormatError(f"{place}: not an autocompress file (begins with {start[: len(MAGIC)]!r}, not {MAGIC!r})")
        if start[len(MAGIC)] != VERSION:
            found = start[len(MAGIC)]
            raise FormatError(f"{place}: format version {found} is unknown; this reader knows version {VERSION}")
        cursor = Cursor(bytes(data[_FIXED : _FIXED + 20]), f"{place}: header length")
        length, sections = cursor.uint(), cursor.uint()
        front = _FIXED + cursor.offset
        if length > len(data) - front:
            raise FormatError(f"{place}: the header needs {length} bytes, the file has {len(data) - front} more")
        region = bytes(data[front : front + length])
        if zlib.crc32(start[:5] + bytes(data[_FIXED:front]) + region) != int.from_bytes(start[5:], "little"):
            raise FormatError(f"{place}: the header's checksum does not match; the file is damaged")
        inner = Cursor(region, f"{place}: header")
        raw_length = inner.uint()
        checks = inner.take(4 * sections)
        try:
            header = parse_header(inflate(inner.rest(), raw_length))
        except FormatError as error:
            raise error.within(place) from error
        self._slots = {slot.name: i for i, slot in enumerate(header.slots)}
        self._table = header.slots
        self._meta = dict(header.meta)
        lengths = [slot.length for slot in header.slots]
        self._spans = _sections(lengths)
        if len(self._spans) != sections:
            raise FormatError(f"{place}: {sections} section checksums, the lengths make {len(self._spans)} sections")
        self._checks = [int.from_bytes(checks[4 * i : 4 * i + 4], "little") for i in range(sections)]
        self._front, self._header_bytes = front + length, len(region) - 4 * sections
        self._offsets = [self._front]
        for size in lengths:
            self._offsets.append(self._offsets[-1] + size)
        if self._offsets[-1] != len(data):
            raise FormatError(f"{place}: {self._offsets[-1]} bytes announced, the file has {len(data)}")
        self._section = [s for s, (first, last) in enumerate(self._spans) for _ in range(first, last)]
        self._checked: set[int] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """The entries' names in file order."""
        return tuple(self._slots)

    @property
    def meta(self) -> dict[str, Value]:
        """A copy of the file's metadata."""
        return dict(self._meta)

    @property
    def bytes(self) -> int:
        """The length of the file."""
        return len(self._data)

    def _check(self, section: int) -> None:
        """Compare a section with its checksum, the first time that it is needed."""
        if section in self._checked:
            return
        first, last = self._spans[section]
        start, stop = self._offsets[first], self._offsets[last]
        with memoryview(self._data) as view, view[start:stop] as part:
            found = zlib.crc32(part)
        if found != self._checks[section]:
            names = ", ".join(slot.name for slot in self._table[first:last][:3]) + (" ..." if last - first > 3 else "")
            raise FormatError(
                f"{self._place}: section {section} (bytes {start} to {stop}: {names}) does not match its checksum"
            )
        self._checked.add(section)

    def __getitem__(self, name: str) -> Entry:
        i = self._slots[name]
        self._check(self._section[i])
        slot, payload = self._table[i], bytes(self._data[self._offsets[i] : self._offsets[i + 1]])
        return Entry(slot.name, slot.shape, slot.dtype, slot.codec, payload, slot.step, slot.params)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._table)

    def verify(self) -> None:
        """Check every section and decode every entry. Raises FormatError at the first that fails."""
        for entry in self.values():
            entry.dequantise()

    def describe(self) -> list[tuple[str, int]]:
        """List (section, bytes) rows that account for every byte: their sum is the file's length."""
        rows = [
            ("magic, version, header checksum and lengths", self._front - self._header_bytes - 4 * len(self._checks)),
            ("names, shapes, codecs, options, metadata", self._header_bytes),
            ("section checksums", 4 * len(self._checks)),
        ]
        for slot in self._table:
            steps = step_bytes(slot.shape, slot.step)
            rows += [(f"{slot.name}: steps", steps)] if steps else []
            rows.append((f"{slot.name}: {slot.codec}", slot.length - steps))
        return rows

    def close(self) -> None:
        """Release the file. Entries already taken out stay valid."""
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> Archive:
    """Open a file: memory-mapped, nothing but the header read. Raises FormatError, and OSError from the file system."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FormatError(f"{os.fspath(path)}: the file is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return Archive(data, os.fspath(path))
    except FormatError:
        data.close()
        raise


def write(path: str | os.PathLike[str], entries: Sequence[Entry], meta: Mapping[str, Value] | None = None) -> FileInfo:
    """Write a file atomically: temporary file, fsync, read back, decode, compare, rename.

    Either the whole verified file stands at `path` afterwards, or what stood there before. Raises OSError from the file
    system, FormatError if an entry does not decode.
    """
    target, front = Path(path), _front(entries, meta or {})
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(front)
            for entry in entries:  # one at a time: all together would be in memory twice
                file.write(entry.payload)
            file.flush()
            os.fsync(file.fileno())
        with read(temporary) as archive:
            same = archive._data[: archive._front] == front
            if not same or any(archive[entry.name].payload != entry.payload for entry in entries):
                raise FormatError(f"{temporary}: the file system returned other bytes than were written")
            archive.verify()
            header_bytes, length = archive._front, archive.bytes
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return FileInfo(target, length, header_bytes, len(entries))
