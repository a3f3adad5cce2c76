"""Which records a model's file has: compressed weights, folded norms, everything else; and how long the file of any
plan is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autocompress.compressors import Measured
from autocompress.layers import NORMS, Layers, dense_file_bytes, stored_tensors
from autocompress.storage import Entry, file_size, float_entry

__all__ = ["Template", "fold_norms", "foldable_norms", "make_template", "records", "stored_as_half"]


def stored_as_half(tensor: torch.Tensor) -> bool:
    """Whether a tensor that is not a compressed weight is stored as binary16: vectors that lose less than 2⁻¹⁰ of their
    largest entry.
    """
    if not tensor.is_floating_point() or tensor.ndim > 1 or tensor.numel() == 0:
        return False
    peak = float(tensor.abs().max())
    half = tensor.half().to(tensor.dtype)
    return peak <= 65504.0 and bool(((half - tensor).abs() <= 2.0**-10 * peak).all())


def fold_norms(model: nn.Module) -> None:
    """Rewrite every affine batch norm as scale and shift: running mean 0 and variance 1, so that only two vectors need
    storing.

    weight = γ √(1+ε)/√(var+ε), bias = β - γ mean/√(var+ε); the function that the module computes in eval mode does not
    change.
    """
    for _, norm in foldable_norms(model):
        mean, var = norm.running_mean.double(), norm.running_var.double()
        scale = norm.weight.double() / (var + norm.eps).sqrt()
        norm.bias.copy_(norm.bias.double() - scale * mean)
        norm.weight.copy_(scale * (1.0 + norm.eps) ** 0.5)
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)


def foldable_norms(model: nn.Module) -> list[tuple[str, Any]]:
    """Batch norms with scale, shift and running statistics of their own, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        and module.affine
        and module.running_mean is not None
        and module.running_var is not None
    ]


def records(small: nn.Module, compressed: Mapping[str, Entry]) -> list[Entry]:
    """The records of every stored tensor in the order of the state dict; a folded norm's statistics are implied."""
    folded = {name for name, _ in foldable_norms(small)}
    entries = []
    for key, tensor in stored_tensors(small).items():
        owner, _, field = key.rpartition(".")
        if owner in folded and field in ("running_mean", "running_var"):
            continue
        params = {"folded": 1} if owner in folded and field == "weight" else {}
        if key in compressed:
            entries.append(compressed[key])
        elif stored_as_half(tensor):
            entries.append(float_entry(key, tensor.float().cpu().numpy(), codec="fp16", params=params))
        else:
            entries.append(float_entry(key, tensor.cpu().numpy(), codec="raw", params=params))
    return entries


@dataclass(frozen=True)
class Template:
    """Everything of a file but the compressed weights, so that the length of any plan's file is known without encoding
    it.

    `entries` are the records of all stored tensors in file order (payloads of the right length, not of the right
    bytes); `keys` maps each layer that can be compressed to its record. dense_bytes: see `layers.dense_file_bytes`;
    parameters: floating-point values.
    """

    entries: tuple[Entry, ...]
    keys: Mapping[str, str]
    dense_bytes: int
    parameters: int

    def file_bytes(self, choice: Mapping[str, Measured]) -> int:
        """Exact length of the file when each layer (by name) takes the given row of its profile.

        The header is compressed, so its length depends on the options' names; payloads enter by their length alone.
        """
        rows = {self.keys[name]: row for name, row in choice.items()}
        return file_size(
            [_stand_in(entry, rows[entry.name]) if entry.name in rows else entry for entry in self.entries]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "entries": [[e.name, list(e.shape), e.dtype, e.codec, e.bytes, dict(e.params)] for e in self.entries],
            "keys": dict(self.keys),
            "dense_bytes": self.dense_bytes,
            "parameters": self.parameters,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Template:
        entries = [
            Entry(name, tuple(shape), dtype, codec, bytes(length), params=params)
            for name, shape, dtype, codec, length, params in value["entries"]
        ]
        return cls(tuple(entries), dict(value["keys"]), value["dense_bytes"], value["parameters"])


def _stand_in(entry: Entry, row: Measured) -> Entry:
    """An entry of the length that `row` will have; its bytes are zeros."""
    return Entry(
        entry.name, entry.shape, entry.dtype, row.codec, bytes(row.bytes), row.step, {"option": str(row.option)}
    )


def make_template(model: nn.Module, layers: Layers) -> Template:
    """The template of a model's file: norms folded (corrected ones have the same length), every layer dense."""
    small = copy.deepcopy(model).eval()
    with torch.no_grad():
        fold_norms(small)
    keys = {layer.name: layer.key for layer in layers}
    dense = {
        layer.key: Entry(layer.key, layer.shape, "float32", "raw", bytes(4 * layer.size), params={"option": "dense"})
        for layer in layers
    }
    entries = [
        Entry(e.name, e.shape, e.dtype, e.codec, bytes(e.bytes), e.step, e.params) for e in records(small, dense)
    ]
    parameters = sum(t.numel() for t in stored_tensors(model).values() if t.is_floating_point())
    return Template(tuple(entries), keys, dense_file_bytes(model), parameters)
