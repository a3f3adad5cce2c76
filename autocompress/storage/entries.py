"""Entries: one named tensor each, as the bytes that stand in a file and what is needed to read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autocompress.storage.bits import MAX_EXPANSION, Value
from autocompress.storage.codecs import codec_named
from autocompress.storage.errors import FormatError
from autocompress.storage.floats import DTYPES, round_small
from autocompress.storage.integers import encode_packed, packed_length
from autocompress.storage.vectors import codebook_length, codebook_size, encode_codebook

__all__ = [
    "Entry",
    "float_entry",
    "grid_codes",
    "grid_entry",
    "grid_size",
    "split_step",
    "step_bytes",
    "weight_entry",
    "weight_size",
    "with_fixed_fields",
]

_CHUNK = 1 << 16  # codes dequantised at once
STEPS = ("none", "tensor", "row", "group")  # position = number in a file; a group's name ends with its size


@dataclass(frozen=True)
class Entry:
    """A named tensor of a file: `payload` is its steps, if it has any, followed by what its codec wrote.

    A weight entry (`step` is "tensor", "row" or, say, "group32") holds integer codes, or e4m3 numbers; its value is
    float32(code) * float32(step), where the step is one binary32 for the tensor, or one binary16 per row or per group
    of that many consecutive codes of a row, rows being shape[0] and a row's last group what is left. Any other entry
    holds its values. `params` is free for the caller (an option's name, say) and is stored in the header.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    payload: bytes = field(repr=False)
    step: str = "none"
    params: Mapping[str, Value] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The payload's length, steps included; names, shapes and checksums are the header's."""
        return len(self.payload)

    def check(self) -> None:
        """Raise FormatError unless dtype, codec, step kind and lengths fit together; decodes nothing."""
        codec = codec_named(self.codec)
        if self.dtype not in DTYPES:
            raise FormatError(f"unknown dtype {self.dtype!r}; this version knows {', '.join(DTYPES)}")
        kind, _ = split_step(self.step)
        if self.step != "none" and (codec.kind == "floats" or self.dtype != "float32"):
            raise FormatError(
                f"steps belong to the integer codes of a float32 tensor, not to {self.codec} of {self.dtype}"
            )
        if self.step == "none" and codec.kind == "scaled":
            raise FormatError(f"{self.codec} needs steps")
        if self.step == "none" and codec.kind == "codes" and self.dtype != "int32":
            raise FormatError(f"codes without a step are int32, not {self.dtype}")
        if kind in ("row", "group") and not self.shape:
            raise FormatError("a step per row needs a row axis")
        prefix = step_bytes(self.shape, self.step)
        if prefix > len(self.payload):
            raise FormatError(f"{prefix} bytes of steps wanted, the payload has {len(self.payload)}")
        if self.numel > MAX_EXPANSION * (len(self.payload) - prefix):
            raise FormatError(f"{len(self.payload) - prefix} bytes cannot hold {self.numel} values")

    def steps(self) -> np.ndarray:
        """Read the steps as float32: shape () for the tensor, (rows,) per row, (rows, groups) per group.

        Raises FormatError if there are none.
        """
        self.check()
        if self.step == "none":
            raise FormatError(f"entry {self.name!r} holds values, not codes with steps")
        raw = self.payload[: step_bytes(self.shape, self.step)]
        steps = np.frombuffer(raw, "<f4" if self.step == "tensor" else "<f2").astype(np.float32)
        if not (np.isfinite(steps).all() and (steps >= 0).all()):
            raise FormatError(f"entry {self.name!r}: a step that is negative or not finite")
        if self.step == "tensor":
            return steps.reshape(())
        return steps if self.group is None else steps.reshape(self.shape[0], steps.size // max(self.shape[0], 1))

    @property
    def group(self) -> int | None:
        """How many consecutive codes of a row share a step; None where all of them do."""
        return split_step(self.step)[1] or None

    def codes(self) -> np.ndarray:
        """Decode the stored codes of a weight entry (int32; float32 for e4m3), or the values of any other entry."""
        self.check()
        body = self.payload[step_bytes(self.shape, self.step) :]
        try:
            return codec_named(self.codec).decode(body, self.shape, self.dtype)
        except FormatError as error:
            raise error.within(f"entry {self.name!r}") from error

    def dequantise(self) -> np.ndarray:
        """Decode the tensor: float32(code) * float32(step) for a weight, else the values in their dtype."""
        if self.step == "none":
            return self.codes()
        steps, codes = self.steps(), self.codes().reshape(-1)
        values = codes.view(np.float32)  # in place, part by part: no second tensor is allocated
        columns = max(codes.size // self.shape[0], 1) if steps.ndim and codes.size else 1
        for start in range(0, codes.size, _CHUNK):
            part = slice(start, min(start + _CHUNK, codes.size))
            factor = steps
            if steps.ndim:
                row, column = np.divmod(np.arange(part.start, part.stop), columns)
                factor = steps[row] if self.group is None else steps[row, column // self.group]
            with np.errstate(over="ignore"):
                values[part] = codes[part].astype(np.float32) * factor
            if not np.isfinite(values[part]).all():
                raise FormatError(f"entry {self.name!r}: a weight beyond float32")
        return values.reshape(self.shape)


def split_step(step: str) -> tuple[str, int]:
    """Split the kind of step into its name and the size of a group, 0 for the others. Raises FormatError."""
    kind = step.rstrip("0123456789")
    size = step[len(kind) :]
    if kind not in STEPS or (kind == "group") != bool(size) or size.startswith("0"):
        raise FormatError(f"unknown kind of step {step!r}; this version knows {', '.join(STEPS)} with a size")
    return kind, int(size or 0)


def step_bytes(shape: Sequence[int], step: str) -> int:
    """Count the bytes of the steps in front of a payload: 4 for a tensor, 2 * shape[0] per row, 0 for none; for groups
    2 * shape[0] times the number of groups that a row has.
    """
    kind, size = split_step(step)
    if kind in ("none", "tensor") or not shape:
        return 4 if kind == "tensor" else 0
    return 2 * shape[0] * (-(-math.prod(shape[1:]) // size) if size else 1)


def _step(shape: tuple[int, ...], step: float | np.ndarray, group: int | None) -> tuple[str, bytes]:
    """Encode a scalar step as binary32, a vector of shape[0] steps or a matrix (shape[0], groups) as binary16."""
    values = np.asarray(step, np.float64)
    if values.ndim == 0:
        kind, raw = "tensor", values.astype("<f4")
    elif values.shape == shape[:1] or (
        values.ndim == 2 and group and shape and values.shape == (shape[0], -(-math.prod(shape[1:]) // group))
    ):
        with np.errstate(over="ignore"):  # what overflows is refused below
            kind, raw = "row" if values.ndim == 1 else f"group{group}", values.astype("<f2")
    else:
        groups = f" or one per group of {group}" if group else ""
        raise ValueError(f"a step is one number or one per row {shape[:1]}{groups}, got shape {values.shape}")
    if not (np.isfinite(raw).all() and (raw >= 0).all()):
        raise ValueError("steps are finite and not negative in the precision they are stored in")
    return kind, raw.tobytes()


def weight_entry(
    name: str,
    codes: np.ndarray,
    step: float | np.ndarray,
    *,
    codec: str = "entropy",
    group: int | None = None,
    vector: int | None = None,
    params: Mapping[str, Value] | None = None,
) -> Entry:
    """Make the entry of a quantised weight: codes of its shape and one step, one per row, or (rows, groups) of them
    where each `group` consecutive codes of a row share one. vector: of the codec codebook, how many codes a word has.

    The steps are stored as binary32 (one) or binary16 (several): choose the codes with the rounded steps.
    """
    codes = np.asarray(codes)
    chosen = codec_named(codec)
    if chosen.kind == "floats":
        raise ValueError(f"{codec} stores floats; codes need one of the integer codecs")
    if vector is not None and codec != "codebook":
        raise ValueError(f"vectors belong to the codec codebook, not to {codec}")
    kind, raw = _step(codes.shape, step, group)
    body = chosen.encode(codes) if vector is None else encode_codebook(codes, vector)
    entry = Entry(name, codes.shape, "float32", codec, raw + body, kind, dict(params or {}))
    entry.check()
    return entry


def with_fixed_fields(entry: Entry) -> Entry:
    """The entry of a codebook with words and indices in packed fields, where 16 bits hold them."""
    start = step_bytes(entry.shape, entry.step)
    body = encode_codebook(entry.codes(), codebook_length(entry.payload[start:]), fixed=True)
    return replace(entry, payload=entry.payload[:start] + body)


def weight_size(
    codes: np.ndarray,
    step: float | np.ndarray,
    codec: str = "entropy",
    group: int | None = None,
    vector: int | None = None,
) -> int:
    """Count the bytes of `weight_entry(...)` exactly, without encoding."""
    codes = np.asarray(codes)
    body = codec_named(codec).size(codes) if vector is None else codebook_size(codes, vector)
    return step_bytes(codes.shape, _step(codes.shape, step, group)[0]) + body


def grid_codes(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.float32]:
    """Codes int32 and step of the uniform grid of 2**bits levels from the least to the greatest value.

    value = float32(code) * step, off by half a step at most; where the values lie so close together that a code would
    need more than 16 bits, the step is as fine as those allow.
    """
    wide = np.asarray(values, np.float64)
    low, high = float(wide.min(initial=np.inf)), float(wide.max(initial=-np.inf))
    peak = max(abs(low), abs(high)) if wide.size else 0.0
    step = np.float32(max((high - low) / (2**bits - 1), peak / 32000.0) if peak > 0.0 else 1.0)
    if not step > 0.0:  # values below the least float32
        return np.zeros(wide.shape, np.int32), np.float32(1.0)
    first = round(low / float(step)) if wide.size else 0
    return np.clip(np.rint(wide / float(step)), first, first + 2**bits - 1).astype(np.int32), step


def grid_entry(
    name: str, codes: np.ndarray, step: float | np.floating, bits: int, *, params: Mapping[str, Value] | None = None
) -> Entry:
    """Make the entry of values on a uniform grid, in fields of `bits` bits: `grid_size` bytes, whatever the values."""
    _, raw = _step(codes.shape, float(step), None)
    entry = Entry(
        name, codes.shape, "float32", "packed", raw + encode_packed(codes, bits), "tensor", dict(params or {})
    )
    entry.check()
    return entry


def grid_size(count: int, bits: int) -> int:
    """Count the bytes of `grid_entry` for `count` values."""
    return step_bytes((), "tensor") + packed_length(count, bits)


def float_entry(
    name: str,
    array: np.ndarray,
    *,
    codec: str = "fp16",
    mantissa: int | None = None,
    params: Mapping[str, Value] | None = None,
) -> Entry:
    """Make the entry of a tensor that is stored by value: fp16, raw in its own dtype, or smallfloat.

    `mantissa` (smallfloat only) rounds to that many mantissa bits first; without it the values are stored exactly.
    """
    array = np.asarray(array)
    chosen = codec_named(codec)
    if chosen.kind != "floats":
        raise ValueError(f"{codec} stores integer codes; use weight_entry, or one of the float codecs")
    if array.dtype.name not in DTYPES:
        raise ValueError(f"entry {name!r}: dtype {array.dtype} cannot be stored; {', '.join(DTYPES)} can")
    if codec != "raw" and array.dtype.kind != "f":
        raise ValueError(f"entry {name!r}: {codec} stores floats, got {array.dtype}; use codec='raw'")
    if mantissa is not None:
        if codec != "smallfloat":
            raise ValueError(f"mantissa bits belong to smallfloat, not to {codec}")
        array = round_small(array, mantissa)
    entry = Entry(name, array.shape, array.dtype.name, codec, chosen.encode(array), "none", dict(params or {}))
    entry.check()
    return entry
