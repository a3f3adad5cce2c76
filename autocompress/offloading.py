"""Weights that are not in memory: a module reads its own whenever it runs, and lets it go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["READER", "Reader", "is_streamed", "reading"]

READER = "_autocompress_reader"  # on a model whose weights are on the meta device: what reads one by its name
NOTHING = torch.full((1,), torch.nan)
Reader = Callable[[str], torch.Tensor]
Place = tuple[str, nn.Module, str]  # of a weight: its name in the state dict, its module, its name there


def is_streamed(model: nn.Module) -> bool:
    """Whether weights of this model are left in their files, or encoded, and read when they are wanted."""
    return hasattr(model, READER)


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Have a streamed model run within a `with` block: in memory are the weights of the module that runs, and no other.

    A weight that is in memory already is left there. In the place of the others stand tensors of one NaN, on the device
    that the weights come to: what uses one outside of its module's call puts out NaN. Any other model is left alone.
    """
    reader: Reader | None = getattr(model, READER, None)
    places = [] if reader is None else _away(model)
    absent = {place: nn.Parameter(NOTHING.expand(old.shape), requires_grad=False) for place, old in places}
    handles: list[Any] = []

    def read(host: nn.Module) -> None:
        assert reader is not None
        for key, owner, field in hosts[host]:
            if owner._parameters[field] is absent[key, owner, field]:
                owner._parameters[field] = nn.Parameter(reader(key), requires_grad=False)

    def drop(host: nn.Module) -> None:
        for place in hosts[host]:
            place[1]._parameters[place[2]] = absent[place]

    hosts: dict[nn.Module, list[Place]] = {}
    for place, _ in places:
        hosts.setdefault(_host(model, place), []).append(place)
    try:
        for host in hosts:
            handles.append(host.register_forward_pre_hook(lambda m, a: read(m), prepend=True))
            handles.append(host.register_forward_hook(lambda m, a, y: drop(m)))
        for (_, owner, field), nothing in absent.items():
            owner._parameters[field] = nothing
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (_, owner, field), parameter in places:
            owner._parameters[field] = parameter


def _away(model: nn.Module) -> list[tuple[Place, nn.Parameter]]:
    """Every weight that is not in memory, with its place."""
    return [
        ((f"{name}.{field}" if name else field, module, field), parameter)
        for name, module in model.named_modules()
        for field, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]


def _host(model: nn.Module, place: Place) -> nn.Module:
    """The module whose call needs a weight: its own, or the attention whose output projection it is, as torch's never
    calls that.
    """
    parent = model.get_submodule(place[0].rpartition(".")[0].rpartition(".")[0])
    return parent if isinstance(parent, nn.MultiheadAttention) else place[1]
