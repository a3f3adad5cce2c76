"""Statistics correction: after compression, let every channel have the mean and the spread that it has in the dense
model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from autocompress.batches import Batch, feed
from autocompress.layers import CONVOLUTIONS, NORMS

__all__ = ["correct_statistics"]


def correct_statistics(dense: nn.Module, small: nn.Module, layers: Iterable[str], data: Batch) -> None:
    """Correct `small` in place, in forward order, on one batch that both models see.

    Batch norm (folded: mean 0, variance 1): with channel moments (μ_d, σ_d) of its input in the dense model and (μ_p,
    σ_p) here, the scale becomes a = γ/√(var+ε) · σ_d/σ_p and the shift γ(μ_d - mean)/√(var+ε) + β - a μ_p; a channel
    with σ_p = 0 gets a = 0. Layer norm: scale and shift likewise, from its output's moments. A compressed layer with a
    bias: its mean output is matched. It is the identity where nothing is compressed; re-estimating batch statistics is
    not, because the running ones come from augmented data. Modules that run more than once per forward pass are left
    alone. Source: OBC's statistics correction (arXiv 2208.11580, appendix), folded.
    """
    wanted = {
        name: dense.get_submodule(name)
        for name in layers
        if getattr(dense.get_submodule(name), "bias", None) is not None
    }
    for name, module in dense.named_modules():
        if isinstance(module, (nn.LayerNorm, *NORMS)) and _affine(module):
            wanted[name] = module
    targets = _dense_moments(dense, wanted, data)
    handles = []
    with torch.no_grad():
        for name, (mean, std, calls) in targets.items():
            if calls != 1:
                continue
            target: Any = small.get_submodule(name)
            if isinstance(target, NORMS):
                original: Any = dense.get_submodule(name)

                def norm_hook(m: Any, args: Any, mean: Any = mean, std: Any = std, original: Any = original) -> None:
                    _correct_batch_norm(m, original, args[0], mean, std)

                handles.append(target.register_forward_pre_hook(norm_hook))
            elif isinstance(target, nn.LayerNorm):

                def layer_norm_hook(
                    m: Any, args: Any, output: torch.Tensor, mean: Any = mean, std: Any = std
                ) -> torch.Tensor:
                    return _correct_layer_norm(m, output, mean, std)

                handles.append(target.register_forward_hook(layer_norm_hook))
            else:

                def bias_hook(m: Any, args: Any, output: torch.Tensor, mean: Any = mean) -> torch.Tensor:
                    return _correct_bias(m, output, mean)

                handles.append(target.register_forward_hook(bias_hook))
        try:
            feed(small, data)
        finally:
            for handle in handles:
                handle.remove()


def _affine(module: Any) -> bool:
    has_statistics = not isinstance(module, NORMS) or module.running_mean is not None
    return has_statistics and module.weight is not None and module.bias is not None


def _moments(x: torch.Tensor, channel: int, keep: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over all but `keep` dimensions from `channel` on, float64."""
    last = channel % x.ndim
    axes = [i for i in range(x.ndim) if not last <= i < last + keep]
    wide = x.detach().double()
    return wide.mean(axes), wide.var(axes, correction=0).sqrt()


def _output_moments(module: nn.Module, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(module, CONVOLUTIONS):
        return _moments(output, output.ndim - 1 - len(module.kernel_size))
    if isinstance(module, nn.LayerNorm):
        return _moments(output, -len(module.normalized_shape), len(module.normalized_shape))
    return _moments(output, -1)


def _dense_moments(
    dense: nn.Module, wanted: dict[str, nn.Module], data: Batch
) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    found: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
    handles = []
    for name, module in wanted.items():

        def hook(m: Any, args: Any, output: torch.Tensor, name: str = name) -> None:
            calls = found[name][2] + 1 if name in found else 1
            # Inputs of a batch norm have their channels in dimension 1.
            found[name] = (*(_moments(args[0], 1) if isinstance(m, NORMS) else _output_moments(m, output)), calls)

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            feed(dense, data)
    finally:
        for handle in handles:
            handle.remove()
    return found


# A channel whose spread fell below this part of its magnitude (or of the dense spread) is constant to rounding.
_FLAT = 1e-6


def _correct_batch_norm(m: Any, original: Any, x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> None:
    mu, sigma = _moments(x, 1)
    scale = original.weight.double() / (original.running_var.double() + original.eps).sqrt()
    flat = sigma <= _FLAT * (mu.abs() + std)
    a = torch.where(flat, 0.0, scale * std / torch.where(flat, 1.0, sigma))
    shift = scale * (mean - original.running_mean.double()) + original.bias.double() - a * mu
    m.weight.copy_((a * (1.0 + m.eps) ** 0.5).half())
    m.bias.copy_(shift.half())


def _correct_layer_norm(m: Any, output: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    mu, sigma = _output_moments(m, output)
    flat = sigma <= _FLAT * (mu.abs() + std)
    ratio = torch.where(flat, 1.0, std / torch.where(flat, 1.0, sigma))
    old_bias = m.bias.double()
    m.weight.copy_((m.weight.double() * ratio).half())
    m.bias.copy_((mean - (mu - old_bias) * ratio).half())
    return ((output.double() - mu) * ratio + mean).to(output.dtype)


def _correct_bias(m: Any, output: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    change = mean - _output_moments(m, output)[0]
    m.bias.copy_((m.bias.double() + change).half())
    shape = [1] * output.ndim
    channel = output.ndim - 1 - len(m.kernel_size) if isinstance(m, CONVOLUTIONS) else output.ndim - 1
    shape[channel] = -1
    return (output.double() + change.reshape(shape)).to(output.dtype)
