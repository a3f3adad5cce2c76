"""What can be compressed in a model, and every such layer as matrices: groups, kernels, weights shared by several
modules.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.errors import LayerError
from autocompress.offloading import READER

__all__ = [
    "Layer",
    "Layers",
    "dense_file_bytes",
    "find_layers",
    "float32_file_bytes",
    "is_rms_norm",
    "model_digest",
    "stored_tensors",
    "swap",
    "swapped_shape",
    "weight_of",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TABLES = (nn.Embedding, nn.EmbeddingBag)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Layer:
    """One weight tensor that can be compressed, as `groups` matrices (rows, columns).

    `owners` are all modules that hold it (tied weights are one entry), `parameter` what they call it. `name` is the
    first owner where that is "weight", else the tensor's full name; columns run over (in, *kernel). Rows are output
    channels; tokens of an embedding; gates times units of a recurrent layer; the packed projection of an attention has
    a group each for query, key and value. `swapped`: the weight is (in, out/groups, *kernel), as in transposed
    convolutions, and is stored as (out, in/groups, *kernel); see `swap`. `factorable`: whether two layers may take the
    place of its module (`factors.factorise`): a linear layer or a convolution of one group as torch has it, with a
    weight of its own.
    """

    name: str
    owners: tuple[str, ...]
    shape: tuple[int, ...]
    groups: int
    parameter: str = "weight"
    swapped: bool = False
    factorable: bool = False

    @property
    def key(self) -> str:
        """Name of the weight in the state dict."""
        return _join(self.owners[0], self.parameter)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape with all rows in the first dimension, as it is stored."""
        return swapped_shape(self.shape, self.groups) if self.swapped else self.shape

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        rows = self.stored_shape[0]
        return self.groups, rows // self.groups, self.size // rows

    @property
    def params(self) -> dict[str, int]:
        """What a record of the file has to say of the layout."""
        return {"swapped": self.groups} if self.swapped else {}

    def matrix(self, weight: torch.Tensor | np.ndarray) -> np.ndarray:
        """Weight as float64 (groups, rows, columns): W[g, r, j] multiplies input j of group g."""
        # Through torch, as numpy has no bfloat16.
        array = weight.detach().double().cpu().numpy() if isinstance(weight, torch.Tensor) else weight
        array = swap(array.reshape(self.shape), self.groups) if self.swapped else array
        return np.ascontiguousarray(array, np.float64).reshape(self.matrix_shape)

    def unmatrix(self, weight: np.ndarray) -> np.ndarray:
        """Inverse of `matrix`, in the dtype that it is given."""
        stored = weight.reshape(self.stored_shape)
        return np.ascontiguousarray(swap(stored, self.groups) if self.swapped else stored)


def swap(array: np.ndarray, groups: int) -> np.ndarray:
    """(groups · a, b, ...) to (groups · b, a, ...), the first two dimensions exchanged within each group; its own
    inverse.
    """
    a, b, *rest = array.shape
    parts = array.reshape(groups, a // groups, b, *rest)
    return parts.swapaxes(1, 2).reshape(groups * b, a // groups, *rest)


def swapped_shape(shape: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """Shape of `swap` of an array of that shape."""
    return (shape[1] * groups, shape[0] // groups, *shape[2:])


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


def find_layers(model: nn.Module) -> Layers:
    """Every weight of a Linear, (transposed) convolution, Embedding, EmbeddingBag, RNN, LSTM, GRU (or cell of one) or
    MultiheadAttention of a model; weights shared by several modules appear once.

    Raises LayerError if a weight is not finite (naming the layer) or nothing can be compressed.
    """
    users: dict[int, list[tuple[str, str]]] = {}  # id of a weight -> (module, parameter) that hold it
    skipped: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        if reason := _left_alone(module):
            skipped[name] = reason
            continue
        for parameter in _parameters(module):
            weight = module._parameters.get(parameter)
            called = name if parameter == "weight" else _join(name, parameter)
            if weight is None:
                skipped[called] = "its weight is computed from other parameters; remove the parametrisation first"
            elif not weight.is_floating_point():
                skipped[called] = f"its weight is {weight.dtype}"
            elif weight.numel() == 0:
                skipped[called] = "its weight is empty"
            else:
                users.setdefault(id(weight), []).append((name, parameter))
    others = _other_users(model, users)
    layers = []
    for key, found in users.items():
        owner, parameter = found[0]
        owners = tuple(name for name, _ in found)
        module = model.get_submodule(owner)
        weight = module._parameters[parameter]
        assert weight is not None
        name = owner if parameter == "weight" else _join(owner, parameter)
        if key in others:
            skipped[name] = f"its weight is also used as {others[key]}"
        elif len({_use(model.get_submodule(n), p) for n, p in found}) > 1:
            shared = ", ".join(n if p == "weight" else _join(n, p) for n, p in found)
            skipped[name] = f"its weight is shared by different kinds of layers: {shared}"
        elif not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise LayerError(f"layer {name!r} has weights that are NaN or infinite; repair or retrain the model first")
        else:
            groups = 3 if parameter == "in_proj_weight" else int(getattr(module, "groups", 1))
            swapped = isinstance(module, TRANSPOSED)
            factorable = bool(name) and len(owners) == 1 and groups == 1 and _plain(module)
            layers.append(Layer(name, owners, tuple(weight.shape), groups, parameter, swapped, factorable))
    if not layers:
        reasons = (
            "; ".join(f"{name}: {why}" for name, why in sorted(skipped.items()))
            or "it has no layer with a weight matrix"
        )
        raise LayerError(f"the model has nothing to compress ({reasons})")
    return Layers(tuple(layers), skipped)


def _left_alone(module: nn.Module) -> str | None:
    """Why a module that has weights to compress keeps them as they are, or None."""
    if isinstance(module, nn.Bilinear):
        return "Bilinear is not supported: its inputs are products of two"
    if isinstance(module, TABLES):
        kind = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
        if module.max_norm is not None:
            return "it changes its weight when it runs (max_norm)"
        if getattr(module, "mode", "") == "max":
            return "the maximum over a bag is not linear in its weight"
        if type(module).forward is not kind.forward:
            return "it has a forward of its own, so calibration cannot tell which rows it looks up"
    if isinstance(module, nn.MultiheadAttention) and type(module).forward is not nn.MultiheadAttention.forward:
        return "it has a forward of its own, so calibration cannot tell what its weights multiply"
    return None


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with a scale per channel and no shift: torch's, or one that an architecture brings and
    calls so, as most of Hugging Face do.
    """
    parameters = [name for name, p in module._parameters.items() if p is not None]
    own = isinstance(module, nn.RMSNorm) or type(module).__name__.endswith("RMSNorm")
    return own and parameters == ["weight"] and not list(module.children())


def _plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution and nothing more, so that another may take its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return type(module) in (nn.Linear, *CONVOLUTIONS) and not any(hooks) and "forward" not in module.__dict__


def _parameters(module: nn.Module) -> list[str]:
    """Names of the weights in a module that can be compressed."""
    if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *TABLES)):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        packed = module._qkv_same_embed_dim
        return ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if isinstance(module, nn.RNNBase):
        return [name for names in module._all_weights for name in names if name.startswith("weight")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    return []


def _use(module: nn.Module, parameter: str) -> tuple[Any, ...]:
    """What has to be the same for modules that share a weight: an output head and an embedding take the same matrix."""
    matrix = isinstance(module, (nn.Linear, *TABLES))
    return ("matrix" if matrix else type(module), parameter, getattr(module, "groups", 1))


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _other_users(model: nn.Module, users: dict[int, list[tuple[str, str]]]) -> dict[int, str]:
    """Weights that something other than the found layers holds too: id -> its name there."""
    found = {}
    names = {place for places in users.values() for place in places}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for parameter_name, parameter in module._parameters.items():
            known = (module_name, parameter_name) in names or (
                _left_alone(module) is None and parameter_name in _parameters(module)
            )
            if parameter is not None and id(parameter) in users and not known:
                found[id(parameter)] = _join(module_name, parameter_name)
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
    return float32_file_bytes({k: tuple(v.shape) for k, v in stored_tensors(model).items() if v.is_floating_point()})


def float32_file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Length of a safetensors file without metadata of float32 tensors of these shapes."""
    offset, header = 0, {}
    for name in sorted(shapes):
        size = 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
        offset += size
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (text + 7) // 8 * 8 + offset


def weight_of(model: nn.Module, key: str) -> torch.Tensor:
    """A parameter by its name in the state dict; of a streamed model (`offloading`), read each time."""
    found = model.get_parameter(key)
    return getattr(model, READER)(key) if found.is_meta else found


def model_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, held in sorted(model.state_dict().items()):
        _check_storable(name, held)
        tensor = weight_of(model, name) if held.is_meta else held
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
