"""Which records a model's file has: compressed weights, folded norms, everything else; and how long the file of any
plan is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.compressors import Measured
from autocompress.layers import NORMS, Layers, dense_file_bytes, stored_tensors
from autocompress.storage import Entry, file_size, float_entry

__all__ = ["Template", "fold_norms", "foldable_norms", "half_keys", "make_template", "records", "round_half"]

SCALED = (nn.LayerNorm, nn.GroupNorm, *NORMS)  # modules whose weight and bias are a scale and a shift per channel
HALF_LIMIT = 2.0**13  # largest entry of a vector in half precision, which ends at 65504: corrections need room


def half_keys(model: nn.Module, layers: Layers) -> frozenset[str]:
    """Names of the tensors that are stored as binary16: scales and shifts of norms, and biases of layers.

    A scale qualifies if rounding moves it by less than 2⁻¹⁰ of the largest one; a shift, or a bias, if it moves the
    output by less than 2⁻⁷ of its spread, which is γ after a norm, and about the norm of a weight's row after a layer.
    Anything else (tables, frequencies, constants) is the model's own affair and stays exact. Decided on the dense
    model, so that the choice of options does not change which.
    """
    folded = copy.deepcopy(model)
    with torch.no_grad():
        fold_norms(folded)
    stored = stored_tensors(folded)
    tolerance: dict[str, float] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, SCALED) and weight is not None:
            scale = stored.get(_join(name, "weight"))
            if scale is not None:
                tolerance[_join(name, "weight")] = 2.0**-10 * float(scale.double().abs().max())
            tolerance[_join(name, "bias")] = 2.0**-7 * float(weight.detach().double().abs().max())
    for layer in layers:
        rows = np.sqrt((layer.matrix(model.get_parameter(layer.key)) ** 2).sum(axis=-1))
        for owner in layer.owners:
            tolerance[_join(owner, layer.parameter.replace("weight", "bias"))] = 2.0**-7 * float(rows.mean())
    found = set()
    for name in tolerance.keys() & stored.keys():
        tensor = stored[name]
        lost = (tensor.half().to(tensor.dtype) - tensor).double().abs()
        if tensor.is_floating_point() and float(tensor.abs().max()) <= HALF_LIMIT:
            if float(lost.max()) <= tolerance[name]:
                found.add(name)
    return frozenset(found)


def round_half(values: torch.Tensor) -> torch.Tensor:
    """Values as binary16 holds them; what is beyond its range becomes its largest number."""
    return values.clamp(-65504.0, 65504.0).half()


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


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
    """Batch norms with scale, shift and running statistics, none of them shared with another module, by name."""
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, NORMS) and m.affine and m.track_running_stats]
    users = Counter(id(t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()))

    def own(norm: Any) -> bool:
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return all(t is not None and users[id(t)] == 1 for t in tensors)

    return [(name, norm) for name, norm in norms if own(norm)]


def records(small: nn.Module, compressed: Mapping[str, Entry], half: Collection[str]) -> list[Entry]:
    """The records of every stored tensor in the order of the state dict, those of `half` as binary16; a folded norm's
    statistics are implied.
    """
    folded = {name for name, _ in foldable_norms(small)}
    entries = []
    for key, tensor in stored_tensors(small).items():
        owner, _, field = key.rpartition(".")
        if owner in folded and field in ("running_mean", "running_var"):
            continue
        params = {"folded": 1} if owner in folded and field == "weight" else {}
        if key in compressed:
            entries.append(compressed[key])
        elif key in half:
            entries.append(float_entry(key, tensor.float().cpu().numpy(), codec="fp16", params=params))
        else:
            exact = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bfloat16
            entries.append(float_entry(key, exact.cpu().numpy(), codec="raw", params=params))
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
    half: frozenset[str]
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
            "half": sorted(self.half),
            "dense_bytes": self.dense_bytes,
            "parameters": self.parameters,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Template:
        entries = [
            Entry(name, tuple(shape), dtype, codec, bytes(length), params=params)
            for name, shape, dtype, codec, length, params in value["entries"]
        ]
        return cls(
            tuple(entries), dict(value["keys"]), frozenset(value["half"]), value["dense_bytes"], value["parameters"]
        )


def _stand_in(entry: Entry, row: Measured) -> Entry:
    """An entry of the length that `row` will have; its bytes are zeros."""
    return Entry(
        entry.name,
        entry.shape,
        entry.dtype,
        row.codec,
        bytes(row.bytes),
        row.step,
        {**entry.params, "option": str(row.option)},
    )


def make_template(model: nn.Module, layers: Layers) -> Template:
    """The template of a model's file: norms folded (corrected ones have the same length), every layer dense."""
    small = copy.deepcopy(model).eval()
    with torch.no_grad():
        fold_norms(small)
    half = half_keys(model, layers)
    keys = {layer.name: layer.key for layer in layers}
    dense = {
        layer.key: Entry(
            layer.key,
            layer.stored_shape,
            "float32",
            "raw",
            bytes(4 * layer.size),
            params={"option": "dense", **layer.params},
        )
        for layer in layers
    }
    entries = [
        Entry(e.name, e.shape, e.dtype, e.codec, bytes(e.bytes), e.step, e.params) for e in records(small, dense, half)
    ]
    parameters = sum(t.numel() for t in stored_tensors(model).values() if t.is_floating_point())
    return Template(tuple(entries), keys, half, dense_file_bytes(model), parameters)
