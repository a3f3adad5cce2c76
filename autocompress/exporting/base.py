"""What every exporter works on and gives back: the tensors of a file, how a format holds each, what was written."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from autocompress.costs import code_bits
from autocompress.errors import AutocompressError
from autocompress.layers import swap
from autocompress.records import swap_groups
from autocompress.storage import Entry
from autocompress.types import Option

__all__ = [
    "ExportError",
    "ExportInfo",
    "ExportWarning",
    "Exporter",
    "Held",
    "Request",
    "Weight",
    "atomic_folder",
    "code_bits",
    "least_bits",
    "missing",
    "requantised",
    "weight_of",
    "with_zero_points",
]


class ExportError(AutocompressError):
    """Something cannot be exported as asked: the format cannot hold it, or what it needs is not there."""


class ExportWarning(UserWarning):
    """An export that holds something else than the file does; names the layers."""


@dataclass(frozen=True)
class Weight:
    """A layer's weight as the file holds it: integer codes times step, or values.

    codes: int32 in the weight's shape, or None; step: float32 (), (rows,), or (rows, groups) where each run of `group`
    consecutive columns has its own (columns run over everything but the first axis); values: float32 or float16, where
    there are no codes. owners: every module that uses it.
    """

    key: str
    owners: tuple[str, ...]
    shape: tuple[int, ...]
    option: Option
    codes: np.ndarray | None = None
    step: np.ndarray = field(default_factory=lambda: np.ones((), np.float32))
    values: np.ndarray | None = None
    group: int | None = None

    @property
    def name(self) -> str:
        return self.owners[0]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return int(np.prod(self.shape[1:]))

    def dense(self) -> np.ndarray:
        """The weight that a reader of the file gets, float32: float32(code) * step, rounded once."""
        if self.codes is None:
            assert self.values is not None
            return self.values.astype(np.float32)
        step = self.step if self.step.ndim != 1 else self.step[:, None]
        if self.step.ndim == 2:
            step = np.repeat(self.step, self.group or 1, axis=1)[:, : self.columns]
        return (self.codes.reshape(self.rows, -1).astype(np.float32) * step).reshape(self.shape)


def weight_of(entry: Entry, owners: Sequence[str]) -> Weight:
    """The weight of a file's record, in the model's layout. Raises FormatError if it is damaged.

    Steps per row of a weight that is stored rows first belong to its second dimension then: it becomes its values.
    """
    option = Option.parse(str(entry.params["option"]))
    groups = swap_groups(entry)

    def placed(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(swap(array, groups)) if groups else array

    scaled = entry.step != "none" and entry.codec != "fp8"
    if scaled and not (groups and entry.steps().ndim):
        codes = placed(entry.codes().reshape(entry.shape))
        return Weight(entry.name, tuple(owners), codes.shape, option, codes, entry.steps(), group=entry.group)
    values = placed(entry.dequantise().reshape(entry.shape))
    half = entry.codec == "fp16" or option.half
    return Weight(
        entry.name,
        tuple(owners),
        values.shape,
        option,
        values=values.astype(np.float16 if half else np.float32),
    )


def least_bits(weight: Weight) -> tuple[int, bool]:
    """The least bits that hold a weight's codes, and whether that takes zero points: so it is where the grid is not
    symmetric and its codes run over more than they would around zero.
    """
    assert weight.codes is not None
    bits, plain = weight.option.bits, code_bits(weight.codes)
    return (bits, True) if weight.option.asymmetric and bits is not None and bits < plain else (plain, False)


def with_zero_points(
    codes: np.ndarray, step: np.ndarray, group: int | None, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes moved so that those of each step start at -2^(bits-1), and by how much, int32 in the shape of step.

    Codes of 0 become the zero point, which is therefore within the bits too.

    >>> moved, zero = with_zero_points(np.array([[0, 15], [-3, 12]]), np.ones(2), None, 4)
    >>> moved.tolist(), zero.tolist()
    ([[-8, 7], [-8, 7]], [-8, -5])
    """
    rows = codes.reshape(codes.shape[0], -1)
    size = group or rows.shape[1]
    low = np.minimum(np.minimum.reduceat(rows, np.arange(0, rows.shape[1], size), axis=1), 0)
    low = np.broadcast_to(low.min(), low.shape) if step.ndim == 0 else low
    zero = (-(2 ** (bits - 1)) - low).astype(np.int32)
    moved = rows + np.repeat(zero, size, axis=1)[:, : rows.shape[1]]
    return moved.reshape(codes.shape), zero.reshape(-1)[:1].reshape(()) if step.ndim == 0 else zero.reshape(step.shape)


def requantised(weight: Weight, bits: int) -> Weight:
    """The weight rounded to the nearest of 2^bits - 1 symmetric levels per row; a row of zeros stays one."""
    dense = weight.dense().reshape(weight.rows, -1)
    top = 2 ** (bits - 1) - 1
    peak = np.abs(dense).max(axis=1)
    step = np.where(peak > 0, peak / np.float32(top), np.float32(1)).astype(np.float32)
    codes = np.clip(np.rint(dense / step[:, None]), -top, top).astype(np.int32).reshape(weight.shape)
    return Weight(weight.key, weight.owners, weight.shape, weight.option, codes, step)


@dataclass(frozen=True)
class Held:
    """How a format holds one weight: `kind` as the format calls it, `bits` per value, and the weight itself.

    `loses`: what a reader of the export does not get that a reader of the file does; empty where nothing is lost.
    `shifted`: whether codes fit into `bits` only with a zero point for each step, `with_zero_points`.
    """

    weight: Weight
    kind: str
    bits: int
    loses: str = ""
    shifted: bool = False


@dataclass(frozen=True)
class Request:
    """What an exporter writes: the filled model in eval mode, its compressed weights by key, all other tensors.

    `floats` are the remaining tensors of the file by name, float16 where the file has them so. `example` is one batch,
    or None. `aliases` maps every name of a state dict to the one that the file knows the tensor by.
    """

    model: nn.Module
    held: Mapping[str, Held]
    floats: Mapping[str, np.ndarray]
    aliases: Mapping[str, str]
    example: Any = None


class Exporter(Protocol):
    """One format. Its fields are what can be chosen about it."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> bool:
        """Whether `out` is a folder."""
        ...

    def check(self, model: nn.Module, example: Any) -> None:
        """Raise ExportError where the model or this machine lacks what the format needs; writes nothing."""
        ...

    def hold(self, weight: Weight, owner: nn.Module) -> Held:
        """How this format holds a weight."""
        ...

    def write(self, request: Request, out: Path, admit: Callable[[int], None]) -> tuple[list[Path], dict[str, Any]]:
        """Write to `out`, whole or not at all: (files, facts about them).

        admit: is called with the bytes of all files before any takes its place, and raises if they are too many.
        """
        ...


@dataclass(frozen=True)
class ExportInfo:
    """What stands on disk: `bytes` is the length of all `files` together.

    `layers`: (layer, option, how it is held). `notes`: what differs from the file, by layer. `facts`: what the
    exporter found out, for example the largest difference between the runtime's output and the model's.
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    bytes: int
    layers: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    facts: Mapping[str, Any]

    def by_kind(self) -> dict[str, list[str]]:
        """The layers' names by how they are held."""
        kinds: dict[str, list[str]] = {}
        for name, _, kind in self.layers:
            kinds.setdefault(kind, []).append(name)
        return dict(sorted(kinds.items()))


def missing(format_name: str, extra: str, error: ImportError) -> ExportError:
    """The error where a library is not installed, with the command that adds it."""
    return ExportError(
        f"exporting to {format_name} needs {error.name}; install it with: pip install 'autocompress[{extra}]'"
    )


@contextlib.contextmanager
def atomic_folder(out: Path, known: Sequence[str]) -> Iterator[Path]:
    """A scratch folder that takes the place of `out` when the block ends well, and is removed when it does not.

    An `out` that is there may hold nothing but files named in `known`: it is one of ours, or empty. Raises ExportError
    where it holds anything else, before the block is entered; OSError from the file system.
    """
    if out.exists():
        strangers = sorted(p.name for p in out.iterdir() if p.name not in known) if out.is_dir() else [out.name]
        if strangers:
            raise ExportError(
                f"{out} is there and holds {strangers[0]!r}, which this does not write; choose another folder"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        yield scratch
        for path in scratch.iterdir():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o777 & ~mask)
        if out.exists():
            # No folder replaces another in one step: the old one is put aside, and back if the new one cannot move.
            aside = scratch.with_suffix(".old")
            out.rename(aside)
            try:
                scratch.rename(out)
            except OSError:
                aside.rename(out)
                raise
            shutil.rmtree(aside)
        else:
            scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
