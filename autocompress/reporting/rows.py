"""What tables and the page show, as plain rows: each layer of a plan, and every byte of a file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from autocompress.compressors import Measured
from autocompress.profiling import LayerProfile, Profile
from autocompress.storage import Archive, step_bytes
from autocompress.types import Plan

__all__ = ["FilePart", "LayerRow", "amount", "file_parts", "layer_rows", "ratio_text"]


@dataclass(frozen=True)
class LayerRow:
    """One layer of a plan.

    error: relative to the error of losing the whole layer; None where calibration never reached it. share: its part of
    the sum of all layers' relative errors. bits_per_weight counts the payload, steps included, over all weights.
    """

    name: str
    shape: tuple[int, ...]
    option: str
    weights: int
    bytes: int
    bits_per_weight: float
    error: float | None
    share: float


@dataclass(frozen=True)
class FilePart:
    """A part of a file; the `bytes` of all parts sum to its length. kind: layer, tensor or file (header, checksums)."""

    name: str
    kind: str
    shape: tuple[int, ...] | None
    option: str
    codec: str
    bytes: int
    bits_per_weight: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def chosen_row(plan: Plan, layer: LayerProfile) -> Measured:
    """What the plan gives a layer: what sequential mode made of it, or its row in the profile, or MismatchError."""
    name = layer.layer.name
    if (made := plan.realised.get(name)) is not None:
        return Measured(plan.layers[name], made["error"], int(made["bytes"]), "", "", 0.0)
    return layer.row(plan.layers[name])


def layer_rows(plan: Plan, profile: Profile) -> list[LayerRow]:
    """The plan's layers in the order of the model. Raises MismatchError if the profile has no such option."""
    found = []
    for layer in profile.layers.values():
        row = chosen_row(plan, layer)
        error = row.error / layer.energy if layer.reached and layer.energy > 0 else (0.0 if layer.reached else None)
        found.append((layer.layer, row, error))
    total = sum(error for *_, error in found if error is not None)
    return [
        LayerRow(
            layer.name,
            layer.shape,
            str(row.option),
            layer.size,
            row.bytes,
            8 * row.bytes / layer.size,
            error,
            error / total if error and total > 0 else 0.0,
        )
        for layer, row, error in found
    ]


def file_parts(archive: Archive) -> list[FilePart]:
    """Where every byte of a file goes, in file order. Raises FormatError where a section fails its checksum."""
    entries = [archive[name] for name in archive.names]
    described = archive.describe()
    steps = sum(1 for e in entries if step_bytes(e.shape, e.step))
    front = described[: len(described) - len(entries) - steps]
    parts = [FilePart(name, "file", None, "", "", size, None) for name, size in front]
    for entry in entries:
        option = str(entry.params.get("option", ""))
        codec = entry.codec if entry.step == "none" else f"{entry.codec}, step per {entry.step}"
        parts.append(
            FilePart(
                entry.name,
                "layer" if option else "tensor",
                entry.shape,
                option,
                codec,
                entry.bytes,
                8 * entry.bytes / entry.numel if entry.numel else None,
            )
        )
    return parts


def amount(count: int) -> str:
    """Bytes for people, decimal units: 15,810 bytes (15.8 kB)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count:,} bytes ({count / size:.1f} {unit})"
    return f"{count:,} bytes"


def ratio_text(ratio: float) -> str:
    """A ratio that is never rounded up: 10.0x."""
    return f"{math.floor(ratio * 10) / 10:.1f}x"
