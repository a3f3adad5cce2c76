"""A layer as two thinner ones, and a third beside them for what they leave: what a low-rank option makes of a module,
and of the tensors of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from autocompress.layers import CONVOLUTIONS

__all__ = ["Factored", "GroupedLinear", "Halves", "bias_key", "factorise", "renamed", "split_shapes"]


class GroupedLinear(nn.Module):
    """A linear layer that is block diagonal: each of `groups` equal runs of inputs makes its own run of outputs.

    weight (out, in / groups), as a grouped convolution has it; no bias.
    """

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parts = input.unflatten(-1, (self.groups, self.in_features // self.groups)).unsqueeze(-2)
        weight = self.weight.unflatten(0, (self.groups, self.out_features // self.groups))
        return torch.matmul(parts, weight.transpose(1, 2)).squeeze(-2).flatten(-2)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}"


class Factored(nn.Sequential):
    """Two layers in the place of one: the first with its kernel, stride, padding and dilation and no bias, grouped, the
    second of kernel 1 with its bias. A third one, as the layer itself and without a bias, is added to them.

    `weight` is what all are together, for code that looks at the weight of a layer instead of calling it.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self[1](self[0](input))
        for residual in list(self)[2:]:
            output = output + residual(input)
        return output

    @property
    def weight(self) -> torch.Tensor:
        first, second = cast(Any, self[0]), cast(Any, self[1])
        groups = getattr(first, "groups", 1)
        rows = first.weight.reshape(groups, first.weight.shape[0] // groups, -1)
        parts = second.weight.reshape(second.weight.shape[0], groups, -1)
        dense = torch.einsum("fgr,grd->fgd", parts, rows)
        dense = dense.reshape(dense.shape[0], groups * first.weight.shape[1], *first.weight.shape[2:])
        return sum((cast(Any, residual).weight for residual in list(self)[2:]), dense)

    @property
    def bias(self) -> torch.Tensor | None:
        return cast(Any, self[1]).bias


@dataclass(frozen=True)
class Halves:
    """How a layer is split: `groups` runs of its inputs, `between` channels between its two halves in all, and whether
    a third layer holds the residual.
    """

    groups: int
    between: int
    residual: bool = False


def bias_key(layer: str) -> str:
    """What the bias of a layer is called once the layer is split."""
    return f"{layer}.1.bias"


def renamed(names: Iterable[str], layers: Iterable[str]) -> dict[str, str]:
    """Names of a state dict -> what they are called once these layers are split, the biases that is."""
    moved = {f"{layer}.bias": bias_key(layer) for layer in layers}
    return {name: moved.get(name, name) for name in names}


def split_shapes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, Halves]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors once these layers of it are split; layers that cannot be, or are already,
    keep what they have.
    """
    names = renamed(shapes, [name for name in layers if _splittable(model, name)])
    found = {names[name]: shape for name, shape in shapes.items()}
    for name, halves in layers.items():
        shape = shapes.get(f"{name}.weight")
        if shape is None or not _splittable(model, name) or shape[1] % halves.groups:
            continue
        del found[f"{name}.weight"]
        found[f"{name}.0.weight"] = (halves.between, shape[1] // halves.groups, *shape[2:])
        found[f"{name}.1.weight"] = (shape[0], halves.between, *(1 for _ in shape[2:]))
        if halves.residual:
            found[f"{name}.2.weight"] = shape
    return found


def _splittable(model: nn.Module, name: str) -> bool:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    return type(module) in (nn.Linear, *CONVOLUTIONS) and getattr(module, "groups", 1) == 1


def factorise(model: nn.Module, layers: Mapping[str, Halves]) -> nn.Module:
    """Replace layers, by name, by two or three each, wherever the model holds them; the new weights are not set.

    The bias is moved over, the same tensor. Layers that are split already stay as they are; every other one must be a
    linear layer or a convolution of one group, as `Layer.factorable` and `split_shapes` see to.
    """
    for name, halves in layers.items():
        module = model.get_submodule(name)
        if isinstance(module, Factored):
            continue
        new = _split(module, halves)
        for parent in list(model.modules()):
            for child, held in parent._modules.items():
                if held is module:
                    parent._modules[child] = new
    return model


def _split(module: nn.Module, halves: Halves) -> Factored:
    with torch.device("meta"):
        layers = _halves(module, halves)
    weight = cast(torch.Tensor, module.weight)
    new = Factored(*layers).to_empty(device=weight.device).to(weight.dtype)
    new.requires_grad_(weight.requires_grad).train(module.training)
    new[1].register_parameter("bias", module._parameters.get("bias"))
    return new


def _halves(module: nn.Module, halves: Halves) -> list[nn.Module]:
    groups, between = halves.groups, halves.between
    if type(module) is nn.Linear:
        first: nn.Module
        if groups == 1:
            first = nn.Linear(module.in_features, between, bias=False)
        else:
            first = GroupedLinear(module.in_features, between, groups)
        residual = [nn.Linear(module.in_features, module.out_features, bias=False)] * halves.residual
        return [first, nn.Linear(between, module.out_features, bias=False), *residual]
    assert type(module) in CONVOLUTIONS
    conv = cast(Any, module)
    kind = type(conv)
    place = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    how: Any = {"bias": False, "padding_mode": conv.padding_mode}
    first = kind(conv.in_channels, between, *place, groups, **how)
    residual = [kind(conv.in_channels, conv.out_channels, *place, **how)] * halves.residual
    return [first, kind(between, conv.out_channels, 1, bias=False), *residual]
