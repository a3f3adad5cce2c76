"""What can be compressed in a model, and every such layer as matrices: groups, kernels, weights shared by several
modules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.errors import LayerError

__all__ = ["Layer", "Layers", "dense_file_bytes", "find_layers", "model_digest", "stored_tensors"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Layer:
    """One weight tensor that can be compressed, as `groups` matrices (rows, columns).

    `name` is the first module that owns it, `owners` all of them (tied weights are one entry); columns run over (in,
    *kernel).
    """

    name: str
    owners: tuple[str, ...]
    shape: tuple[int, ...]
    groups: int

    @property
    def key(self) -> str:
        """Name of the weight in the state dict."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        rows = self.shape[0] // self.groups
        return self.groups, rows, self.size // self.shape[0]

    def matrix(self, weight: torch.Tensor | np.ndarray) -> np.ndarray:
        """Weight as float64 (groups, rows, columns): W[g, r, j] multiplies input j of group g."""
        # Through torch, as numpy has no bfloat16.
        array = weight.detach().double().cpu().numpy() if isinstance(weight, torch.Tensor) else weight
        return np.ascontiguousarray(array, np.float64).reshape(self.matrix_shape)


@dataclass(frozen=True)
class Layers:
    """The layers of a model in the order of its modules, and what is left alone, with the reason."""

    layers: tuple[Layer, ...]
    skipped: dict[str, str]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise LayerError(f"there is no layer {name!r}; the layers are {', '.join(x.name for x in self.layers)}")


_LATER = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Bilinear,
)


def find_layers(model: nn.Module) -> Layers:
    """Every Linear and Conv1d/2d/3d weight of a model; weights shared by several modules appear once.

    Raises LayerError if a weight is not finite (naming the layer) or nothing can be compressed.
    """
    owners: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        if isinstance(module, _LATER):
            skipped[name] = f"{type(module).__name__} is not supported yet"
        if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            skipped[name] = "its weight is computed from other parameters; remove the parametrisation first"
        elif not weight.is_floating_point():
            skipped[name] = f"its weight is {weight.dtype}"
        elif weight.numel() == 0:
            skipped[name] = "its weight is empty"
        else:
            owners.setdefault(id(weight), []).append(name)
            modules.setdefault(id(weight), module)
    shared = _other_users(model, owners)
    layers = []
    for key, names in owners.items():
        module = modules[key]
        shared_weight: Any = module.weight
        same_kind = {(type(model.get_submodule(n)), getattr(model.get_submodule(n), "groups", 1)) for n in names}
        if key in shared:
            skipped[names[0]] = f"its weight is also used as {shared[key]}"
        elif len(same_kind) > 1:
            skipped[names[0]] = f"its weight is shared by different kinds of layers: {', '.join(names)}"
        elif not bool(torch.isfinite(shared_weight).all()):
            raise LayerError(
                f"layer {names[0]!r} has weights that are NaN or infinite; repair or retrain the model first"
            )
        else:
            layers.append(Layer(names[0], tuple(names), tuple(shared_weight.shape), int(getattr(module, "groups", 1))))
    if not layers:
        reasons = (
            "; ".join(f"{name}: {why}" for name, why in sorted(skipped.items()))
            or "it has no Linear or convolution layer"
        )
        raise LayerError(f"the model has nothing to compress ({reasons})")
    return Layers(tuple(layers), skipped)


def _other_users(model: nn.Module, owners: dict[int, list[str]]) -> dict[int, str]:
    """Weights that something other than the found layers holds too, such as a tied embedding: id -> its name there."""
    found = {}
    names = {(name, "weight") for group in owners.values() for name in group}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for parameter_name, parameter in module._parameters.items():
            known = (module_name, parameter_name) in names or isinstance(module, (nn.Linear, *CONVOLUTIONS))
            if parameter is not None and id(parameter) in owners and not known:
                found[id(parameter)] = f"{module_name}.{parameter_name}"
    return found


def _check_storable(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise LayerError(f"the state {name!r} is a {type(value).__name__}; a file holds tensors only")
    if value.is_complex() or value.is_quantized or value.layout != torch.strided:
        kind = "quantised" if value.is_quantized else str(value.dtype if value.is_complex() else value.layout)
        raise LayerError(f"the tensor {name!r} is {kind.removeprefix('torch.')}; a file holds dense real tensors only")


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the state dict that a file must hold: tied ones once, under their first name; integer counters
    left out.
    """
    out, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        _check_storable(name, tensor)
        if name.endswith("num_batches_tracked") or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        out[name] = tensor.detach()
    return out


def dense_file_bytes(model: nn.Module) -> int:
    """Length of a safetensors file without metadata that holds the floating-point tensors of the state dict as fp32,
    tied ones once.
    """
    tensors = {k: v for k, v in stored_tensors(model).items() if v.is_floating_point()}
    offset, header = 0, {}
    for name in sorted(tensors):
        size = 4 * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (text + 7) // 8 * 8 + offset


def model_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        _check_storable(name, tensor)
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
