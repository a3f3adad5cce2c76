"""What tables and the page show, as plain rows: each layer of a plan, and every byte of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autocompress.profiling import Profile
from autocompress.storage import Archive, step_bytes
from autocompress.types import Plan

__all__ = [
    "FilePart",
    "LayerRow",
    "amount",
    "byte_groups",
    "cost_rows",
    "file_parts",
    "layer_rows",
    "percent",
    "ratio_text",
]

SECTION_CHECKSUMS = "section checksums"


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


def layer_rows(plan: Plan, profile: Profile) -> list[LayerRow]:
    """The plan's layers in the order of the model. Raises MismatchError if the profile has no such option."""
    found = []
    for name, layer in profile.with_realised(plan).layers.items():
        row = layer.row(plan.layers[name])
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


def byte_groups(parts: Sequence[FilePart]) -> dict[str, list[FilePart]]:
    """The parts by what they are for; every part is in one group, so the groups' bytes sum to the file's length too."""
    layers = {part.name for part in parts if part.kind == "layer"}
    found: dict[str, list[FilePart]] = {
        name: [] for name in ("weights", "biases", "norms, other tensors", "header", "checksums")
    }
    for part in parts:
        if part.kind == "layer":
            group = "weights"
        elif part.kind == "file":
            group = "checksums" if part.name == SECTION_CHECKSUMS else "header"
        else:
            owner, _, field = part.name.rpartition(".")
            group = "biases" if field == "bias" and f"{owner}.weight" in layers else "norms, other tensors"
        found[group].append(part)
    return {name: group for name, group in found.items() if group}


def cost_rows(costs: Mapping[str, Mapping[str, float | None]]) -> dict[str, str]:
    """What a forward pass of one sample takes, a line for each cost of `planning.cost_facts`; of MACs and BOPs only
    those that were limited or that differ from the dense model's.
    """
    found = {}
    for name, (label, form) in {
        "macs": ("MACs", ",.0f"),
        "bops": ("BOPs", ",.0f"),
        "latency_ms": ("ms", ".3f"),
    }.items():
        cost = costs.get(name)
        if cost is None or (cost["limit"] is None and cost["predicted"] == cost["dense"]):
            continue
        predicted, dense, limit, measured = (cost.get(key) for key in ("predicted", "dense", "limit", "measured"))
        assert predicted is not None
        assert dense is not None
        text = f"{predicted:{form}} per sample"
        if name == "latency_ms":
            text = f"{predicted:{form}} predicted" + ("" if measured is None else f", {measured:{form}} measured")
            text += ", per sample in onnxruntime on one thread"
        text += f"; the dense model {dense:{form}}" + ("" if limit is None else f", at most {limit:{form}} asked")
        if limit is not None and measured is not None and measured > limit:
            text += ": measured above what was asked"
        found[label] = text
    return found


def amount(count: int) -> str:
    """Bytes for people, decimal units: 15,810 bytes (15.8 kB)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count:,} bytes ({count / size:.1f} {unit})"
    return f"{count:,} bytes"


def ratio_text(ratio: float) -> str:
    """A ratio that is never rounded up: 10.0x."""
    return f"{math.floor(ratio * 10) / 10:.1f}x"


def percent(gap: float) -> str:
    """A proven gap, two digits, or all that are before the point.

    >>> percent(1e-12), percent(0.0234), percent(3.32)
    ('0 %', '2.3 %', '332 %')
    """
    return "0 %" if gap <= 1e-9 else f"{100 * gap:.2g} %" if gap < 0.995 else f"{100 * gap:,.0f} %"
