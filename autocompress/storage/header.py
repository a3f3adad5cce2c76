"""The header of a file: names, shapes, codecs, lengths, options and metadata, as columns that deflate well."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autocompress.storage.bits import MAX_EXPANSION, Cursor, Value, put_string, put_uint, put_value
from autocompress.storage.codecs import CODEC_IDS, codec_named
from autocompress.storage.entries import STEPS, Entry, split_step, step_bytes
from autocompress.storage.errors import FormatError
from autocompress.storage.floats import DTYPES

__all__ = ["Header", "Slot", "deflate", "inflate", "parse_header", "put_header"]

_MAX_HEADER = 1 << 24  # bytes before deflation
_MAX_ENTRIES = 1 << 16
_MAX_META = 1 << 12
_MAX_PARAMS = 32
_MAX_DIMS = 8
_MAX_NUMEL = 1 << 40
# The preset dictionary of the deflate stream; the likeliest strings stand last. Part of the format: never change it.
DICTIONARY = (
    b"tasknotecreatorsha256seedbudgetstrategyfingerprintversionoptionstepaliasdenserank32w8k4r12w8ch50w8blk4@50w8"
    b"s75w4s50w8w4g1282:4w8fp16weight_ih_l0\0bias_hh_l0\0model.layers.0.self_attn.q_proj.weight\0k_proj.weight\0"
    b"v_proj.weight\0o_proj.weight\0mlp.gate_proj.weight\0up_proj.weight\0down_proj.weight\0input_layernorm.weight\0"
    b"post_attention_layernorm.weight\0embed_tokens.weight\0lm_head.weight\0embeddings.word_embeddings.weight\0"
    b"position_embeddings.weight\0encoder.layer.0.attention.self.query.weight\0key.bias\0value.bias\0"
    b"attention.output.dense.weight\0intermediate.dense.bias\0output.LayerNorm.bias\0features.0.0.weight\0"
    b"classifier.1.bias\0head.fc2.bias\0norm2.bias\0downsample.0.weight\0downsample.1.bias\0shortcut.0.weight\0"
    b"fc.weight\0fc.bias\0linear.weight\0linear.bias\0conv1.weight\0bn1.weight\0bn1.bias\0layer4.0.conv3.weight\0"
    b"layer4.0.bn3.bias\0layer3.0.conv1.weight\0layer3.0.bn1.weight\0layer3.0.bn1.bias\0layer3.1.conv2.weight\0"
    b"layer2.0.conv1.weight\0layer2.0.bn1.weight\0layer2.0.bn1.bias\0layer2.0.conv2.weight\0layer2.0.bn2.weight\0"
    b"layer2.0.bn2.bias\0layer2.1.conv1.weight\0layer1.0.conv1.weight\0layer1.0.bn1.weight\0layer1.0.bn1.bias\0"
    b"layer1.0.conv2.weight\0layer1.0.bn2.weight\0layer1.0.bn2.bias\0layer1.1.conv1.weight\0layer1.1.bn1.weight\0"
    b"layer1.1.bn1.bias\0\x01\x06option\x04\x10rd(0.062,0.05)s70\x01\x06option\x04\x0frd(0.031,0.2)s60"
)


@dataclass(frozen=True)
class Slot:
    """What the header says of one entry: everything but its payload's bytes, of which it has the length."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    step: str
    params: Mapping[str, Value]
    length: int


@dataclass(frozen=True)
class Header:
    """The parsed header: slots in file order, and the caller's metadata."""

    slots: tuple[Slot, ...]
    meta: Mapping[str, Value]


def deflate(raw: bytes) -> bytes:
    """Compress with raw deflate (RFC 1951) and the preset dictionary."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    return packer.compress(raw) + packer.flush()


def inflate(data: bytes, length: int) -> bytes:
    """Undo `deflate`. Raises FormatError unless the stream is whole and yields exactly `length` bytes."""
    if length > _MAX_HEADER or length > 1032 * len(data):  # deflate expands by 1032 at most
        raise FormatError(f"header: {len(data)} deflated bytes cannot hold {length}")
    unpacker = zlib.decompressobj(-15, DICTIONARY)
    try:
        raw = unpacker.decompress(data, length + 1)
    except zlib.error as error:
        raise FormatError(f"header: not a deflate stream ({error})") from error
    if len(raw) != length or not unpacker.eof or unpacker.unused_data:
        raise FormatError(f"header: {length} bytes announced, the deflate stream does not hold exactly these")
    return raw


def _put_pairs(pairs: Mapping[str, Value], limit: int) -> bytes:
    """Encode a count and sorted (key, value) pairs."""
    if len(pairs) > limit:
        raise ValueError(f"at most {limit} header values, got {len(pairs)}")
    return put_uint(len(pairs)) + b"".join(put_string(key) + put_value(pairs[key]) for key in sorted(pairs))


def _pairs(cursor: Cursor, limit: int) -> dict[str, Value]:
    """Read what `_put_pairs` wrote."""
    pairs: dict[str, Value] = {}
    for _ in range(cursor.uint(limit)):
        key = cursor.string()
        if key in pairs:
            raise cursor.fail(f"the key {key!r} stands twice")
        pairs[key] = cursor.value()
    return pairs


def put_header(entries: Sequence[Entry], meta: Mapping[str, Value]) -> bytes:
    """Encode the header, before deflation: one column per property, so that equal neighbours stand together."""
    if len(entries) > _MAX_ENTRIES:
        raise ValueError(f"at most {_MAX_ENTRIES} entries, got {len(entries)}")
    if len({entry.name for entry in entries}) != len(entries):
        raise ValueError("two entries have the same name")
    for entry in entries:
        if "\0" in entry.name or not entry.name:
            raise ValueError(f"an entry's name is not empty and has no NUL, got {entry.name!r}")
        if len(entry.shape) > _MAX_DIMS:
            raise ValueError(f"entry {entry.name!r}: at most {_MAX_DIMS} axes, got {len(entry.shape)}")
    names = b"".join(entry.name.encode("utf-8") + b"\0" for entry in entries)
    raw = b"".join(
        [
            put_uint(len(entries)),
            put_uint(len(names)),
            names,
            bytes(codec_named(entry.codec).number for entry in entries),
            bytes(DTYPES.index(entry.dtype) * 4 + STEPS.index(split_step(entry.step)[0]) for entry in entries),
            bytes(len(entry.shape) for entry in entries),
            b"".join(put_uint(axis) for entry in entries for axis in entry.shape),
            b"".join(put_uint(len(entry.payload)) for entry in entries),
            b"".join(put_uint(entry.group) for entry in entries if entry.group),
            b"".join(_put_pairs(entry.params, _MAX_PARAMS) for entry in entries),
            _put_pairs(meta, _MAX_META),
        ]
    )
    if len(raw) > _MAX_HEADER:
        raise ValueError(f"a header has at most {_MAX_HEADER} bytes, got {len(raw)}")
    return raw


def parse_header(raw: bytes) -> Header:
    """Undo `put_header`, and check everything that can be checked without the payloads."""
    cursor = Cursor(raw, "header")
    count = cursor.uint(_MAX_ENTRIES)
    block = cursor.take(cursor.uint(_MAX_HEADER))
    names = block.split(b"\0")
    if names.pop() or len(names) != count or len(set(names)) != count or b"" in names:
        raise cursor.fail(f"{count} different names wanted")
    codecs, kinds, ranks = cursor.take(count), cursor.take(count), cursor.take(count)
    shapes: list[tuple[int, ...]] = []
    for rank in ranks:
        if rank > _MAX_DIMS:
            raise cursor.fail(f"a tensor of {rank} axes; at most {_MAX_DIMS}")
        shape = tuple(cursor.uint(_MAX_NUMEL) for _ in range(rank))
        if math.prod(shape) > _MAX_NUMEL:
            raise cursor.fail(f"a tensor of {math.prod(shape)} values; at most {_MAX_NUMEL}")
        shapes.append(shape)
    lengths = [cursor.uint() for _ in range(count)]
    steps = [STEPS[kind % 4] + (str(cursor.uint(_MAX_NUMEL)) if STEPS[kind % 4] == "group" else "") for kind in kinds]
    slots: list[Slot] = []
    for i in range(count):
        try:
            name = names[i].decode("utf-8")
        except UnicodeDecodeError as error:
            raise cursor.fail(f"the name {names[i]!r} is not UTF-8") from error
        if codecs[i] not in CODEC_IDS:
            known = f"this version knows 0 to {max(CODEC_IDS)}"
            raise FormatError(f"entry {name!r}: unknown codec number {codecs[i]}; {known}")
        if kinds[i] // 4 >= len(DTYPES):
            raise FormatError(f"entry {name!r}: unknown dtype {kinds[i] // 4}")
        slot = Slot(
            name, shapes[i], DTYPES[kinds[i] // 4], CODEC_IDS[codecs[i]].name, steps[i],
            _pairs(cursor, _MAX_PARAMS), lengths[i],
        )  # fmt: skip
        body = slot.length - step_bytes(slot.shape, slot.step)
        if body < 0 or math.prod(slot.shape) > MAX_EXPANSION * body:
            raise FormatError(f"entry {name!r}: {slot.length} bytes cannot hold the shape {slot.shape}")
        slots.append(slot)
    meta = _pairs(cursor, _MAX_META)
    cursor.end()
    return Header(tuple(slots), meta)
