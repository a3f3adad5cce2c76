"""Which records a model's file has: compressed weights, folded norms, everything else; and how long the file of any
plan is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.compressors import Measured
from autocompress.compressors.base import factor_keys
from autocompress.costs import factor_shapes
from autocompress.errors import MismatchError
from autocompress.factors import renamed
from autocompress.layers import NORMS, Layers, dense_file_bytes, is_rms_norm, stored_tensors, swap, weight_of
from autocompress.narrowing import WHOLE, Widths
from autocompress.storage import Entry, FormatError, file_size, float_entry, grid_codes, grid_entry, grid_size

__all__ = [
    "HALF_BITS",
    "LEAST_BITS",
    "Template",
    "VectorStore",
    "fold_norms",
    "foldable_norms",
    "make_template",
    "records",
    "rename_vectors",
    "stored_values",
    "swap_groups",
    "vector_bits",
    "vector_keys",
]

SCALED = (nn.LayerNorm, nn.GroupNorm, *NORMS)  # modules whose weight and bias are a scale and a shift per channel
HALF_LIMIT = 2.0**13  # largest entry of a vector in half precision, which ends at 65504: corrections need room
HALF_BITS, LEAST_BITS = 16, 6
# Bits that a value of a norm or a bias gets beyond the budget's average: `experiments/bench_vectors.py` compares.
EXTRA_BITS = 6
_ATTRIBUTE = "_autocompress_vectors"


def vector_bits(budget: int, parameters: int) -> int:
    """Bits per value of norms and biases for a file of `budget` bytes: six more than a parameter has on average.

    There are few of these values and each acts on a whole channel, so one is worth more bits than a weight. At 14 bits
    and more they are kept as binary16, which is relative to each value and needs no step.
    """
    bits = 8 * budget // max(parameters, 1) + EXTRA_BITS
    return HALF_BITS if bits >= 14 else bits


def vector_keys(model: nn.Module, layers: Layers) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the tensors that may be stored as binary16, and of those that may be rounded to a uniform grid too.

    Considered are scales and shifts of norms, and biases of layers. For binary16 a scale qualifies if rounding moves it
    by less than 2⁻¹⁰ of the largest one; a shift, or a bias, if it moves the output by less than 2⁻⁷ of its spread,
    which is γ after a norm, and about the norm of a weight's row after a layer. For a grid from the least to the
    greatest value that range must be at most 16 times the largest scale, or the spread. Anything else (tables,
    frequencies, constants) is the model's own affair and stays exact. Decided on the dense model, so that the choice of
    options does not change which.
    """
    folded = copy.deepcopy(model)
    with torch.no_grad():
        fold_norms(folded)
    stored = stored_tensors(folded)
    spread: dict[str, tuple[float, float]] = {}  # the unit, and what of it binary16 may lose
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if (isinstance(module, SCALED) or is_rms_norm(module)) and weight is not None:
            scale = stored.get(_join(name, "weight"))
            if scale is not None:
                spread[_join(name, "weight")] = float(scale.double().abs().max()), 2.0**-10
            spread[_join(name, "bias")] = float(weight.detach().double().abs().max()), 2.0**-7
    for layer in layers:
        rows = np.sqrt((layer.matrix(weight_of(model, layer.key)) ** 2).sum(axis=-1))
        for owner in layer.owners:
            spread[_join(owner, layer.parameter.replace("weight", "bias"))] = float(rows.mean()), 2.0**-7
    half, grid = set(), set()
    for name in spread.keys() & stored.keys():
        tensor, (unit, share) = stored[name], spread[name]
        lost = (tensor.half().to(tensor.dtype) - tensor).double().abs()
        if tensor.is_floating_point() and float(tensor.abs().max()) <= HALF_LIMIT and float(lost.max()) <= share * unit:
            half.add(name)
            if float(tensor.double().max() - tensor.double().min()) <= 16.0 * unit:
                grid.add(name)
    return frozenset(half), frozenset(grid)


class VectorStore:
    """Rounds the values of norms and biases to what the file will hold, and remembers the codes of those on a grid."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.codes: dict[str, tuple[np.ndarray, np.float32]] = {}

    def __call__(self, key: str, values: torch.Tensor) -> torch.Tensor:
        """The values of the tensor of that name as a reader of the file gets them."""
        if key not in self.template.half:
            return values
        if not self.template.on_grid(key, values.numel()):
            return values.clamp(-65504.0, 65504.0).half()  # what is beyond the range becomes its largest number
        codes, step = grid_codes(values.detach().double().cpu().numpy(), self.template.bits)  # numpy has no bfloat16
        self.codes[key] = codes, step
        return torch.from_numpy(codes.astype(np.float32) * step).to(values.device)

    def store_rest(self, small: nn.Module) -> None:
        """Round, in place, what has not been rounded yet, and leave the codes on the model for `records`."""
        for key, tensor in stored_tensors(small).items():
            if key not in self.codes:
                tensor.copy_(self(key, tensor))
        setattr(small, _ATTRIBUTE, self.codes)


def rename_vectors(small: nn.Module, layers: Collection[str]) -> None:
    """Call the codes that a `VectorStore` left on a model what the state dict does once these layers are split."""
    codes: Mapping[str, Any] = getattr(small, _ATTRIBUTE, {})
    names = renamed(codes, layers)
    setattr(small, _ATTRIBUTE, {names[key]: value for key, value in codes.items()})


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def stored_values(entry: Entry) -> np.ndarray:
    """A tensor of a file as the model has it: a weight that is stored rows first has its own layout again. Raises
    FormatError.
    """
    values = entry.dequantise().reshape(entry.shape)
    groups = swap_groups(entry)
    return swap(values, groups) if groups else values


def swap_groups(entry: Entry) -> int:
    """The groups within which the first two dimensions are exchanged, 0 where they are not. Raises FormatError."""
    groups = entry.params.get("swapped", 0)
    if not isinstance(groups, int) or groups < 0:
        raise FormatError(f"entry {entry.name!r}: its dimensions are exchanged in {groups!r} groups")
    if groups and (len(entry.shape) < 2 or entry.shape[0] % groups):
        raise FormatError(f"entry {entry.name!r}: {groups} groups do not divide the shape {entry.shape}")
    return groups


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


def records(
    small: nn.Module, compressed: Mapping[str, Entry], half: Collection[str], bits: int = HALF_BITS
) -> list[Entry]:
    """The records of every stored tensor in the order of the state dict: those of `half` as binary16, or as the codes
    that a `VectorStore` left on the model, in `bits` bits; a folded norm's statistics are implied.
    """
    codes: Mapping[str, tuple[np.ndarray, np.float32]] = getattr(small, _ATTRIBUTE, {})
    folded = {name for name, _ in foldable_norms(small)}
    entries = []
    for key, tensor in stored_tensors(small).items():
        owner, _, field = key.rpartition(".")
        if owner in folded and field in ("running_mean", "running_var"):
            continue
        params = {"folded": 1} if owner in folded and field == "weight" else {}
        if key in compressed:
            entries.append(compressed[key])
        elif key in codes:
            entries.append(grid_entry(key, *codes[key], bits, params=params))
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
    bytes); `keys` maps each layer that can be compressed to its record; `half` and `grid`: see `vector_keys`; `bits`
    per value of those on a grid (16: none is). dense_bytes: see `layers.dense_file_bytes`; parameters: floating-point
    values. widths: where layers can be narrower, what then stays.
    """

    entries: tuple[Entry, ...]
    keys: Mapping[str, str]
    half: frozenset[str]
    grid: frozenset[str]
    dense_bytes: int
    parameters: int
    bits: int = HALF_BITS
    widths: Widths | None = None

    def on_grid(self, key: str, count: int) -> bool:
        """Whether the tensor of that name and size is stored on a grid: where that is shorter than binary16."""
        return self.bits < HALF_BITS and key in self.grid and grid_size(count, self.bits) < 2 * count

    def at(self, bits: int) -> Template:
        """The template with that many bits per value of norms and biases."""
        made = dataclasses.replace(self, bits=bits)

        def entry(e: Entry) -> Entry:
            if e.name not in self.half:
                return e
            if made.on_grid(e.name, e.numel):
                return Entry(e.name, e.shape, "float32", "packed", bytes(grid_size(e.numel, bits)), "tensor", e.params)
            return Entry(e.name, e.shape, "float32", "fp16", bytes(2 * e.numel), "none", e.params)

        return dataclasses.replace(made, entries=tuple(map(entry, self.entries)))

    def narrowed(self, structure: Mapping[str, float]) -> Template:
        """The template of the model with these levels of its groups of channels; other groups are whole."""
        if self.widths is None:
            raise MismatchError("this profile has no narrower layers; profile with `channels`")
        sizes: dict[str, dict[int, int]] = {}
        for name, units in self.widths.units(structure).items():
            for axis in self.widths.groups[name].axes:
                sizes.setdefault(axis.key, {})[axis.dim] = len(axis.kept(units))

        def entry(e: Entry) -> Entry:
            if e.name not in sizes:
                return e
            shape = list(e.shape)
            for dim, size in sizes[e.name].items():
                shape[1 - dim if e.params.get("swapped") else dim] = size  # a swapped weight is stored rows first
            length = e.bytes // e.numel * int(np.prod(shape))
            return dataclasses.replace(e, shape=tuple(shape), payload=bytes(length))

        exact = self.at(HALF_BITS)  # in which every value of a tensor takes the same number of bytes
        made = dataclasses.replace(exact, entries=tuple(map(entry, exact.entries)), widths=None)
        return made.at(self.bits)

    def file_bytes(self, choice: Mapping[str, Measured]) -> int:
        """Exact length of the file when each layer (by name) takes the given row of its profile.

        The header is compressed, so its length depends on the options' names; payloads enter by their length alone.
        """
        if self.widths is not None:
            structure = self.widths.structure_of({name: row.option for name, row in choice.items()})
            if any(level != WHOLE for level in structure.values()):
                return self.narrowed(structure).file_bytes(choice)
        rows = {self.keys[name]: row for name, row in choice.items()}
        split = [name for name, row in choice.items() if row.part_bytes]
        names = renamed((entry.name for entry in self.entries), split)
        found: list[Entry] = []
        residual: list[Entry] = []  # stands behind the bias of its layer, which directly follows the weight
        for entry in self.entries:
            if entry.name in rows:
                parts = _stand_ins(entry, rows[entry.name])
                found += [*residual, *parts[:2]]
                residual = parts[2:]
            elif names[entry.name] == entry.name:
                found += [*residual, entry]
                residual = []
            else:
                found.append(dataclasses.replace(entry, name=names[entry.name]))
        return file_size([*found, *residual])

    def to_json(self) -> dict[str, Any]:
        return {
            "entries": [[e.name, list(e.shape), e.dtype, e.codec, e.bytes, dict(e.params)] for e in self.entries],
            "keys": dict(self.keys),
            "half": sorted(self.half),
            "grid": sorted(self.grid),
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
            tuple(entries),
            dict(value["keys"]),
            frozenset(value["half"]),
            frozenset(value["grid"]),
            value["dense_bytes"],
            value["parameters"],
        )


def _stand_ins(entry: Entry, row: Measured) -> list[Entry]:
    """Entries of the lengths that `row` will have, several if it is one of factors; their bytes are zeros."""
    if row.part_bytes:
        params = {**entry.params, "option": str(row.option), "factor": row.option.groups or 1}
        names, shapes = factor_keys(entry.name, len(row.part_bytes)), factor_shapes(entry.shape, row.option)
        each = zip(names, shapes, row.codec.split(","), row.part_bytes, row.step.split(","), strict=True)
        return [Entry(name, shape, "float32", codec, bytes(n), step, params) for name, shape, codec, n, step in each]
    return [_whole_stand_in(entry, row)]


def _whole_stand_in(entry: Entry, row: Measured) -> Entry:
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
    half, grid = vector_keys(model, layers)
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
    return Template(tuple(entries), keys, half, grid, dense_file_bytes(model), parameters)
