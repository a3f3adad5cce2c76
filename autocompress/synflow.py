"""SynFlow: which weights of an untrained network the signal flows through, without data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autocompress.batches import Batch, feed
from autocompress.errors import LayerError

__all__ = ["ROUNDS", "synflow_densities"]

ROUNDS = 100  # of SynFlow's own schedule


def synflow_densities(
    model: nn.Module, example: Batch, keys: Sequence[str], density: float, rounds: int = ROUNDS
) -> list[dict[str, float]]:
    """The part of each weight tensor that is kept after 0, 1, ..., `rounds` rounds of pruning down to `density`.

    R = 1ᵀ f(1), f the network with the magnitudes of all its parameters and buffers on an input of ones, norms as in
    evaluation; a weight's score is |θ ∂R/∂θ|, and after round k the `density`^(k/rounds) of all these weights with the
    largest scores are left. In float64, as R is a product over layers. keys: the weights that are scored. Raises
    LayerError where the input holds no floating-point numbers, or R is not finite and positive. Source: Tanaka et al.,
    arXiv 2006.05467, algorithm 1.
    """
    network = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    network.requires_grad_(False)
    weights = {key: network.get_parameter(key) for key in keys}
    total = sum(w.numel() for w in weights.values())
    ones = _ones(example)
    scores: dict[str, torch.Tensor] = {}
    found = [dict.fromkeys(keys, 1.0)]
    for k in range(1, rounds + 1):
        for weight in weights.values():
            weight.requires_grad_(True)
        flow = torch.stack([out.sum() for out in _floats(feed(network, ones))]).sum()
        if not 0.0 < (measure := float(flow.detach())) < math.inf:
            raise LayerError(
                f"SynFlow's measure of {type(model).__name__} is {measure:g} after {k - 1} rounds; it must be positive "
                "and finite: take method='programme', which needs no such measure"
            )
        gradients = torch.autograd.grad(flow, list(weights.values()), allow_unused=True)
        with torch.no_grad():
            for (key, weight), gradient in zip(weights.items(), gradients, strict=True):
                weight.requires_grad_(False)
                scores[key] = torch.zeros_like(weight) if gradient is None else (weight * gradient).abs()
            gone = total - max(1, round(total * density ** (k / rounds)))
            every = torch.cat([score.reshape(-1) for score in scores.values()])
            threshold = every.kthvalue(gone).values if gone else every.new_tensor(-1.0)
            for key, weight in weights.items():
                weight.mul_(scores[key] > threshold)
            found.append({key: float((s > threshold).double().mean()) for key, s in scores.items()})
    return found


def _floats(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _floats(item)]
    return [tensor for item in value for tensor in _floats(item)] if isinstance(value, tuple | list) else []


def _ones(example: Batch) -> Batch:
    """One sample of ones in the place of every floating-point tensor of a batch; other tensors as they are."""
    if not _floats(example):
        raise LayerError("SynFlow feeds ones, and the example holds no floating-point tensor: take method='programme'")

    def ones(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return torch.ones_like(item[:1], dtype=torch.float64) if item.is_floating_point() else item[:1]
        if isinstance(item, Mapping):
            return {key: ones(value) for key, value in item.items()}
        return tuple(map(ones, item)) if isinstance(item, tuple | list) else item

    return ones(example)
